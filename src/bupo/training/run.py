"""`bupo.train`: a model, problems and a reward into a run's folder."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from bupo.data.chat_templates import said_of_template, template_options
from bupo.models.loading import fingerprint, load_model
from bupo.options.groups import changed
from bupo.run_files.provenance import note_run
from bupo.run_files.reading import read_table
from bupo.training import failure_messages
from bupo.training.callbacks.best_metric import check_best_metric
from bupo.training.callbacks.metrics_file import METRICS_FILE, MetricsFile, read_metrics
from bupo.training.callbacks.probe_series import DYNAMICS_FILE
from bupo.training.callbacks.stop_on_signal import ending
from bupo.training.callbacks.tensorboard_resume import continue_events
from bupo.training.checkpoints.integrity import updates_of
from bupo.training.checkpoints.resume import deciding, hold, same_phase
from bupo.training.checkpoints.trainer_state import check_same_run
from bupo.training.checkpoints.writer import writing
from bupo.training.config import BuPOConfig
from bupo.training.objective.phases import Schedule
from bupo.training.run_directory import (
    begin,
    clear,
    draw,
    mark_finished,
    wants_to_resume,
)
from bupo.training.train_data import Problems, Reward, TrainOptions, check_rewards, problems_of, reward_of, within
from bupo.training.trainer import BuPOTrainer
from bupo.training.validation.arguments import check_model, check_prompts, said_of_phases, sources
from bupo.training.validation.dry_run import rehearse
from bupo.training.validation.reward_signatures import as_list
from bupo.training.validation.trainable_parameters import check_trainable
from bupo.utils.errors import first_line, others
from bupo.utils.files import check_output, refuse_links
from bupo.utils.lock import sole_writer

# by which libraries refuse, while a run goes, what they were given
REFUSALS = (ValueError, ImportError, NotImplementedError)
WRITTEN_BY_OTHERS = ("runs", "completions")  # folders of TensorBoard and TRL, which would follow a link
OBJECTS = ("problems", "eval_problems", "reward_funcs", "model")  # arguments of `train` that no file can hold


@dataclass(frozen=True)
class TrainingRun:
    """A finished run.

    Attributes:
        folder (`Path`): with the model, `metrics.jsonl`, `dynamics.parquet` and the figures.
        model (`PreTrainedModel` or `PeftModel`), tokenizer: what was trained.
        schedule ([`~bupo.training.objective.phases.Schedule`]): the first phase as it was, `auto` and the guard's decisions included.
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
        return read_table(path) if path.exists() else None


class NotedRun(TrainerCallback):
    """Writes what was asked for into the run's folder once training begins: what is refused leaves nothing."""

    def __init__(self, command: str, given: dict[str, Any], objects: Sequence[str] = ()):
        self.noted = (command, given, objects)
        self.trained: dict[str, Any] = {}  # what is told of problems and weights, once they are loaded

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            note_run(args.output_dir, *self.noted, self.trained)


def train(
    model: str | PreTrainedModel,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    problems: Dataset | None = None,
    eval_problems: Dataset | None = None,
    reward_funcs: Reward | Sequence[Reward] | None = None,
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
        callbacks, note, title, say (*optional*): transformers'; of `config.yaml`; above the figures; told what is done.

    Raises:
        UserError, Stopped: for a value that is refused, before anything is written; by a signal, a checkpoint being kept.
    """
    config, tokenizer = copy.copy(config), copy.deepcopy(tokenizer)  # both are given a template
    options, loading = options or TrainOptions(), loading or ModelConfig()
    note = note or _noted(model, config, options, loading, (problems, eval_problems, reward_funcs))
    rewards = _checked(config, options, loading, reward_funcs, callbacks)
    with sole_writer(config.output_dir):
        checkpoint, done = begin(config, options.overwrite, say)
        tokenizer = check_model(model, tokenizer, config, loading)
        say(said_of_template(tokenizer, options.chat_template))
        sets = within(problems_of(options, config, problems, eval_problems, rewards), options, config, tokenizer, say)
        loaded = _loaded(model, tokenizer, sets, config, loading)
        note.trained = {"problems": sets.noted(options), "weights": fingerprint(loaded)}
        trainer = _trainer(loaded, tokenizer, config, sets, rewards, loading, [note, *callbacks], say)
        return _finished(trainer, done, say) if done else _trained(trainer, checkpoint, title, say)


def _checked(config: BuPOConfig, options: TrainOptions, loading: ModelConfig, given, callbacks) -> list[Reward]:
    """The reward functions, once no option is refused that can be refused without a model and without problems."""
    options.check()
    check_output("output", config.output_dir)
    rehearse(config, loading)
    rewards = as_list(given) or [reward_of(name) for name in options.rewards]
    check_rewards(rewards, config)
    check_best_metric(config, rewards, [getattr(reward, "__name__", None) for reward in rewards], callbacks)
    return rewards


def _noted(model: Any, config: BuPOConfig, options: TrainOptions, loading: ModelConfig, objects: tuple) -> NotedRun:
    """The options that differ from their defaults, as `bupo train --config` takes them, and what no file can hold."""
    plain = BuPOConfig("", internal_layer=1).to_dict() | {"internal_layer": None}
    derived = ("generation_batch_size", "logging_dir")  # from steps_per_generation and the folder
    differ = {name: value for name, value in config.to_dict().items() if value != plain.get(name)}
    trained = {name: value for name, value in differ.items() if name not in derived}
    named = {"model_name_or_path": model} if isinstance(model, str) else {}
    from_python = zip(OBJECTS, (*objects, None if named else model), strict=True)
    given = changed(loading) | named | trained | changed(options)
    return NotedRun("train", given, sorted(name for name, value in from_python if value is not None))


def _trainer(model, tokenizer, config: BuPOConfig, sets: Problems, rewards, loading, callbacks, say) -> BuPOTrainer:
    """The trainer of a run. What TRL refuses is a [`UserError`]."""
    config.chat_template_kwargs = template_options(tokenizer) | (config.chat_template_kwargs or {})
    with others(str, ValueError, TypeError, ImportError, RuntimeError, OSError):
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
    check_trainable(trainer)  # before anything of the folder is replaced
    trainer.system_prompt, trainer.dataset_name = sets.system_prompt, sets.name
    for theirs in (PrinterCallback, ProgressCallback):  # `callbacks` show what is to be shown
        trainer.remove_callback(theirs)
    if notice := said_of_phases(config):
        say(notice)
    return trainer


def _trained(trainer: BuPOTrainer, checkpoint: str | None, title: str | None, say) -> TrainingRun:
    """Train and save the model, its tokenizer, its card and its figures into the run's folder."""
    folder = Path(trainer.args.output_dir)
    if checkpoint is None:
        say(f"run {folder}: the first rollout batch is being sampled")
    with writing(folder), ending(trainer, say):
        if checkpoint:
            check_same_run(trainer, Path(checkpoint), trainer.accelerator.print)
        if trainer.is_world_process_zero():
            for inner in WRITTEN_BY_OTHERS:
                refuse_links(folder / inner, folder)
            clear(folder, checkpoint)  # what `overwrite` has asked for, or a run has left that had no checkpoint yet
            if wants_to_resume(trainer.args):
                continue_events(trainer.callback_handler.callbacks, folder, updates_of(checkpoint))
        refusal = others(lambda error: f"{trainer.where(trainer.last_batch)}: {first_line(error)}", *REFUSALS)
        with refusal, failure_messages.in_one_line(lambda: trainer.where(trainer.last_batch)):
            trainer.train_from(checkpoint)
        if checkpoint and trainer.resumed_at >= trainer.state.max_steps:
            say(f"the run is finished: all {trainer.resumed_at} updates are done, nothing more is trained")
        trainer.save_whole(folder)
        rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
        if trainer.is_world_process_zero():
            draw(folder, rows, title or folder.name)
            if trainer.state.global_step >= trainer.state.max_steps:  # else it was stopped, and goes on
                mark_finished(trainer.args, trainer.state.global_step, trainer.watch.schedule, deciding(trainer))
    return TrainingRun(folder, trainer.model, trainer.processing_class, trainer.watch.schedule, rows)


def _finished(trainer: BuPOTrainer, done: dict[str, Any], say) -> TrainingRun:
    """A run that is resumed and has nothing left to do, as its folder holds it.

    Raises:
        UserError: if other options decided it.
    """
    folder, model = Path(trainer.args.output_dir), trainer.model
    with ending(trainer, say):
        same_phase(done["planned"], trainer.args.first_phase, folder)
        hold(trainer, done["options"], folder, say=lambda line: None)
        say(f"the run is finished: {folder} holds all of it, nothing more is trained")
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)
        else:
            model = load_model(str(folder), dtype=model.dtype, trust_remote_code=trainer.args.trust_remote_code)
        rows = read_metrics(folder / METRICS_FILE)
    return TrainingRun(folder, model, trainer.processing_class, Schedule.load(done["schedule"]), rows)


def _loaded(model, tokenizer, sets: Problems, config: BuPOConfig, loading: ModelConfig) -> PreTrainedModel:
    """A model by name, once its prompts are looked at. With a KL penalty, TRL loads its reference at the same revision."""
    check_prompts(sets.train, tokenizer, model, config, loading)
    if not isinstance(model, str):
        return model
    arguments = {
        "dtype": loading.dtype or "float32",  # TRL's default: the weights train in fp32
        "attn_implementation": loading.attn_implementation,
        "quantization_config": get_quantization_config(loading),
        **sources(config, loading),
        **(config.model_init_kwargs or {}),
    }
    loaded = load_model(model, **arguments)
    config.model_init_kwargs = {"revision": loading.model_revision} if config.beta != 0 else None
    return loaded
