"""`bupo.evaluate`: avg@k, pass@k and majority@k of a model, or of an internal policy, on benchmarks."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerBase

from bupo.data.chat_templates import check_chat_template, check_prompt_characters, check_prompt_tokens
from bupo.data.problems import check_problems
from bupo.data.prompt_settings import PromptSettings, read_training_prompt_settings, resolve_defaults
from bupo.evaluation.answer_source import (
    EvaluatedModel,
    read_cached_metadata,
    read_cached_settings,
    read_cached_system_prompt,
)
from bupo.evaluation.answers import (
    GRADED_FILE,
    REGRADE_HINT,
    SampleKey,
    get_correct,
    grade_completions,
    open_sample_cache,
    read_graded_table,
    sample_completions,
    summarize,
    tokenize_prompts,
)
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.evaluation.lm_eval import HarnessRun, check_task, prepare_harness_run, run_task
from bupo.evaluation.lm_eval_tasks import get_task_label, is_harness_task
from bupo.evaluation.metrics import paired_difference
from bupo.evaluation.options import FALLBACK_OPTIONS, PAPER_OPTIONS, EvalOptions
from bupo.evaluation.paper_preset import resolve_preset
from bupo.generation.seeded_sampling import SampledCompletion, TransformersEngine
from bupo.models.loading import EMBEDDED_MODEL
from bupo.options.groups import get_changed_options
from bupo.reports.evaluation_scores import write_scores
from bupo.reports.samples_page import write_samples_page
from bupo.rewards.grader import check_gold_answers
from bupo.run_files.provenance import record_run
from bupo.run_files.reading import NONE_TYPE, DamagedFileError, check_keys, read_json
from bupo.run_files.result_cache import ResultCache, get_label_folder
from bupo.utils.errors import UserError
from bupo.utils.files import atomic_write, check_output_folder, write_json
from bupo.utils.lock import folder_lock
from bupo.utils.progress import add_progress_task
from bupo.utils.sanitize import escape_text

SUMMARY_FILE, SCHEMA_VERSION = "summary.json", 4
CACHED_REMEDY = "give the benchmark, seed and system_prompt that they were sampled with"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        meta (`dict`): model, weights, template, sampling, versions.
        folder (`Path`): folder of the evaluation.
        compared_with (`str`, *optional*): folder of the evaluation that is compared.
        benchmarks (`dict[str, dict]`): scores by benchmark: `avg@k` and its interval, `pass@k`, `majority@k` …
        harness (`dict[str, dict]`): scores of lm-eval-harness's benchmarks.
        tables (`dict[str, pd.DataFrame]`): graded answers by benchmark: question, gold, text, verdict, strict …
        prompts (`dict[str, str]`): first formatted prompt by benchmark.
    """

    meta: dict[str, Any]
    folder: Path
    compared_with: str | None = None
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    harness: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        summary = {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "benchmarks": self.benchmarks,
            "harness": self.harness,
        }
        return summary | ({"compared_with": self.compared_with} if self.compared_with else {})

    def write(self) -> None:
        """Write the results so far to the folder."""
        summary = self.to_dict()
        write_json(self.folder / SUMMARY_FILE, summary)
        write_scores(summary, self.folder)
        if self.tables:
            write_samples_page(self.tables, summary, self.prompts, self.folder / "report.html")


def evaluate(
    model: str | nn.Module,
    options: EvalOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    benchmarks: Mapping[str, Dataset] | None = None,
    recorded_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Sample, grade and summarise answers, benchmark by benchmark, and write the folder.

    Args:
        model (`str` or `PreTrainedModel`): a name as for [`load_model`], or a loaded model with its tokenizer.
        options ([`EvalOptions`], *optional*): all other options; the argument `model` replaces compared.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of a loaded model.
        benchmarks (`dict[str, Dataset]`, *optional*): problems by label, with `prompt` (messages) and `answer`, instead of
            the options' benchmarks.
        recorded_options (`dict`, *optional*): content of `config.yaml`; by default the options that differ from the defaults.
        progress (`rich.progress.Progress`, *optional*): progress bars.

    Raises:
        UserError: for invalid options, a model or problems that cannot be read, or a folder with results of other settings.
    """
    options = replace(options or EvalOptions(), model=model if isinstance(model, str) else "")
    options.check()
    check_output_folder("output", options.output)
    check_chat_template(options.chat_template)
    if recorded_options is None:
        recorded_options = get_changed_options(options)
    options, prompt_settings = _resolve_options(options, model, tokenizer)
    if progress and prompt_settings.summary_line:
        progress.console.print(escape_text(prompt_settings.summary_line), highlight=False, markup=False)
    with folder_lock(options.output):
        return _evaluate(model, options, prompt_settings, tokenizer, benchmarks, recorded_options, progress)


def _resolve_options(options: EvalOptions, model: str | nn.Module, tokenizer) -> tuple[EvalOptions, PromptSettings]:
    """Fill in the options that are not set, and return the prompt settings."""
    trained = read_training_prompt_settings(options.model, options.adapter)
    if options.engine == "cached":  # the system message of the cached answers, if no model is given
        defaults = {**FALLBACK_OPTIONS, "system_prompt": read_cached_system_prompt(Path(options.output))}
        return resolve_defaults(options, trained, defaults, PAPER_OPTIONS if options.preset else {})
    return resolve_preset(options, trained, [model or EMBEDDED_MODEL], tokenizer, FALLBACK_OPTIONS, PAPER_OPTIONS)


def _evaluate(
    model,
    options: EvalOptions,
    prompt_settings: PromptSettings,
    tokenizer,
    benchmarks,
    recorded_options: dict,
    progress,
) -> Evaluation:
    """Evaluate with resolved options while the folder is locked."""
    ks = options.get_k_by_label(benchmarks or ())
    options.check_k(ks)
    problems, tasks = _load_benchmark_problems(options, benchmarks)
    compared = _read_compared_summary(options.compare, problems)
    source = (
        None
        if options.engine == "cached"
        else EvaluatedModel(EMBEDDED_MODEL if model == "" else model, options, prompt_settings, tokenizer)
    )
    benchmark_runs = [_prepare_benchmark(label, rows, ks[label], source, options) for label, rows in problems.items()]
    harness_runs = {label: _prepare_harness(name, source, options) for label, name in tasks.items()}
    meta = source.meta if source else read_cached_metadata(Path(options.output), list(problems))
    python_arguments = ["model"] * isinstance(model, nn.Module) + ["benchmarks"] * (benchmarks is not None)
    record_run(options.output, "eval", recorded_options, python_arguments)
    evaluation = Evaluation(meta, Path(options.output), options.compare)
    for run in benchmark_runs:
        _evaluate_benchmark(run, evaluation, source, compared, options, progress)
    _run_harness(harness_runs, evaluation, source, options)
    return evaluation


@dataclass(frozen=True)
class _BenchmarkRun:
    """A benchmark that is ready to be sampled or graded.

    Attributes:
        label (`str`), problems (`Dataset`), k (`int`): the benchmark, and answers per problem.
        prompts (`list[tuple[int, ...]]`): token ids; empty if cached answers are graded.
        prompt (`str`): the first formatted prompt.
        store ([`~bupo.run_files.result_cache.ResultCache`]): cache of the answers.
    """

    label: str
    problems: Dataset
    k: int
    prompts: list[tuple[int, ...]]
    prompt: str
    store: ResultCache[SampleKey, SampledCompletion]


def _load_benchmark_problems(
    options: EvalOptions, benchmarks: Mapping[str, Dataset] | None
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Load and check the problems; return them by label, and the names of the harness's benchmarks by label."""
    if benchmarks is not None:
        if not benchmarks:
            raise UserError("benchmarks is empty: give problems by label, or leave it out")
        for label, problems in benchmarks.items():
            check_problems(problems, label, ("prompt", "answer"))
            check_gold_answers(problems["answer"], label)
        return dict(benchmarks), {}
    tasks = {get_task_label(name): name for name in options.benchmark_names if is_harness_task(name)}
    problems = load_benchmarks(
        [name for name in options.benchmark_names if not is_harness_task(name)],
        options.size,
        options.system_prompt,
        options.seed,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
    )
    if (
        not options.benchmark_names
        or len(tasks) + len(problems) < len(options.benchmark_names)
        or tasks.keys() & problems.keys()
    ):
        names = ",".join(options.benchmark_names)
        raise UserError(f"benchmarks {names!r} is empty, or two have the same label: write LABEL=FILE for one")
    for label in (*problems, *tasks):
        get_label_folder(options.output, label)
    return problems, tasks


def _prepare_benchmark(
    label: str, problems: Dataset, k: int, source: EvaluatedModel | None, options: EvalOptions
) -> _BenchmarkRun:
    """Prepare a benchmark and its cache, which refuses answers of other settings."""
    folder = get_label_folder(options.output, label)
    if source is None:
        settings = read_cached_settings(folder)
        num_cached = min(len(problems), len(settings["problems"]))
        store = open_sample_cache(folder, settings, problems.select(range(num_cached)), remedy=CACHED_REMEDY)
        run = _BenchmarkRun(label, problems, k, [], settings["prompt"], store)
        run.store.begin()
        _get_cached_completions(run)
        return run
    check_prompt_characters(problems["prompt"], source.limits, label)
    prompts = tokenize_prompts(problems, source.tokenizer, **source.template_kwargs)
    prompt = source.tokenizer.decode(prompts[0])
    check_prompt_tokens(prompts, source.limits, label)
    longest = max(map(len, prompts)) + options.sampling_settings[0]
    if source.max_length and longest > source.max_length:
        logger.warning(
            "%s: prompts and answers may reach %s tokens, beyond the model's context of %s",
            label,
            longest,
            source.max_length,
        )
    settings = source.cache_settings | {"prompt": prompt}
    store = open_sample_cache(
        folder, settings, problems, prompts, metadata=source.metadata, overwrite=options.overwrite
    )
    return _BenchmarkRun(label, problems, k, prompts, prompt, store)


def _prepare_harness(name: str, source: EvaluatedModel | None, options: EvalOptions) -> HarnessRun:
    """Load a harness benchmark's data and prepare its cache."""
    assert source is not None  # the options refuse other engines
    chat = source.tokenizer.chat_template is not None
    check_task(name, chat, options.run_code)
    return prepare_harness_run(name, Path(options.output), source.cache_settings, options, chat, source.metadata)


def _evaluate_benchmark(
    run: _BenchmarkRun,
    evaluation: Evaluation,
    source: EvaluatedModel | None,
    compared: dict[str, dict],
    options: EvalOptions,
    progress: Progress | None,
) -> None:
    """Evaluate one benchmark; add its results to the evaluation and write the folder."""
    table = _sample_and_grade(run, source, options, progress)
    scores = summarize(table)
    if run.label in compared:
        scores |= _compare(run.label, table, compared, options)
    evaluation.tables[run.label] = table
    evaluation.prompts[run.label] = run.prompt
    evaluation.benchmarks[run.label] = scores
    evaluation.write()


def _run_harness(
    runs: dict[str, HarnessRun], evaluation: Evaluation, source: EvaluatedModel | None, options: EvalOptions
) -> None:
    """Run the harness's benchmarks; add their results to the evaluation and write the folder."""
    for label, harness_run in runs.items():
        assert source is not None and isinstance(source.engine, TransformersEngine)  # the options refuse others
        evaluation.harness[label] = run_task(harness_run, source.engine, options, source.template_kwargs)
        evaluation.write()


def _sample_and_grade(
    run: _BenchmarkRun, source: EvaluatedModel | None, options: EvalOptions, progress: Progress | None
) -> pd.DataFrame:
    """Return the benchmark's graded table, and write it to its folder."""
    total = len(run.problems) * run.k
    if source is None:
        answers = _get_cached_completions(run)
    else:
        run.store.begin()
        done = add_progress_task(progress, f"{run.label}: answers", total)
        answers = sample_completions(source.engine, run.prompts, run.k, options.seed, run.store, done)
    table = grade_completions(
        run.problems, answers, options.deadline, add_progress_task(progress, f"{run.label}: grades", total)
    )
    with atomic_write(run.store.folder / GRADED_FILE) as part:
        table.to_parquet(part)
    return table


def _get_cached_completions(run: _BenchmarkRun) -> list[list[SampledCompletion]]:
    """Return the cached answers; raise [`UserError`] if some are missing."""
    rows, problems, k = run.store.rows, range(len(run.problems)), run.k
    for problem in problems:
        num_cached = sum((problem, n) in rows for n in range(k))
        if num_cached < k:
            raise UserError(
                f"{run.store.folder} holds {num_cached} answers to problem {problem}, and k is {k}: lower k or size, or sample "
                "the rest with another engine"
            )
    return [[rows[p, n] for n in range(k)] for p in problems]


def read_summary(folder: str) -> dict[str, Any]:
    """Read the `summary.json` of a finished evaluation.

    Raises:
        UserError: if it is missing, damaged, or of another format.
    """
    path = Path(folder) / SUMMARY_FILE
    if not os.path.lexists(path):
        raise UserError(f"{folder} holds no finished evaluation ({SUMMARY_FILE} is missing)")
    remedy = f"delete it and evaluate {folder} again"
    summary = read_json(path, {"benchmarks": dict, "schema_version": (int, NONE_TYPE)}, remedy)
    version = summary.get("schema_version") or 0
    if version < SCHEMA_VERSION:
        raise UserError(f"{folder} was graded by an earlier version: {REGRADE_HINT}")
    return summary


def check_scores(folder: str, summary: dict[str, Any], labels: Iterable[str]) -> None:
    """Check the scores of some benchmarks of an evaluation.

    Raises:
        DamagedFileError: if a score is missing or of another type.
    """
    for label in labels:
        scores = summary["benchmarks"][label]
        try:
            check_keys(scores, {"problems": int, "k": int, "avg@k": float, "pass@k": dict})
            check_keys(scores["pass@k"], dict.fromkeys(scores["pass@k"], float))
        except ValueError as error:
            path = Path(folder) / SUMMARY_FILE
            raise DamagedFileError(path, f"{label}: {error}", f"delete it and evaluate {folder} again") from error


def _read_compared_summary(folder: str | None, benchmarks: Mapping[str, Dataset]) -> dict[str, dict]:
    """Return the scores of the evaluation that is compared, by label.

    Raises:
        UserError: if it does not exist, or has no benchmark in common with this one.
    """
    if folder is None:
        return {}
    summary = read_summary(folder)
    compared = summary["benchmarks"]
    if not compared.keys() & benchmarks.keys():
        raise UserError(f"{folder} holds none of {', '.join(benchmarks)}: its benchmarks are {', '.join(compared)}")
    check_scores(folder, summary, compared.keys() & benchmarks.keys())
    for label in compared.keys() & benchmarks.keys():  # a damaged table is refused before anything is sampled
        read_graded_table(Path(folder) / label, Path(folder))
    return compared


def _compare(label: str, table: pd.DataFrame, compared: dict[str, dict], options: EvalOptions) -> dict[str, Any]:
    """Return the paired difference to the other evaluation on one benchmark."""
    other = Path(options.compare or "") / label
    other_table = read_graded_table(other, Path(options.compare or ""))
    if _get_questions(other_table) != _get_questions(table):
        raise UserError(f"{other} holds other problems than {label}: a paired difference needs the same ones")
    difference, interval = paired_difference(get_correct(other_table), get_correct(table))
    return {
        "compared_pass@k": compared[label]["pass@k"],
        "difference": difference,
        "difference_interval": interval,
    }


def _get_questions(table: pd.DataFrame) -> list[str]:
    return table.groupby("problem", sort=True)["question"].first().tolist()
