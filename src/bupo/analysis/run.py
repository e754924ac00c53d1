"""`bupo.analyze`: internal policies of every layer and module of a model, as tables, figures and a page."""

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
    recorded_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Sample a model's answers, measure every internal policy on them, and write the run's folder.

    Args:
        model (`str`, `list[str]` or `PreTrainedModel`): names as for [`load_model`], or a loaded model with its tokenizer.
        options ([`AnalyzeOptions`], *optional*): all other options; the argument `model` replaces theirs.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of a loaded model.
        problems (`Dataset`, *optional*): problems with `prompt` (messages), instead of the options' dataset.
        rollouts (`list[Rollout]`, *optional*): finished answers, instead of sampled ones.
        recorded_options (`dict`, *optional*): content of `config.yaml`; by default the options that differ from the defaults.
        progress (`rich.progress.Progress`, *optional*): progress bars.

    Raises:
        UserError: for invalid options, a model or problems that cannot be read, or a folder with results of other settings.
    """
    names = (
        [model] if isinstance(model, str) else [get_model_name(model)] if isinstance(model, nn.Module) else list(model)
    )
    options = replace(options or AnalyzeOptions(), model=names)
    options.check()
    check_output_folder("output", options.output)
    check_chat_template(options.chat_template)
    labels = _build_labels(names, options.output)
    if recorded_options is None:
        recorded_options = get_changed_options(options)
    loaded = model if isinstance(model, nn.Module) else None
    options, prompt_settings = _resolve_options(options, loaded, tokenizer)
    inputs = _collect_inputs(loaded, tokenizer, problems, rollouts, options, prompt_settings, recorded_options)
    if progress and prompt_settings.summary_line:
        progress.console.print(escape_text(prompt_settings.summary_line), highlight=False, markup=False)
    _check_inputs(names, inputs, options)
    options, series = _find_series(names, inputs, options)
    reports: list[ModelReport] = []
    with folder_lock(options.output):
        for name, label in zip(names, labels, strict=True):
            reports.append(_analyze_model(name, label, inputs, options, progress, first=not reports))
        report = AnalysisReport(tuple(reports), Path(options.output))
        write_report(report)
        write_checkpoint_series(report, series)
    return report


def _resolve_options(options: AnalyzeOptions, model: Any, tokenizer) -> tuple[AnalyzeOptions, PromptSettings]:
    """Fill in the options that are not set, and return the prompt settings that all models share.

    Raises:
        UserError: if the models were trained with different prompt settings and the options do not choose one.
    """
    by_model = [read_training_prompt_settings(name, options.adapter) for name in options.model] if model is None else []
    trained = [settings for settings in by_model if settings is not None]
    for other in trained[1:]:
        for name in ("system_prompt", "max_new_tokens", "temperature", "top_p", "chat_template_kwargs"):
            option = "chat_template" if name == "chat_template_kwargs" else name
            values = getattr(trained[0], name), getattr(other, name)
            if getattr(options, option) is None and values[0] != values[1]:
                raise UserError(
                    f"{trained[0].folder} was trained with {name} {abbreviate(values[0])}, {other.folder} with "
                    f"{abbreviate(values[1])}: give {option}, or analyse them one by one"
                )
    paper_options = {name: value for name, value in PAPER_OPTIONS.items() if name != "dataset" or not options.rollouts}
    models = options.model if model is None else [model]
    return resolve_preset(options, trained[0] if trained else None, models, tokenizer, FALLBACK_OPTIONS, paper_options)


def _check_inputs(names: list[str], inputs: "_AnalysisInputs", options: AnalyzeOptions) -> None:
    """Check tokenizers, configs and rollouts of all models before the first one is loaded."""
    for name in names if inputs.model is None else ():
        tokenizer = load_tokenizer(name, **options.get_loading_kwargs())
        inputs.prompt_settings.set_template(tokenizer)
        config = load_config(name, **options.get_loading_kwargs())
        if options.rollouts and name == names[0]:
            _read_rollouts(options, tokenizer, config, inputs.prompt_settings)


def _find_series(
    names: list[str], inputs: "_AnalysisInputs", options: AnalyzeOptions
) -> tuple[AnalyzeOptions, CheckpointSeries | None]:
    """Return the series if the models are checkpoints of one run, and options that then measure the KL of all pairs."""
    if inputs.model is None and inputs.problems is None:
        series = find_checkpoint_series(names, options.layer, options.output, **options.get_loading_kwargs())
        return replace(options, kl_pairs=options.kl_pairs or series is not None), series
    if options.layer:
        raise UserError(
            f"layer {options.layer} is for checkpoints of one run, measured on the same rollouts: give --rollouts"
        )
    return options, None


@dataclass(frozen=True)
class _AnalysisInputs:
    """Arguments of `analyze`, with the problems loaded.

    Attributes:
        source (`str`): source of the problems or rollouts.
        prompt_settings ([`~bupo.data.prompt_settings.PromptSettings`]): system message and chat template of all models.
        python_arguments (`list[str]`): names of the arguments that are Python objects.
        recorded_options (`dict`): content of `config.yaml`.
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
    model,
    tokenizer,
    problems,
    rollouts,
    options: AnalyzeOptions,
    prompt_settings: PromptSettings,
    recorded_options: dict[str, Any],
) -> _AnalysisInputs:
    """Check the arguments and load the problems before a model is loaded."""
    values = {"model": model, "problems": problems, "rollouts": rollouts}
    python_arguments = [name for name, value in values.items() if value is not None]
    if sum(value is not None for value in (problems, rollouts, options.rollouts)) > 1:
        raise UserError("problems and rollouts are both given: give prompts to answer, or finished answers")
    if model is not None and tokenizer is None:
        raise UserError("tokenizer is not set: a loaded model needs its tokenizer")
    if model is not None and options.adapter:
        raise UserError("adapter is for a model that is given by its name: put it on the loaded model yourself")
    source = "problems" if problems is not None else "rollouts" if rollouts is not None else options.rollouts
    if source is None:
        problems, source = _load_problems(options), options.dataset or ARITHMETIC
    if rollouts is not None and not len(rollouts):
        raise UserError("rollouts is empty: give some, or leave it out")
    if problems is not None:
        check_problems(problems, "problems", ("prompt",))
    return _AnalysisInputs(
        model, tokenizer, problems, rollouts, source, prompt_settings, python_arguments, recorded_options
    )


@dataclass(frozen=True)
class _LoadedModel:
    """A loaded model with its internal policies, metadata and folder."""

    label: str
    policies: InternalPolicies
    tokenizer: PreTrainedTokenizerBase
    meta: dict[str, Any]
    folder: Path


def _load_model(name: str, label: str, inputs: _AnalysisInputs, options: AnalyzeOptions) -> _LoadedModel:
    if inputs.tokenizer is not None:
        tokenizer = copy.deepcopy(inputs.tokenizer)  # its template is set below
    else:
        tokenizer = load_tokenizer(name, **options.get_loading_kwargs())
    model = inputs.model
    if model is None:
        model = load_on_device(name, options.dtype, options.device_map, options.adapter, **options.get_loading_kwargs())
    template, temperature = inputs.prompt_settings.set_template(tokenizer), options.sampling_settings[1]
    policies = InternalPolicies(model, lens=options.lens, temperature=temperature)
    meta = get_model_metadata(name, policies.stream, options.lens, temperature, options.revision) | {
        "adapter": options.adapter,
        "seed": options.seed,
        "template": template,
        "weights": compute_weight_fingerprint(policies.stream.model),
        "kl_pairs": options.kl_pairs,
        **inputs.prompt_settings.metadata,
    }
    meta |= {"preset": options.preset} if options.preset else {}
    return _LoadedModel(label, policies, tokenizer, meta, get_label_folder(options.output, label))


def _analyze_model(
    name: str, label: str, inputs: _AnalysisInputs, options: AnalyzeOptions, progress: Progress | None, first: bool
) -> ModelReport:
    """Sample and measure the rollouts of one model. Caches of other settings are refused before any sampling."""
    subject = _load_model(name, label, inputs, options)
    rollout_cache, prompts, rollouts = None, PromptIds(), []
    if inputs.problems is None:
        rollouts = (
            list(inputs.rollouts)
            if inputs.rollouts is not None
            else _read_rollouts(options, subject.tokenizer, subject.policies.stream.config, inputs.prompt_settings)
        )
    else:
        template_kwargs, limits = (
            inputs.prompt_settings.template_kwargs,
            get_model_limits(subject.policies.stream.config),
        )
        check_prompt_characters(inputs.problems["prompt"], limits, inputs.source)
        prompts = [
            tuple(tokenize_prompt(subject.tokenizer, problem["prompt"], **template_kwargs))
            for problem in inputs.problems
        ]
        check_prompt_tokens(prompts, limits, inputs.source)
        rollout_cache = _open_rollout_cache(subject, options, inputs.problems, prompts)
    _open_measure_cache(subject, options, rollouts, sampled=rollout_cache is not None)
    if first:
        record_run(options.output, "analyze", inputs.recorded_options, inputs.python_arguments)
    with eval_mode(subject.policies.stream.model):
        if rollout_cache is not None:
            rollouts = _sample_rollouts(subject, options, rollout_cache, prompts, progress)
        measured = _measure_rollouts(subject, options, rollouts, rollout_cache is not None, progress)
        token_views = build_token_views(subject.policies, subject.tokenizer, rollouts[: len(measured.completions)])
    return build_model_report(label, subject.meta | {"dataset": inputs.source}, measured, token_views, subject.folder)


def _measure_rollouts(
    subject: _LoadedModel, options: AnalyzeOptions, rollouts: list[Rollout], sampled: bool, progress: Progress | None
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
        on_tokens=add_progress_task(progress, f"{subject.label}: tokens", min(options.max_tokens or total, total)),
    )


def _read_rollouts(
    options: AnalyzeOptions, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, settings: PromptSettings
) -> list[Rollout]:
    config = config.get_text_config()
    context, vocabulary = get_context_length(config), getattr(config, "vocab_size", None)
    return read_rollouts(str(options.rollouts), tokenizer, context, vocabulary, **settings.template_kwargs)


def _open_rollout_cache(
    subject: _LoadedModel, options: AnalyzeOptions, problems: Dataset, prompts: PromptIds
) -> ResultCache[int, Rollout]:
    """Open the cache of sampled answers, which depend neither on the lens nor on the measures."""
    sampling_options = ("system_prompt", "temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: subject.meta[name] for name in ("dtype", "weights", "template")}
    settings |= {name: getattr(options, name) for name in sampling_options}
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
        extra_patterns=[ANSWERS_FILE, TOKENS_FILE],
        overwrite=options.overwrite,
    )


def _sample_rollouts(
    subject: _LoadedModel, options: AnalyzeOptions, store: ResultCache, prompts: PromptIds, progress
) -> list[Rollout]:
    store.begin()
    engine = TransformersEngine(
        subject.policies.stream.model,
        subject.tokenizer,
        *options.sampling_settings,
        batch_size=options.batch_size,
    )
    on_done = add_progress_task(progress, f"{subject.label}: answers", len(prompts))
    return sample_rollouts(engine, prompts, store, options.seed, on_done)


def _open_measure_cache(
    subject: _LoadedModel, options: AnalyzeOptions, rollouts: Sequence[Rollout], sampled: bool
) -> ResultCache[int, CompletionSums]:
    """Open the cache of measures, one folder per lens, with or without KL of all pairs, for sampled or given answers."""
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
            raise UserError(f"dataset {name}: an analysis takes one answer a problem: leave out the number after it")
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
    """Return a unique short name for each model."""
    if not names:
        raise UserError("model is empty: give the folder of a model, a hub id or 'embedded'")
    labels = [Path(name).stem if name.endswith(".gguf") else Path(name).name for name in names]
    for label in labels:
        get_label_folder(output, label)
    return [label if labels.count(label) == 1 else f"{i + 1}-{label}" for i, label in enumerate(labels)]
