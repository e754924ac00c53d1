"""`bupo.evaluate`: avg@k, pass@k and majority@k of a model, or of a policy inside it, on benchmarks."""

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

SUMMARY_FILE, SCHEMA_VERSION = "summary.json", 4  # majority votes of equal answers since 4
CACHED_REMEDY = "give the benchmark, seed and system_prompt that they were sampled with"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        benchmarks (`dict[str, dict]`): numbers by benchmark: `avg@k` and its interval, `pass@k`, `majority@k` …
        harness (`dict[str, dict]`): numbers of lm-eval-harness' benchmarks.
        tables (`dict[str, pd.DataFrame]`): graded answers by benchmark: question, gold, text, verdict, strict …
        prompts (`dict[str, str]`): by benchmark, the first prompt as the model reads it.
        meta (`dict`): model, weights, template, sampling, versions.
        folder (`Path`): of the run.
        compared_with (`str`, *optional*): the folder of the other evaluation.
    """

    meta: dict[str, Any]
    folder: Path
    compared_with: str | None = None
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    harness: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        found = {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "benchmarks": self.benchmarks,
            "harness": self.harness,
        }
        return found | ({"compared_with": self.compared_with} if self.compared_with else {})

    def write(self) -> None:
        """What is known so far, into the folder."""
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
    noted: dict[str, Any] | None = None,
    bar: Progress | None = None,
) -> Evaluation:
    """Sample, grade and sum up, benchmark by benchmark, and write the run's folder.

    Args:
        model (`str` or `PreTrainedModel`): a name as of [`load_model`], or a loaded model with its tokenizer.
        options ([`EvalOptions`], *optional*): everything else. Its `model` gives way to the argument.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a loaded model.
        benchmarks (`dict[str, Dataset]`, *optional*): problems by label, with `prompt` (messages) and `answer`, instead of
            those that the options name.
        noted (`dict`, *optional*): what `config.yaml` holds; by default the options that differ from the defaults.
        bar (`rich.progress.Progress`, *optional*): shows how far it is.

    Raises:
        UserError: for bad options, a model or problems that cannot be read, or a folder with work of other settings.
    """
    options = replace(options or EvalOptions(), model=model if isinstance(model, str) else "")
    options.check()
    check_output_folder("output", options.output)
    check_chat_template(options.chat_template)
    noted = get_changed_options(options) if noted is None else noted
    options, asking = _resolve_options(options, model, tokenizer)
    if bar and asking.summary_line:
        bar.console.print(escape_text(asking.summary_line), highlight=False, markup=False)
    with folder_lock(options.output):
        return _evaluate(model, options, asking, tokenizer, benchmarks, noted, bar)


def _resolve_options(options: EvalOptions, model: str | nn.Module, tokenizer) -> tuple[EvalOptions, PromptSettings]:
    """Options with all that is not given, and how the model is asked."""
    own = read_training_prompt_settings(options.model, options.adapter)
    if options.engine == "cached":  # as the answers were asked for, if no model tells
        kept = {"system_prompt": read_cached_system_prompt(Path(options.output))}
        return resolve_defaults(options, own, {**FALLBACK_OPTIONS, **kept}, PAPER_OPTIONS if options.preset else {})
    return resolve_preset(options, own, [model or EMBEDDED_MODEL], tokenizer, FALLBACK_OPTIONS, PAPER_OPTIONS)


def _evaluate(
    model, options: EvalOptions, asking: PromptSettings, tokenizer, benchmarks, noted: dict, bar
) -> Evaluation:
    """As of `evaluate`, in a folder of its own."""
    ks = options.get_k_by_label(benchmarks or ())
    options.check_k(ks)
    problems, tasks = _load_benchmark_problems(options, benchmarks)
    theirs = _read_compared_summary(options.compare, problems)
    source = (
        None
        if options.engine == "cached"
        else EvaluatedModel(EMBEDDED_MODEL if model == "" else model, options, asking, tokenizer)
    )
    works = [_prepare_benchmark(label, rows, ks[label], source, options) for label, rows in problems.items()]
    runs = {label: _prepare_harness(name, source, options) for label, name in tasks.items()}
    meta = source.meta if source else read_cached_metadata(Path(options.output), list(problems))
    objects = ["model"] * isinstance(model, nn.Module) + ["benchmarks"] * (benchmarks is not None)
    record_run(options.output, "eval", noted, objects)
    found = Evaluation(meta, Path(options.output), options.compare)
    for work in works:
        _evaluate_benchmark(work, found, source, theirs, options, bar)
    _run_harness(runs, found, source, options)
    return found


@dataclass(frozen=True)
class _BenchmarkRun:
    """A benchmark that will be answered.

    Attributes:
        label (`str`), problems (`Dataset`), k (`int`): the benchmark, and answers a problem.
        prompts (`list[tuple[int, ...]]`): token ids; none where answers are only graded.
        prompt (`str`): the first, as the model reads it.
        store ([`~bupo.run_files.result_cache.ResultCache`]): of the answers.
    """

    label: str
    problems: Dataset
    k: int
    prompts: list[tuple[int, ...]]
    prompt: str
    store: ResultCache[SampleKey, SampledCompletion]


def _load_benchmark_problems(
    options: EvalOptions, given: Mapping[str, Dataset] | None
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Problems by label, and the harness' benchmarks by label. What cannot be loaded or graded is refused here."""
    if given is not None:
        if not given:
            raise UserError("benchmarks is empty: give problems by label, or leave it out")
        for label, problems in given.items():
            check_problems(problems, label, ("prompt", "answer"))
            check_gold_answers(problems["answer"], label)
        return dict(given), {}
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
        named = ",".join(options.benchmark_names)
        raise UserError(f"benchmarks {named!r} names none, or two of one label: write LABEL=FILE for one")
    for label in (*problems, *tasks):
        get_label_folder(options.output, label)
    return problems, tasks


def _prepare_benchmark(
    label: str, problems: Dataset, k: int, source: EvaluatedModel | None, options: EvalOptions
) -> _BenchmarkRun:
    """A benchmark and its store, which refuses answers of other settings."""
    here = get_label_folder(options.output, label)
    if source is None:
        settings = read_cached_settings(here)
        known = min(len(problems), len(settings["problems"]))  # of those beyond it there is no answer
        store = open_sample_cache(here, settings, problems.select(range(known)), remedy=CACHED_REMEDY)
        work = _BenchmarkRun(label, problems, k, [], settings["prompt"], store)
        work.store.begin()
        _get_cached_completions(work)
        return work
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
    store = open_sample_cache(here, settings, problems, prompts, metadata=source.metadata, overwrite=options.overwrite)
    return _BenchmarkRun(label, problems, k, prompts, prompt, store)


def _prepare_harness(name: str, source: EvaluatedModel | None, options: EvalOptions) -> HarnessRun:
    """A benchmark of the harness and its store, once its data is there."""
    assert source is not None  # the options refuse other engines
    chat = source.tokenizer.chat_template is not None
    check_task(name, chat, options.run_code)
    return prepare_harness_run(name, Path(options.output), source.cache_settings, options, chat, source.metadata)


def _evaluate_benchmark(
    work: _BenchmarkRun,
    found: Evaluation,
    source: EvaluatedModel | None,
    theirs: dict[str, dict],
    options: EvalOptions,
    bar: Progress | None,
) -> None:
    """One benchmark, into what was found and into the folder."""
    table = _sample_and_grade(work, source, options, bar)
    numbers = summarize(table)
    if work.label in theirs:
        numbers |= _compare(work.label, table, theirs, options)
    found.tables[work.label], found.prompts[work.label], found.benchmarks[work.label] = table, work.prompt, numbers
    found.write()


def _run_harness(
    runs: dict[str, HarnessRun], found: Evaluation, source: EvaluatedModel | None, options: EvalOptions
) -> None:
    """The harness' benchmarks, into what was found and into the folder."""
    for label, run in runs.items():
        assert source is not None and isinstance(source.engine, TransformersEngine)  # the options refuse others
        found.harness[label] = run_task(run, source.engine, options, source.template_kwargs)
        found.write()


def _sample_and_grade(
    work: _BenchmarkRun, source: EvaluatedModel | None, options: EvalOptions, bar: Progress | None
) -> pd.DataFrame:
    """The benchmark's graded table, written into its folder."""
    total = len(work.problems) * work.k
    if source is None:
        answers = _get_cached_completions(work)
    else:
        work.store.begin()
        done = add_progress_task(bar, f"{work.label}: answers", total)
        answers = sample_completions(source.engine, work.prompts, work.k, options.seed, work.store, done)
    table = grade_completions(
        work.problems, answers, options.deadline, add_progress_task(bar, f"{work.label}: grades", total)
    )
    with atomic_write(work.store.folder / GRADED_FILE) as part:
        table.to_parquet(part)
    return table


def _get_cached_completions(work: _BenchmarkRun) -> list[list[SampledCompletion]]:
    """The answers that a folder holds."""
    rows, problems, k = work.store.rows, range(len(work.problems)), work.k
    for problem in problems:
        held = sum((problem, n) in rows for n in range(k))
        if held < k:
            raise UserError(
                f"{work.store.folder} holds {held} answers to problem {problem}, and k is {k}: lower k or size, or sample "
                "the rest with another engine"
            )
    return [[rows[p, n] for n in range(k)] for p in problems]


def read_summary(folder: str) -> dict[str, Any]:
    """What a finished evaluation's `summary.json` holds.

    Raises:
        UserError: if there is none, it cannot be read, or an earlier version graded it.
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
    """Look at the numbers of some benchmarks of an evaluation.

    Raises:
        Damaged: if one is missing or of another type.
    """
    for label in labels:
        numbers = summary["benchmarks"][label]
        try:
            check_keys(numbers, {"problems": int, "k": int, "avg@k": float, "pass@k": dict})
            check_keys(numbers["pass@k"], dict.fromkeys(numbers["pass@k"], float))
        except ValueError as error:
            path = Path(folder) / SUMMARY_FILE
            raise DamagedFileError(path, f"{label}: {error}", f"delete it and evaluate {folder} again") from error


def _read_compared_summary(folder: str | None, benchmarks: Mapping[str, Dataset]) -> dict[str, dict]:
    """The numbers of the run that is compared with, by label.

    Raises:
        UserError: if there is none, or it has no benchmark in common with this one.
    """
    if folder is None:
        return {}
    summary = read_summary(folder)
    theirs = summary["benchmarks"]
    if not theirs.keys() & benchmarks.keys():
        raise UserError(f"{folder} holds none of {', '.join(benchmarks)}: its benchmarks are {', '.join(theirs)}")
    check_scores(folder, summary, theirs.keys() & benchmarks.keys())
    for label in theirs.keys() & benchmarks.keys():  # a damaged table is refused before anything is sampled
        read_graded_table(Path(folder) / label, Path(folder))
    return theirs


def _compare(label: str, table: pd.DataFrame, theirs: dict[str, dict], options: EvalOptions) -> dict[str, Any]:
    """The paired difference to another run, of a benchmark that both hold."""
    other = Path(options.compare or "") / label
    before = read_graded_table(other, Path(options.compare or ""))
    if _get_questions(before) != _get_questions(table):
        raise UserError(f"{other} holds other problems than {label}: a paired difference needs the same ones")
    difference, interval = paired_difference(get_correct(before), get_correct(table))
    return {
        "compared_pass@k": theirs[label]["pass@k"],
        "difference": difference,
        "difference_interval": interval,
    }


def _get_questions(table: pd.DataFrame) -> list[str]:
    return table.groupby("problem", sort=True)["question"].first().tolist()
