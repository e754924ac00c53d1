"""`bupo.analyze`: what every layer and module of a model decides, as tables, figures and a page."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.progress import Progress
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bupo.analysis.checkpoint_series import CheckpointSeries, find_checkpoint_series, write_checkpoint_series
from bupo.analysis.measured_answers import ANSWERS_FILE, TOKENS_FILE, MeasuredRollouts, measure_with_cache
from bupo.analysis.measures import MEASURES
from bupo.analysis.options import FALLBACK_OPTIONS, PAPER_OPTIONS, AnalyzeOptions
from bupo.analysis.results import AnalysisReport, ModelReport, build_model_report, write_report
from bupo.analysis.rollouts import (
    Rollout,
    hash_rollout,
    read_rollouts,
    rollout_from_json,
    rollout_to_json,
    sample_rollouts,
)
from bupo.analysis.tables import CompletionSums
from bupo.analysis.token_view import build_token_views
from bupo.data.chat_templates import check_chat_template, check_prompt_characters, check_prompt_tokens, tokenize_prompt
from bupo.data.problems import ARITHMETIC, check_problems, compute_prompt_digests, load_problems
from bupo.data.prompt_settings import PromptSettings, read_training_prompt_settings
from bupo.evaluation.benchmarks import is_benchmark, load_benchmark, split_k
from bupo.evaluation.paper_preset import resolve_preset
from bupo.generation.seeded_sampling import TransformersEngine
from bupo.models.internal_policy import InternalPolicies
from bupo.models.loading import (
    compute_weight_fingerprint,
    get_context_length,
    get_model_limits,
    load_config,
    load_on_device,
    load_tokenizer,
)
from bupo.models.metadata import get_model_metadata, get_model_name
from bupo.models.residual_stream import eval_mode
from bupo.options.groups import get_changed_options
from bupo.options.ranges import abbreviate
from bupo.run_files.provenance import record_run
from bupo.run_files.result_cache import ResultCache, get_label_folder
from bupo.utils.errors import UserError
from bupo.utils.files import check_output_folder, refuse_links
from bupo.utils.lock import folder_lock
from bupo.utils.progress import add_progress_task
from bupo.utils.sanitize import escape_text

ROLLOUTS_FILE = "rollouts.jsonl"

PromptIds = list[tuple[int, ...]]


def analyze(
    model: str | Sequence[str] | nn.Module,
    options: AnalyzeOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    problems: Dataset | None = None,
    rollouts: Sequence[Rollout] | None = None,
    noted: dict[str, Any] | None = None,
    bar: Progress | None = None,
) -> AnalysisReport:
    """Sample a model's answers, measure every internal policy on them, and write the run's folder.

    Args:
        model (`str`, `list[str]` or `PreTrainedModel`): names as of [`load_model`], or a loaded model with its tokenizer.
        options ([`AnalyzeOptions`], *optional*): everything else. Its `model` gives way to the argument.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a loaded model.
        problems (`Dataset`, *optional*): with `prompt` (messages), instead of the options' dataset.
        rollouts (`list[Rollout]`, *optional*): finished answers, instead of sampled ones.
        noted (`dict`, *optional*): what `config.yaml` holds; by default the options that differ from the defaults.
        bar (`rich.progress.Progress`, *optional*): shows how far it is.

    Raises:
        UserError: for bad options, a model or problems that cannot be read, or a folder with work of other settings.
    """
    names = (
        [model] if isinstance(model, str) else [get_model_name(model)] if isinstance(model, nn.Module) else list(model)
    )
    options = replace(options or AnalyzeOptions(), model=names)
    options.check()
    check_output_folder("output", options.output)
    check_chat_template(options.chat_template)
    labels = _build_labels(names, options.output)
    noted, loaded = (
        get_changed_options(options) if noted is None else noted,
        model if isinstance(model, nn.Module) else None,
    )
    options, asking = _resolve_options(options, loaded, tokenizer)
    given = _collect_inputs(loaded, tokenizer, problems, rollouts, options, asking, noted)
    if bar and asking.summary_line:
        bar.console.print(escape_text(asking.summary_line), highlight=False, markup=False)
    _check_inputs(names, given, options)
    return _analyze_models(names, labels, given, *_find_series(names, given, options), bar)


def _analyze_models(
    names: list[str],
    labels: list[str],
    given: "_AnalysisInputs",
    options: AnalyzeOptions,
    course: CheckpointSeries | None,
    bar,
) -> AnalysisReport:
    """As of `analyze`, in a folder of its own."""
    reports: list[ModelReport] = []
    with folder_lock(options.output):
        for name, label in zip(names, labels, strict=True):
            reports.append(_analyze_model(name, label, given, options, bar, first=not reports))
        report = AnalysisReport(tuple(reports), Path(options.output))
        write_report(report)
        write_checkpoint_series(report, course)
    return report


def _resolve_options(options: AnalyzeOptions, model: Any, tokenizer) -> tuple[AnalyzeOptions, PromptSettings]:
    """Options with all that is not given, and how the models are asked: all in the same way.

    Raises:
        UserError: if they were trained in different ways and it is not given in which of them they are asked.
    """
    owns = [read_training_prompt_settings(name, options.adapter) for name in options.model] if model is None else []
    trained = [own for own in owns if own is not None]
    for own in trained[1:]:
        for name in ("system_prompt", "max_new_tokens", "temperature", "top_p", "chat_template_kwargs"):
            option = "chat_template" if name == "chat_template_kwargs" else name
            values = getattr(trained[0], name), getattr(own, name)
            if getattr(options, option) is None and values[0] != values[1]:
                raise UserError(
                    f"{trained[0].folder} was trained with {name} {abbreviate(values[0])}, {own.folder} with "
                    f"{abbreviate(values[1])}: give {option}, or analyse them one by one"
                )
    first = {name: value for name, value in PAPER_OPTIONS.items() if name != "dataset" or not options.rollouts}
    models = options.model if model is None else [model]
    return resolve_preset(options, trained[0] if trained else None, models, tokenizer, FALLBACK_OPTIONS, first)


def _check_inputs(names: list[str], given: "_AnalysisInputs", options: AnalyzeOptions) -> None:
    """What is missing or refused is found before the first model is loaded and measured."""
    for name in names if given.model is None else ():
        tokenizer = load_tokenizer(name, **options.get_loading_kwargs())
        given.prompt_settings.set_template(tokenizer)
        config = load_config(name, **options.get_loading_kwargs())
        if options.rollouts and name == names[0]:
            _read_rollouts(options, tokenizer, config, given.prompt_settings)


def _find_series(
    names: list[str], given: "_AnalysisInputs", options: AnalyzeOptions
) -> tuple[AnalyzeOptions, CheckpointSeries | None]:
    """The run whose checkpoints are analysed on the same answers, if they are of one; then with the KL of all pairs."""
    if given.model is None and given.problems is None:
        course = find_checkpoint_series(names, options.layer, options.output, **options.get_loading_kwargs())
        return replace(options, kl_pairs=options.kl_pairs or course is not None), course
    if options.layer:
        raise UserError(
            f"layer {options.layer} is for checkpoints of one run, measured on the same rollouts: give --rollouts"
        )
    return options, None


@dataclass(frozen=True)
class _AnalysisInputs:
    """What is analysed besides names: as of `analyze`, with the problems loaded where they are answered.

    Attributes:
        source (`str`): where problems or rollouts are from.
        asking ([`~bupo.data.prompt_settings.PromptSettings`]): how the models are asked.
        objects (`list[str]`): names of what came from Python.
        noted (`dict`): what `config.yaml` holds.
    """

    model: nn.Module | None
    tokenizer: PreTrainedTokenizerBase | None
    problems: Dataset | None
    rollouts: Sequence[Rollout] | None
    source: str
    prompt_settings: PromptSettings
    python_arguments: list[str]
    recorded_options: dict[str, Any]


def _collect_inputs(
    model, tokenizer, problems, rollouts, options: AnalyzeOptions, asking: PromptSettings, noted: dict[str, Any]
) -> _AnalysisInputs:
    """Refuses what contradicts itself, and bad problems, before a model is loaded."""
    values = {"model": model, "problems": problems, "rollouts": rollouts}
    objects = [name for name, value in values.items() if value is not None]
    if sum(value is not None for value in (problems, rollouts, options.rollouts)) > 1:
        raise UserError("problems and rollouts are both given: give prompts to answer, or finished answers")
    if model is not None and tokenizer is None:
        raise UserError("tokenizer is not set: a loaded model needs its tokenizer beside it")
    if model is not None and options.adapter:
        raise UserError("adapter is for a model that is given by its name: put it on the loaded model yourself")
    source = "problems" if problems is not None else "rollouts" if rollouts is not None else options.rollouts
    if source is None:
        problems, source = _load_problems(options), options.dataset or ARITHMETIC
    if rollouts is not None and not len(rollouts):
        raise UserError("rollouts is empty: give some, or leave it out")
    if problems is not None:
        check_problems(problems, "problems", ("prompt",))
    return _AnalysisInputs(model, tokenizer, problems, rollouts, source, asking, objects, noted)


@dataclass(frozen=True)
class _LoadedModel:
    """A model that is analysed, opened up, and its folder."""

    label: str
    policies: InternalPolicies
    tokenizer: PreTrainedTokenizerBase
    meta: dict[str, Any]
    folder: Path


def _load_model(name: str, label: str, given: _AnalysisInputs, options: AnalyzeOptions) -> _LoadedModel:
    if given.tokenizer is not None:
        tokenizer = copy.deepcopy(given.tokenizer)  # it is given a template
    else:
        tokenizer = load_tokenizer(name, **options.get_loading_kwargs())
    model = given.model
    if model is None:
        model = load_on_device(name, options.dtype, options.device_map, options.adapter, **options.get_loading_kwargs())
    template, temperature = given.prompt_settings.set_template(tokenizer), options.sampling_settings[1]
    policies = InternalPolicies(model, lens=options.lens, temperature=temperature)
    meta = get_model_metadata(name, policies.stream, options.lens, temperature, options.revision) | {
        "adapter": options.adapter,
        "seed": options.seed,
        "template": template,
        "weights": compute_weight_fingerprint(policies.stream.model),
        "kl_pairs": options.kl_pairs,
        **given.prompt_settings.metadata,
    }
    meta |= {"preset": options.preset} if options.preset else {}
    return _LoadedModel(label, policies, tokenizer, meta, get_label_folder(options.output, label))


def _analyze_model(
    name: str, label: str, given: _AnalysisInputs, options: AnalyzeOptions, bar: Progress | None, first: bool
) -> ModelReport:
    """One model: rollouts, measures, and what the tables and the page need. Other work in the folder is refused first."""
    subject = _load_model(name, label, given, options)
    answers, prompts, rollouts = None, PromptIds(), []
    if given.problems is None:
        rollouts = (
            list(given.rollouts)
            if given.rollouts is not None
            else _read_rollouts(options, subject.tokenizer, subject.policies.stream.config, given.prompt_settings)
        )
    else:
        asked, limits = given.prompt_settings.template_kwargs, get_model_limits(subject.policies.stream.config)
        check_prompt_characters(given.problems["prompt"], limits, given.source)
        prompts = [tuple(tokenize_prompt(subject.tokenizer, problem["prompt"], **asked)) for problem in given.problems]
        check_prompt_tokens(prompts, limits, given.source)
        answers = _open_rollout_cache(subject, options, given.problems, prompts)
    _open_measure_cache(subject, options, rollouts, sampled=answers is not None)
    if first:
        record_run(options.output, "analyze", given.recorded_options, given.python_arguments)
    with eval_mode(subject.policies.stream.model):
        if answers is not None:
            rollouts = _sample_rollouts(subject, options, answers, prompts, bar)
        found = _measure_rollouts(subject, options, rollouts, answers is not None, bar)
        views = build_token_views(subject.policies, subject.tokenizer, rollouts[: len(found.completions)])
    return build_model_report(label, subject.meta | {"dataset": given.source}, found, views, subject.folder)


def _measure_rollouts(
    subject: _LoadedModel, options: AnalyzeOptions, rollouts: list[Rollout], sampled: bool, bar: Progress | None
) -> MeasuredRollouts:
    store = _open_measure_cache(subject, options, rollouts, sampled)
    store.begin()
    total = sum(len(r.completion_ids) for r in rollouts)
    return measure_with_cache(
        subject.policies,
        rollouts,
        store,
        until_settled=options.until == "settled",
        max_tokens=options.max_tokens,
        per_token=options.per_token,
        pairs=options.kl_pairs,
        on_tokens=add_progress_task(bar, f"{subject.label}: tokens", min(options.max_tokens or total, total)),
    )


def _read_rollouts(
    options: AnalyzeOptions, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, asking: PromptSettings
) -> list[Rollout]:
    config = config.get_text_config()
    most = get_context_length(config), getattr(config, "vocab_size", None)
    return read_rollouts(str(options.rollouts), tokenizer, *most, **asking.template_kwargs)


def _open_rollout_cache(
    subject: _LoadedModel, options: AnalyzeOptions, problems: Dataset, prompts: PromptIds
) -> ResultCache[int, Rollout]:
    """Where the sampled answers are kept. They do not depend on the lens, nor on what is measured."""
    sampling = ("system_prompt", "temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: subject.meta[name] for name in ("dtype", "weights", "template")}
    settings |= {name: getattr(options, name) for name in sampling}
    settings |= {"engine": "transformers", "prompt": subject.tokenizer.decode(prompts[0])}
    return ResultCache(
        subject.folder,
        ROLLOUTS_FILE,
        "answers",
        rollout_from_json,
        rollout_to_json,
        settings,
        compute_prompt_digests(problems),
        metadata={name: subject.meta[name] for name in ("model", "revision", "adapter")},
        extra_patterns=[ANSWERS_FILE, TOKENS_FILE],  # measures of an earlier version
        overwrite=options.overwrite,
    )


def _sample_rollouts(
    subject: _LoadedModel, options: AnalyzeOptions, store: ResultCache, prompts: PromptIds, bar
) -> list[Rollout]:
    store.begin()
    engine = TransformersEngine(
        subject.policies.stream.model,
        subject.tokenizer,
        *options.sampling_settings,
        batch_size=options.batch_size,
    )
    done = add_progress_task(bar, f"{subject.label}: answers", len(prompts))
    return sample_rollouts(engine, prompts, store, options.seed, done)


def _open_measure_cache(
    subject: _LoadedModel, options: AnalyzeOptions, rollouts: Sequence[Rollout], sampled: bool
) -> ResultCache[int, CompletionSums]:
    """Where the measures are kept: a folder for each lens, with or without the KL of all pairs, of sampled or given answers."""
    names = ("dtype", "weights", "lens", "temperature", "kl_pairs")
    folder = subject.folder / (options.lens + "-kl_pairs" * options.kl_pairs + "-rollouts" * (not sampled))
    refuse_links(folder, Path(options.output))
    return ResultCache(
        folder,
        ANSWERS_FILE,
        "measures",
        _parse_sums,
        lambda index, sums: sums.to_json(),
        {name: subject.meta[name] for name in names} | {"measures": list(MEASURES)},
        [hash_rollout(rollout) for rollout in rollouts],
        "answers",
        metadata={name: subject.meta[name] for name in ("model", "revision", "adapter")},
        extra_patterns=[TOKENS_FILE],
        overwrite=options.overwrite,
    )


def _parse_sums(line: str) -> tuple[int, CompletionSums]:
    sums = CompletionSums.from_json(line)
    return sums.index, sums


def _load_problems(options: AnalyzeOptions) -> Dataset:
    name = options.dataset or ARITHMETIC
    if is_benchmark(name):
        if split_k(name)[1]:
            raise UserError(
                f"dataset {name}: an analysis takes one answer a problem, so leave out the number behind it"
            )
        for option in ("split", "dataset_config"):
            if getattr(options, option) not in (None, "test"):
                raise UserError(
                    f"{option} {getattr(options, option)!r:.80} is for a dataset, and {name} is a benchmark"
                )
        return load_benchmark(
            name,
            size=options.size,
            system_prompt=options.system_prompt,
            seed=options.seed,
            prompt_column=options.prompt_column,
            answer_column=options.answer_column,
        )[1]
    return load_problems(
        name,
        options.split,
        config=options.dataset_config,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        system_prompt=options.system_prompt,
        size=options.size,
        seed=options.seed,
        shuffle_seed=options.shuffle_seed,
    )


def _build_labels(names: list[str], output: str) -> list[str]:
    """Short names of the models, each its own."""
    if not names:
        raise UserError("model is empty: give the folder of a model, a hub id or 'embedded'")
    labels = [Path(name).stem if name.endswith(".gguf") else Path(name).name for name in names]
    for label in labels:
        get_label_folder(output, label)
    return [label if labels.count(label) == 1 else f"{i + 1}-{label}" for i, label in enumerate(labels)]
