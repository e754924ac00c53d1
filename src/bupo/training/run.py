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

from bupo.data.chat_templates import describe_chat_template, get_template_kwargs
from bupo.models.loading import compute_weight_fingerprint, load_model
from bupo.options.groups import get_changed_options
from bupo.run_files.names import DYNAMICS_FILE, METRICS_FILE
from bupo.run_files.provenance import record_run
from bupo.run_files.reading import read_parquet
from bupo.training import failure_messages
from bupo.training.callbacks.best_metric import check_best_metric
from bupo.training.callbacks.metrics_file import MetricsFileCallback, read_metrics
from bupo.training.callbacks.stop_on_signal import graceful_shutdown
from bupo.training.callbacks.tensorboard_resume import resume_tensorboard
from bupo.training.checkpoints.integrity import get_global_step
from bupo.training.checkpoints.resume import check_resume_options, check_same_schedule, get_resume_options
from bupo.training.checkpoints.trainer_state import check_same_run
from bupo.training.checkpoints.writer import wrap_write_errors
from bupo.training.config import BuPOConfig
from bupo.training.objective.phases import PhaseSchedule
from bupo.training.run_directory import (
    clear_run_directory,
    draw_figures,
    get_resume_option,
    mark_finished,
    prepare_run_directory,
)
from bupo.training.train_data import (
    RewardFunc,
    TrainData,
    TrainOptions,
    check_rewards,
    load_reward_func,
    load_train_data,
    prepare_prompts,
)
from bupo.training.trainer import BuPOTrainer
from bupo.training.validation.arguments import check_model, check_prompts, describe_phases, get_pretrained_kwargs
from bupo.training.validation.dry_run import dry_run_components
from bupo.training.validation.reward_signatures import as_list
from bupo.training.validation.trainable_parameters import check_trainable
from bupo.utils.errors import summarize_error, wrap_library_errors
from bupo.utils.files import check_output_folder, refuse_links
from bupo.utils.lock import folder_lock

# by which libraries refuse, while a run goes, what they were given
REFUSAL_ERRORS = (ValueError, ImportError, NotImplementedError)
EXTERNAL_FOLDERS = ("runs", "completions")  # folders of TensorBoard and TRL, which would follow a link
PYTHON_ONLY_ARGUMENTS = (
    "problems",
    "eval_problems",
    "reward_funcs",
    "model",
)  # arguments of `train` that no file can hold


@dataclass(frozen=True)
class TrainingRun:
    """A finished run.

    Attributes:
        folder (`Path`): with the model, `metrics.jsonl`, `dynamics.parquet` and the figures.
        model (`PreTrainedModel` or `PeftModel`), tokenizer: what was trained.
        schedule ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase as it was, `auto` and the guard's decisions included.
        metrics (`list[dict]`): the rows of `metrics.jsonl`.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    schedule: PhaseSchedule
    metrics: list[dict[str, Any]]

    @property
    def updates(self) -> pd.DataFrame:
        """One row a log of training: reward, entropies, lengths … over rollout batches."""
        return pd.DataFrame([row for row in self.metrics if "rollout_batch" in row])

    @property
    def dynamics(self) -> pd.DataFrame | None:
        """The probes' series (figs. 4, 5 and 7), if there were any."""
        path = self.folder / DYNAMICS_FILE
        return read_parquet(path) if path.exists() else None


class RunMetadataCallback(TrainerCallback):
    """Writes what was asked for into the run's folder once training begins: what is refused leaves nothing."""

    def __init__(self, command: str, given: dict[str, Any], objects: Sequence[str] = ()):
        self.metadata = (command, given, objects)
        self.input_metadata: dict[str, Any] = {}  # what is told of problems and weights, once they are loaded

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            record_run(args.output_dir, *self.metadata, self.input_metadata)


def train(
    model: str | PreTrainedModel,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    problems: Dataset | None = None,
    eval_problems: Dataset | None = None,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
    loading: ModelConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    note: RunMetadataCallback | None = None,
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
    note = note or _make_metadata_callback(model, config, options, loading, (problems, eval_problems, reward_funcs))
    rewards = _load_checked_rewards(config, options, loading, reward_funcs, callbacks)
    with folder_lock(config.output_dir):
        checkpoint, done = prepare_run_directory(config, options.overwrite, say)
        tokenizer = check_model(model, tokenizer, config, loading)
        say(describe_chat_template(tokenizer, options.chat_template))
        sets = prepare_prompts(
            load_train_data(options, config, problems, eval_problems, rewards), options, config, tokenizer, say
        )
        loaded = _load_policy(model, tokenizer, sets, config, loading)
        note.trained = {"problems": sets.get_metadata(options), "weights": compute_weight_fingerprint(loaded)}
        trainer = _make_trainer(loaded, tokenizer, config, sets, rewards, loading, [note, *callbacks], say)
        return _load_finished_run(trainer, done, say) if done else _train_and_save(trainer, checkpoint, title, say)


def _load_checked_rewards(
    config: BuPOConfig, options: TrainOptions, loading: ModelConfig, given, callbacks
) -> list[RewardFunc]:
    """The reward functions, once no option is refused that can be refused without a model and without problems."""
    options.check()
    check_output_folder("output", config.output_dir)
    dry_run_components(config, loading)
    rewards = as_list(given) or [load_reward_func(name) for name in options.reward_names]
    check_rewards(rewards, config)
    check_best_metric(config, rewards, [getattr(reward, "__name__", None) for reward in rewards], callbacks)
    return rewards


def _make_metadata_callback(
    model: Any, config: BuPOConfig, options: TrainOptions, loading: ModelConfig, objects: tuple
) -> RunMetadataCallback:
    """The options that differ from their defaults, as `bupo train --config` takes them, and what no file can hold."""
    plain = BuPOConfig("", internal_layer=1).to_dict() | {"internal_layer": None}
    derived = ("generation_batch_size", "logging_dir")  # from steps_per_generation and the folder
    differ = {name: value for name, value in config.to_dict().items() if value != plain.get(name)}
    trained = {name: value for name, value in differ.items() if name not in derived}
    named = {"model_name_or_path": model} if isinstance(model, str) else {}
    from_python = zip(PYTHON_ONLY_ARGUMENTS, (*objects, None if named else model), strict=True)
    given = get_changed_options(loading) | named | trained | get_changed_options(options)
    return RunMetadataCallback("train", given, sorted(name for name, value in from_python if value is not None))


def _make_trainer(
    model, tokenizer, config: BuPOConfig, sets: TrainData, rewards, loading, callbacks, say
) -> BuPOTrainer:
    """The trainer of a run. What TRL refuses is a [`UserError`]."""
    config.chat_template_kwargs = get_template_kwargs(tokenizer) | (config.chat_template_kwargs or {})
    with wrap_library_errors(str, ValueError, TypeError, ImportError, RuntimeError, OSError):
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=sets.train,
            eval_dataset=sets.eval_problems,
            processing_class=tokenizer,
            callbacks=[MetricsFileCallback(config.output_dir), *callbacks],
            benchmarks=sets.benchmarks,
            peft_config=get_peft_config(loading),
        )
    check_trainable(trainer)  # before anything of the folder is replaced
    trainer.system_prompt, trainer.dataset_name = sets.system_prompt, sets.name
    for theirs in (PrinterCallback, ProgressCallback):  # `callbacks` show what is to be shown
        trainer.remove_callback(theirs)
    if notice := describe_phases(config):
        say(notice)
    return trainer


def _train_and_save(trainer: BuPOTrainer, checkpoint: str | None, title: str | None, say) -> TrainingRun:
    """Train and save the model, its tokenizer, its card and its figures into the run's folder."""
    folder = Path(trainer.args.output_dir)
    if checkpoint is None:
        say(f"run {folder}: the first rollout batch is being sampled")
    with wrap_write_errors(folder), graceful_shutdown(trainer, say):
        if checkpoint:
            check_same_run(trainer, Path(checkpoint), trainer.accelerator.print)
        if trainer.is_world_process_zero():
            for inner in EXTERNAL_FOLDERS:
                refuse_links(folder / inner, folder)
            clear_run_directory(
                folder, checkpoint
            )  # what `overwrite` has asked for, or a run has left that had no checkpoint yet
            if get_resume_option(trainer.args):
                resume_tensorboard(trainer.callback_handler.callbacks, folder, get_global_step(checkpoint))
        refusal = wrap_library_errors(
            lambda error: f"{trainer.where(trainer.last_rollout_batch)}: {summarize_error(error)}", *REFUSAL_ERRORS
        )
        with refusal, failure_messages.wrap_training_errors(lambda: trainer.where(trainer.last_rollout_batch)):
            trainer.train_from_checkpoint(checkpoint)
        if checkpoint and trainer.resumed_at_step >= trainer.state.max_steps:
            say(f"the run is finished: all {trainer.resumed_at_step} updates are done, nothing more is trained")
        trainer.save_model_atomically(folder)
        rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
        if trainer.is_world_process_zero():
            draw_figures(folder, rows, title or folder.name)
            if trainer.state.global_step >= trainer.state.max_steps:  # else it was stopped, and goes on
                mark_finished(
                    trainer.args,
                    trainer.state.global_step,
                    trainer.phase_controller.schedule,
                    get_resume_options(trainer),
                )
    return TrainingRun(folder, trainer.model, trainer.processing_class, trainer.phase_controller.schedule, rows)


def _load_finished_run(trainer: BuPOTrainer, done: dict[str, Any], say) -> TrainingRun:
    """A run that is resumed and has nothing left to do, as its folder holds it.

    Raises:
        UserError: if other options decided it.
    """
    folder, model = Path(trainer.args.output_dir), trainer.model
    with graceful_shutdown(trainer, say):
        check_same_schedule(done["planned"], trainer.args.first_phase, folder)
        check_resume_options(trainer, done["options"], folder, say=lambda line: None)
        say(f"the run is finished: {folder} holds all of it, nothing more is trained")
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)
        else:
            model = load_model(str(folder), dtype=model.dtype, trust_remote_code=trainer.args.trust_remote_code)
        rows = read_metrics(folder / METRICS_FILE)
    return TrainingRun(folder, model, trainer.processing_class, PhaseSchedule.load(done["schedule"]), rows)


def _load_policy(model, tokenizer, sets: TrainData, config: BuPOConfig, loading: ModelConfig) -> PreTrainedModel:
    """A model by name, once its prompts are looked at. With a KL penalty, TRL loads its reference at the same revision."""
    check_prompts(sets.train, tokenizer, model, config, loading)
    if not isinstance(model, str):
        return model
    arguments = {
        "dtype": loading.dtype or "float32",  # TRL's default: the weights train in fp32
        "attn_implementation": loading.attn_implementation,
        "quantization_config": get_quantization_config(loading),
        **get_pretrained_kwargs(config, loading),
        **(config.model_init_kwargs or {}),
    }
    loaded = load_model(model, **arguments)
    config.model_init_kwargs = {"revision": loading.model_revision} if config.beta != 0 else None
    return loaded
