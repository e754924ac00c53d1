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

from bupo.analysis.checkpoint_series import Course, course_of, write_course
from bupo.analysis.measured_answers import ANSWERS_FILE, TOKENS_FILE, Measured, measured
from bupo.analysis.measures import MEASURES
from bupo.analysis.options import OTHERWISE, PAPER, AnalyzeOptions
from bupo.analysis.results import AnalysisReport, ModelReport, model_report, write_report
from bupo.analysis.rollouts import Rollout, digest, read_rollout, read_rollouts, rollout_line, sampled_rollouts
from bupo.analysis.tables import AnswerSums
from bupo.analysis.token_view import token_views
from bupo.data.chat_templates import check_context, check_size, check_template, prompt_ids
from bupo.data.problems import ARITHMETIC, check_columns, load_problems, prompt_digests
from bupo.data.prompt_settings import Asking, as_trained
from bupo.evaluation.benchmarks import is_benchmark, load_benchmark, without_k
from bupo.evaluation.paper_preset import asked_as
from bupo.generation.seeded_sampling import TransformersEngine
from bupo.models.internal_policy import InternalPolicies
from bupo.models.loading import context_of, fingerprint, limits_of, load_config, load_on_device, load_tokenizer
from bupo.models.metadata import model_meta, name_of
from bupo.models.residual_stream import evaluating
from bupo.options.groups import changed
from bupo.options.ranges import abridged
from bupo.run_files.provenance import note_run
from bupo.run_files.result_cache import Store, inside
from bupo.utils.errors import UserError
from bupo.utils.files import check_output, refuse_links
from bupo.utils.lock import sole_writer
from bupo.utils.progress import task
from bupo.utils.sanitize import printable

ROLLOUTS_FILE = "rollouts.jsonl"

Prompts = list[tuple[int, ...]]


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
    names = [model] if isinstance(model, str) else [name_of(model)] if isinstance(model, nn.Module) else list(model)
    options = replace(options or AnalyzeOptions(), model=names)
    options.check()
    check_output("output", options.output)
    check_template(options.chat_template)
    labels = _labels(names, options.output)
    noted, loaded = changed(options) if noted is None else noted, model if isinstance(model, nn.Module) else None
    options, asking = _settled(options, loaded, tokenizer)
    given = _given(loaded, tokenizer, problems, rollouts, options, asking, noted)
    if bar and asking.line:
        bar.console.print(printable(asking.line), highlight=False, markup=False)
    _look_ahead(names, given, options)
    return _analysis(names, labels, given, *_over_training(names, given, options), bar)


def _analysis(
    names: list[str], labels: list[str], given: "_Given", options: AnalyzeOptions, course: Course | None, bar
) -> AnalysisReport:
    """As of `analyze`, in a folder of its own."""
    reports: list[ModelReport] = []
    with sole_writer(options.output):
        for name, label in zip(names, labels, strict=True):
            reports.append(_reported(name, label, given, options, bar, first=not reports))
        report = AnalysisReport(tuple(reports), Path(options.output))
        write_report(report)
        write_course(report, course)
    return report


def _settled(options: AnalyzeOptions, model: Any, tokenizer) -> tuple[AnalyzeOptions, Asking]:
    """Options with all that is not given, and how the models are asked: all in the same way.

    Raises:
        UserError: if they were trained in different ways and it is not given in which of them they are asked.
    """
    owns = [as_trained(name, options.adapter) for name in options.model] if model is None else []
    trained = [own for own in owns if own is not None]
    for own in trained[1:]:
        for name in ("system_prompt", "max_new_tokens", "temperature", "top_p", "chat_template_kwargs"):
            option = "chat_template" if name == "chat_template_kwargs" else name
            values = getattr(trained[0], name), getattr(own, name)
            if getattr(options, option) is None and values[0] != values[1]:
                raise UserError(
                    f"{trained[0].folder} was trained with {name} {abridged(values[0])}, {own.folder} with "
                    f"{abridged(values[1])}: give {option}, or analyse them one by one"
                )
    first = {name: value for name, value in PAPER.items() if name != "dataset" or not options.rollouts}
    models = options.model if model is None else [model]
    return asked_as(options, trained[0] if trained else None, models, tokenizer, OTHERWISE, first)


def _look_ahead(names: list[str], given: "_Given", options: AnalyzeOptions) -> None:
    """What is missing or refused is found before the first model is loaded and measured."""
    for name in names if given.model is None else ():
        tokenizer = load_tokenizer(name, **options.loading())
        given.asking.give_template(tokenizer)
        config = load_config(name, **options.loading())
        if options.rollouts and name == names[0]:
            _read(options, tokenizer, config, given.asking)


def _over_training(names: list[str], given: "_Given", options: AnalyzeOptions) -> tuple[AnalyzeOptions, Course | None]:
    """The run whose checkpoints are analysed on the same answers, if they are of one; then with the KL of all pairs."""
    if given.model is None and given.problems is None:
        course = course_of(names, options.layer, options.output, **options.loading())
        return replace(options, kl_pairs=options.kl_pairs or course is not None), course
    if options.layer:
        raise UserError(
            f"layer {options.layer} is for checkpoints of one run, measured on the same rollouts: give --rollouts"
        )
    return options, None


@dataclass(frozen=True)
class _Given:
    """What is analysed besides names: as of `analyze`, with the problems loaded where they are answered.

    Attributes:
        source (`str`): where problems or rollouts are from.
        asking ([`~bupo.data.prompt_settings.Asking`]): how the models are asked.
        objects (`list[str]`): names of what came from Python.
        noted (`dict`): what `config.yaml` holds.
    """

    model: nn.Module | None
    tokenizer: PreTrainedTokenizerBase | None
    problems: Dataset | None
    rollouts: Sequence[Rollout] | None
    source: str
    asking: Asking
    objects: list[str]
    noted: dict[str, Any]


def _given(
    model, tokenizer, problems, rollouts, options: AnalyzeOptions, asking: Asking, noted: dict[str, Any]
) -> _Given:
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
        check_columns(problems, "problems", ("prompt",))
    return _Given(model, tokenizer, problems, rollouts, source, asking, objects, noted)


@dataclass(frozen=True)
class _Subject:
    """A model that is analysed, opened up, and its folder."""

    label: str
    policies: InternalPolicies
    tokenizer: PreTrainedTokenizerBase
    meta: dict[str, Any]
    folder: Path


def _subject(name: str, label: str, given: _Given, options: AnalyzeOptions) -> _Subject:
    if given.tokenizer is not None:
        tokenizer = copy.deepcopy(given.tokenizer)  # it is given a template
    else:
        tokenizer = load_tokenizer(name, **options.loading())
    model = given.model
    if model is None:
        model = load_on_device(name, options.dtype, options.device_map, options.adapter, **options.loading())
    template, temperature = given.asking.give_template(tokenizer), options.sampling[1]
    policies = InternalPolicies(model, lens=options.lens, temperature=temperature)
    meta = model_meta(name, policies.stream, options.lens, temperature, options.revision) | {
        "adapter": options.adapter,
        "seed": options.seed,
        "template": template,
        "weights": fingerprint(policies.stream.model),
        "kl_pairs": options.kl_pairs,
        **given.asking.noted,
    }
    meta |= {"preset": options.preset} if options.preset else {}
    return _Subject(label, policies, tokenizer, meta, inside(options.output, label))


def _reported(
    name: str, label: str, given: _Given, options: AnalyzeOptions, bar: Progress | None, first: bool
) -> ModelReport:
    """One model: rollouts, measures, and what the tables and the page need. Other work in the folder is refused first."""
    subject = _subject(name, label, given, options)
    answers, prompts, rollouts = None, Prompts(), []
    if given.problems is None:
        rollouts = (
            list(given.rollouts)
            if given.rollouts is not None
            else _read(options, subject.tokenizer, subject.policies.stream.config, given.asking)
        )
    else:
        asked, limits = given.asking.template_options, limits_of(subject.policies.stream.config)
        check_size(given.problems["prompt"], limits, given.source)
        prompts = [tuple(prompt_ids(subject.tokenizer, problem["prompt"], **asked)) for problem in given.problems]
        check_context(prompts, limits, given.source)
        answers = _answers(subject, options, given.problems, prompts)
    _measures(subject, options, rollouts, sampled=answers is not None)
    if first:
        note_run(options.output, "analyze", given.noted, given.objects)
    with evaluating(subject.policies.stream.model):
        if answers is not None:
            rollouts = _sampled(subject, options, answers, prompts, bar)
        found = _measured(subject, options, rollouts, answers is not None, bar)
        views = token_views(subject.policies, subject.tokenizer, rollouts[: len(found.answers)])
    return model_report(label, subject.meta | {"dataset": given.source}, found, views, subject.folder)


def _measured(
    subject: _Subject, options: AnalyzeOptions, rollouts: list[Rollout], sampled: bool, bar: Progress | None
) -> Measured:
    store = _measures(subject, options, rollouts, sampled)
    store.begin()
    total = sum(len(r.completion_ids) for r in rollouts)
    return measured(
        subject.policies,
        rollouts,
        store,
        until_settled=options.until == "settled",
        max_tokens=options.max_tokens,
        per_token=options.per_token,
        pairs=options.kl_pairs,
        on_tokens=task(bar, f"{subject.label}: tokens", min(options.max_tokens or total, total)),
    )


def _read(
    options: AnalyzeOptions, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, asking: Asking
) -> list[Rollout]:
    config = config.get_text_config()
    most = context_of(config), getattr(config, "vocab_size", None)
    return read_rollouts(str(options.rollouts), tokenizer, *most, **asking.template_options)


def _answers(subject: _Subject, options: AnalyzeOptions, problems: Dataset, prompts: Prompts) -> Store[int, Rollout]:
    """Where the sampled answers are kept. They do not depend on the lens, nor on what is measured."""
    sampling = ("system_prompt", "temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: subject.meta[name] for name in ("dtype", "weights", "template")}
    settings |= {name: getattr(options, name) for name in sampling}
    settings |= {"engine": "transformers", "prompt": subject.tokenizer.decode(prompts[0])}
    return Store(
        subject.folder,
        ROLLOUTS_FILE,
        "answers",
        read_rollout,
        rollout_line,
        settings,
        prompt_digests(problems),
        noted={name: subject.meta[name] for name in ("model", "revision", "adapter")},
        beside=[ANSWERS_FILE, TOKENS_FILE],  # measures of an earlier version
        overwrite=options.overwrite,
    )


def _sampled(subject: _Subject, options: AnalyzeOptions, store: Store, prompts: Prompts, bar) -> list[Rollout]:
    store.begin()
    engine = TransformersEngine(
        subject.policies.stream.model,
        subject.tokenizer,
        *options.sampling,
        batch_size=options.batch_size,
    )
    done = task(bar, f"{subject.label}: answers", len(prompts))
    return sampled_rollouts(engine, prompts, store, options.seed, done)


def _measures(
    subject: _Subject, options: AnalyzeOptions, rollouts: Sequence[Rollout], sampled: bool
) -> Store[int, AnswerSums]:
    """Where the measures are kept: a folder for each lens, with or without the KL of all pairs, of sampled or given answers."""
    names = ("dtype", "weights", "lens", "temperature", "kl_pairs")
    folder = subject.folder / (options.lens + "-kl_pairs" * options.kl_pairs + "-rollouts" * (not sampled))
    refuse_links(folder, Path(options.output))
    return Store(
        folder,
        ANSWERS_FILE,
        "measures",
        _read_sums,
        lambda index, sums: sums.line(),
        {name: subject.meta[name] for name in names} | {"measures": list(MEASURES)},
        [digest(rollout) for rollout in rollouts],
        "answers",
        noted={name: subject.meta[name] for name in ("model", "revision", "adapter")},
        beside=[TOKENS_FILE],
        overwrite=options.overwrite,
    )


def _read_sums(line: str) -> tuple[int, AnswerSums]:
    sums = AnswerSums.read(line)
    return sums.index, sums


def _load_problems(options: AnalyzeOptions) -> Dataset:
    name = options.dataset or ARITHMETIC
    if is_benchmark(name):
        if without_k(name)[1]:
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


def _labels(names: list[str], output: str) -> list[str]:
    """Short names of the models, each its own."""
    if not names:
        raise UserError("model is empty: give the folder of a model, a hub id or 'embedded'")
    labels = [Path(name).stem if name.endswith(".gguf") else Path(name).name for name in names]
    for label in labels:
        inside(output, label)
    return [label if labels.count(label) == 1 else f"{i + 1}-{label}" for i, label in enumerate(labels)]
