"""`bupo.train`: a model, problems and a reward into a run's folder."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from trl import ModelConfig, get_peft_config, get_quantization_config

from bupo.data.templates import choose_template, template_options
from bupo.errors import UserError, others
from bupo.model.loading import load_model, load_tokenizer
from bupo.options import changed
from bupo.provenance import note_run
from bupo.training import messages
from bupo.training.config import BuPOConfig
from bupo.training.dynamics import DYNAMICS_FILE
from bupo.training.folder import checkpoint_to_resume, clear, draw, refuse_held
from bupo.training.inputs import Problems, Reward, TrainOptions, problems_of, reward_of
from bupo.training.metrics_file import METRICS_FILE, MetricsFile, read_metrics
from bupo.training.schedule import Schedule
from bupo.training.trainer import BuPOTrainer


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
    eval_problems: Dataset | None = None,
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
        problems, eval_problems (`Dataset`), reward_funcs (`list`, *optional*): instead of those that `options` names.
        loading (`ModelConfig`, *optional*): TRL's: dtype, revision, attention, quantization and PEFT.
        callbacks (`list[TrainerCallback]`), note ([`NotedRun`], *optional*): transformers'; what `config.yaml` holds.
        title (`str`), say (`Callable`, *optional*): above the figures; called with a line on what is being done.

    Raises:
        UserError: for a value that is refused, before anything is written, or a run that cannot go on.
    """
    config, tokenizer = copy.copy(config), copy.deepcopy(tokenizer)  # both are given a template
    options, loading = options or TrainOptions(), loading or ModelConfig()
    own = {"problems": problems, "eval_problems": eval_problems, "reward_funcs": reward_funcs}
    note = note or _noted(model, config, options, loading, own)
    rewards = list(reward_funcs or [reward_of(name) for name in options.reward_funcs])
    checkpoint = checkpoint_to_resume(config)
    refuse_held(config, options.overwrite or checkpoint is not None)
    sets = problems_of(options, config, problems, eval_problems, rewards)
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
    model, tokenizer, config: BuPOConfig, options: TrainOptions, sets: Problems, rewards, loading, callbacks, say
) -> BuPOTrainer:
    """The trainer of a run. What TRL refuses is a [`UserError`]."""
    if tokenizer is None:
        raise UserError("tokenizer is not set: a loaded model needs its tokenizer")
    say(f"chat template: {choose_template(tokenizer, options.chat_template)}")
    config.chat_template_kwargs = template_options(tokenizer) | (config.chat_template_kwargs or {})
    if tokenizer.chat_template is None:
        sets = sets.as_text()
    with others(str, ValueError, TypeError, ImportError, RuntimeError):
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=sets.train,
            eval_dataset=sets.evaluation,
            processing_class=tokenizer,
            callbacks=[MetricsFile(config.output_dir), *callbacks],
            benchmarks=sets.benchmarks,
            peft_config=get_peft_config(loading),
        )
    for theirs in (PrinterCallback, ProgressCallback):  # `callbacks` show what is to be shown
        trainer.remove_callback(theirs)
    say(f"run {config.output_dir}: the first rollout batch is being sampled")
    return trainer


def _trained(trainer: BuPOTrainer, checkpoint: str | None, title: str | None) -> TrainingRun:
    """Train and save the model, its tokenizer, its card and its figures into the run's folder."""
    if checkpoint is None and trainer.is_world_process_zero():
        clear(Path(trainer.args.output_dir))  # what `overwrite` has asked for
    with messages.in_one_line():
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(trainer.args.output_dir)
    folder = Path(trainer.args.output_dir)
    rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    if trainer.is_world_process_zero():
        draw(folder, rows, title or folder.name)
    trainer.end()
    return TrainingRun(folder, trainer.model, trainer.processing_class, trainer.schedule, rows)


def _loaded(name: str, config: BuPOConfig, loading: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by name and its tokenizer. With a KL penalty, TRL is told to load its reference at the same revision."""
    options = {"revision": loading.model_revision, "trust_remote_code": config.trust_remote_code}
    if config.beta != 0 and name.endswith(".gguf"):
        raise UserError(
            f"beta={config.beta} needs a reference model, which is not loaded from a .gguf file: save it as a folder first"
        )
    tokenizer = load_tokenizer(name, **options)
    arguments = {
        "dtype": loading.dtype or "float32",  # TRL's default: the weights train in fp32
        "attn_implementation": loading.attn_implementation,
        "quantization_config": get_quantization_config(loading),
        **options,
        **(config.model_init_kwargs or {}),
    }
    model = load_model(name, **arguments)
    config.model_init_kwargs = {"revision": loading.model_revision} if config.beta != 0 else None
    return model, tokenizer
