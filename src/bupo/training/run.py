"""`bupo.train`: a model, problems and a reward into a run's folder."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, get_peft_config, get_quantization_config

from bupo.data.problems import load_problems
from bupo.data.templates import chat_template, choose_template, plain_text, template_options
from bupo.errors import UserError, others
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.model.loading import load_model, load_tokenizer
from bupo.options import ColumnOptions, DatasetOptions, PromptOptions, changed
from bupo.provenance import note_run
from bupo.report.figures import dynamics_figure, training_figure
from bupo.rewards.grader import check_golds
from bupo.rewards.math_reward import math_reward
from bupo.training.config import BuPOConfig
from bupo.training.dynamics import DYNAMICS_FILE
from bupo.training.metrics_file import METRICS_FILE, MetricsFile, read_metrics
from bupo.training.schedule import Schedule
from bupo.training.trainer import BuPOTrainer

GOLDS_TRIED = 32  # gold answers that must be readable before a run starts; later ones give no reward


@dataclass
class TrainOptions(PromptOptions, ColumnOptions, DatasetOptions):
    """The problems to train on and the reward.

    Parameters:
        dataset (`str`): a hub id, a local `.parquet`, `.jsonl` or `.json` file, `reasoning_gym:NAME`, `arithmetic`.
        dataset_config (`str`, *optional*): the hub dataset's configuration, or a reasoning_gym task's options as JSON.
        split, size: of the problems to train on.
        eval_dataset (`str`, *optional*), eval_split (`str`, *optional*, defaults to `"test"`), eval_size (`int`, *optional*):
            problems for TRL's `eval_strategy`, by default of the same dataset.
        prompt_column, answer_column (`str`, *optional*): columns; a dot reaches into a nested one.
        system_prompt (`str`, *optional*): put before problems that have no system message.
        chat_template (`str`, *optional*): `qwen-math`, `octothinker` or a `.jinja` file, instead of the tokenizer's own.
        reward_funcs (`list[str]`): `math` (math-verify), or functions by dotted import path.
    """

    eval_dataset: str | None = field(
        default=None, metadata={"help": "Where evaluation problems are, if not in the dataset."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many problems."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math"],
        metadata={"help": "`math` (math-verify in killable processes), or functions by dotted import path."},
    )


@dataclass(frozen=True)
class TrainingRun:
    """A finished run.

    Attributes:
        folder (`Path`): with the model, `metrics.jsonl`, `dynamics.parquet` and the figures.
        model (`PreTrainedModel` or `PeftModel`), tokenizer: what was trained.
        schedule ([`~bupo.training.schedule.Schedule`]): the first phase as it was, `auto` and the guard's decisions included.
        metrics (`list[dict]`): the rows of `metrics.jsonl`.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    schedule: Schedule
    metrics: list[dict[str, Any]]

    @property
    def updates(self) -> pd.DataFrame:
        """One row a log of training: reward, entropies, lengths … over rollout batches."""
        return pd.DataFrame([row for row in self.metrics if "rollout_batch" in row])

    @property
    def dynamics(self) -> pd.DataFrame | None:
        """The probes' series (figs. 4, 5 and 7), if there were any."""
        path = self.folder / DYNAMICS_FILE
        return pd.read_parquet(path) if path.exists() else None


Reward = Callable[..., list[float | None]]


class NotedRun(TrainerCallback):
    """Writes what was asked for into the run's folder once training begins: what is refused leaves nothing."""

    def __init__(self, command: str, given: dict[str, Any], objects: Sequence[str] = ()):
        self.noted = (command, given, objects)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            note_run(args.output_dir, *self.noted)


def train(
    model: str | PreTrainedModel,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    problems: Dataset | None = None,
    reward_funcs: Sequence[Reward] | None = None,
    loading: ModelConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    note: NotedRun | None = None,
    title: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainingRun:
    """Train a model by BuPO, or by the methods that it is compared with, into the folder `config.output_dir`.

    Args:
        model (`str` or `PreTrainedModel`): as of [`load_model`], or a loaded one with its `tokenizer`.
        config ([`BuPOConfig`]), options ([`TrainOptions`], *optional*): of the run; problems, template and rewards.
        problems (`Dataset`), reward_funcs (`list[Callable]`, *optional*): instead of those that `options` names.
        loading (`ModelConfig`, *optional*): TRL's: dtype, revision, attention, quantization and PEFT.
        callbacks (`list[TrainerCallback]`, *optional*): transformers'.
        note ([`NotedRun`], *optional*): what `config.yaml` holds; by default all that differs from the defaults.
        title (`str`), say (`Callable`, *optional*): above the figures; called with a line on what is being done.

    Raises:
        UserError: for a value that is refused, before anything is written, or a run that cannot go on.
    """
    options, loading = options or TrainOptions(), loading or ModelConfig()
    note = note or _noted(model, config, options, loading, {"problems": problems, "reward_funcs": reward_funcs})
    rewards = list(reward_funcs or [reward_of(name) for name in options.reward_funcs])
    checkpoint = checkpoint_to_resume(config)
    sets = _problem_sets(options, config, problems, rewards)
    if isinstance(model, str):
        model, tokenizer = _loaded(model, config, loading)
    trainer = _trainer(model, tokenizer, config, options, sets, rewards, loading, [note, *callbacks], say)
    return _trained(trainer, checkpoint, title)


def _noted(
    model: Any, config: BuPOConfig, options: TrainOptions, loading: ModelConfig, objects: dict[str, Any]
) -> NotedRun:
    """The options that differ from their defaults, as `bupo train --config` takes them, and what no file can hold."""
    plain = BuPOConfig("", internal_layer=1).to_dict() | {"internal_layer": None}
    derived = ("generation_batch_size", "logging_dir")  # from steps_per_generation and the folder
    differ = {name: value for name, value in config.to_dict().items() if value != plain.get(name)}
    trained = {name: value for name, value in differ.items() if name not in derived}
    named = {"model_name_or_path": model} if isinstance(model, str) else {}
    objects = objects | {"model": None if named else model}
    given = changed(loading) | named | trained | changed(options)
    return NotedRun("train", given, sorted(name for name, value in objects.items() if value is not None))


def _trainer(
    model, tokenizer, config: BuPOConfig, options: TrainOptions, sets, rewards, loading: ModelConfig, callbacks, say
) -> BuPOTrainer:
    """The trainer of a run. What TRL refuses is a [`UserError`]."""
    if tokenizer is None:
        raise UserError("tokenizer is not set: a loaded model needs its tokenizer")
    say(f"chat template: {choose_template(tokenizer, options.chat_template)}")
    config.chat_template_kwargs = template_options(tokenizer) | (config.chat_template_kwargs or {})
    if tokenizer.chat_template is None:
        sets = [problems and _as_text(problems) for problems in sets]
    names = config.eval_benchmarks or []
    with others(str, ValueError, TypeError, ImportError, RuntimeError):
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=sets[0],
            eval_dataset=sets[1],
            processing_class=tokenizer,
            callbacks=[MetricsFile(config.output_dir), *callbacks],
            benchmarks=load_benchmarks(names, config.eval_problems, options.system_prompt, config.seed),
            peft_config=get_peft_config(loading),
        )
    for theirs in (PrinterCallback, ProgressCallback):  # `callbacks` show what is to be shown
        trainer.remove_callback(theirs)
    say(f"run {config.output_dir}: the first rollout batch is being sampled")
    return trainer


def _trained(trainer: BuPOTrainer, checkpoint: str | None, title: str | None) -> TrainingRun:
    """Train and save the model, its tokenizer, its card and its figures into the run's folder."""
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(trainer.args.output_dir)
    folder = Path(trainer.args.output_dir)
    rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    if trainer.is_world_process_zero():
        draw(folder, rows, title or folder.name)
    trainer.end()
    return TrainingRun(folder, trainer.model, trainer.processing_class, trainer.schedule, rows)


def draw(folder: Path, rows: list[dict], title: str) -> None:
    """The figures of a run, from its tables: `training.png`, and `dynamics.png` if it was probed."""
    training_figure(rows, folder / "training.png", title)
    if (folder / DYNAMICS_FILE).exists():
        dynamics_figure(pd.read_parquet(folder / DYNAMICS_FILE), rows, folder / "dynamics.png", title)


def _problem_sets(
    options: TrainOptions, config: BuPOConfig, problems: Dataset | None, rewards: Sequence[Reward]
) -> tuple[Dataset, Dataset | None]:
    """The problems to train on, and those to evaluate on if that is asked for."""
    if options.chat_template:
        chat_template(options.chat_template)  # a bad one is refused before anything is loaded

    def load(name: str | None, split: str, size: int | None) -> Dataset:
        if name is None:
            raise UserError("dataset is not set: give a hub id, a local file, reasoning_gym:NAME or arithmetic")
        columns = {"prompt_column": options.prompt_column, "answer_column": options.answer_column}
        prompt = {"system_prompt": options.system_prompt}
        return load_problems(
            name, split, config=options.dataset_config, size=size, seed=config.seed, **columns, **prompt
        )

    train_set = load(options.dataset, options.split, options.size) if problems is None else problems
    eval_set = None
    if config.eval_strategy != "no":
        eval_set = load(options.eval_dataset or options.dataset, options.eval_split, options.eval_size)
    if math_reward in rewards:
        golds = train_set[: min(GOLDS_TRIED, len(train_set))]["answer"]
        try:
            check_golds(golds, str(options.dataset))
        except UserError as error:
            raise UserError(f"{error}; reward_funcs takes a function of your own for such answers") from error
    return train_set, eval_set


def _loaded(name: str, config: BuPOConfig, loading: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by name and its tokenizer. With a KL penalty, TRL is told to load its reference at the same revision."""
    options = {"revision": loading.model_revision, "trust_remote_code": config.trust_remote_code}
    if config.beta != 0 and name.endswith(".gguf"):
        raise UserError(
            f"beta={config.beta} needs a reference model, which is not loaded from a .gguf file: save it as a folder first"
        )
    tokenizer = load_tokenizer(name, **options)
    model = load_model(
        name,
        dtype=loading.dtype or "float32",  # TRL's default: the weights train in fp32
        attn_implementation=loading.attn_implementation,
        quantization_config=get_quantization_config(loading),
        **options,
        **(config.model_init_kwargs or {}),
    )
    config.model_init_kwargs = {"revision": loading.model_revision} if config.beta != 0 else None
    return model, tokenizer


def reward_of(name: str) -> Reward:
    """A reward function by name: `math`, or a dotted path that is imported from the working directory too.

    Raises:
        UserError: if there is none.
    """
    if name == "math":
        return math_reward
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(f"unknown reward function {name!r}: give 'math' or a dotted import path such as my_rewards.f")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward function {name!r} cannot be imported: {error}") from error


def _as_text(problems: Dataset) -> Dataset:
    """Prompts as plain text, for a model without a chat template."""
    return problems.map(lambda row: {"prompt": plain_text(row["prompt"])})


def checkpoint_to_resume(config: BuPOConfig) -> str | None:
    """The checkpoint to resume from: a path, or for `true` the newest complete one of the run.

    Raises:
        UserError: if there is none.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not (Path(wanted) / TRAINER_STATE_NAME).exists():
            raise UserError(
                f"resume_from_checkpoint: {wanted} holds no complete checkpoint ({TRAINER_STATE_NAME} is missing)"
            )
        return str(wanted)
    found = [p.parent for p in Path(config.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if not found:
        raise UserError(f"resume_from_checkpoint: {config.output_dir} holds no complete checkpoint to resume from")
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2])))
