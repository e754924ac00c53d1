"""`bupo.train`: resolve a run's inputs, check them, load the model, train, and save the run directory."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from bupo.data.chat_templates import describe_chat_template, get_template_kwargs
from bupo.models.loading import compute_weight_fingerprint, load_config, load_model, load_tokenizer
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
from bupo.training.train_data import RewardFunc, TrainData, TrainOptions, load_reward_func, load_train_data
from bupo.training.trainer import BuPOTrainer
from bupo.training.validation.arguments import (
    check_layers,
    check_prompts,
    check_reference_model,
    check_resumable,
    describe_short_run,
    get_pretrained_kwargs,
)
from bupo.training.validation.dry_run import dry_run_components
from bupo.training.validation.reward_signatures import as_list, check_rewards
from bupo.training.validation.trainable_parameters import check_trainable
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors
from bupo.utils.files import check_output_folder, refuse_links
from bupo.utils.lock import folder_lock

# exceptions by which libraries refuse an option during training
REFUSAL_ERRORS = (ValueError, ImportError, NotImplementedError)
EXTERNAL_FOLDERS = ("runs", "completions")  # TensorBoard and TRL write into them and would follow a link
PYTHON_ONLY_ARGUMENTS = ("problems", "eval_problems", "reward_funcs", "model")  # arguments that no YAML file can hold


@dataclass(frozen=True)
class TrainingRun:
    """A finished run.

    Attributes:
        folder (`Path`): run directory with the model, `metrics.jsonl`, `dynamics.parquet` and the figures.
        model (`PreTrainedModel` or `PeftModel`), tokenizer (`PreTrainedTokenizerBase`): the trained model and its tokenizer.
        schedule ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase as trained, with the layer that `auto`
            chose and the length after early stopping.
        metrics (`list[dict]`): rows of `metrics.jsonl`.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    schedule: PhaseSchedule
    metrics: list[dict[str, Any]]

    @property
    def updates(self) -> pd.DataFrame:
        """Training logs as rows: reward, entropies, lengths and others by rollout batch."""
        return pd.DataFrame([row for row in self.metrics if "rollout_batch" in row])

    @property
    def dynamics(self) -> pd.DataFrame | None:
        """The probes' series (figs. 4, 5 and 7), or None without probes."""
        path = self.folder / DYNAMICS_FILE
        return read_parquet(path) if path.exists() else None


class RunMetadataCallback(TrainerCallback):
    """Writes the run's options and provenance when training begins, so that a refused run leaves no file.

    Args:
        command (`str`): `train` or `demo`.
        options (`dict`): content of `config.yaml`.
        objects (`list[str]`, *optional*): names of arguments that came from Python and cannot be written.
    """

    def __init__(self, command: str, options: dict[str, Any], objects: Sequence[str] = ()):
        self.metadata = (command, options, objects)
        self.input_metadata: dict[str, Any] = {}  # of problems and weights, once they are loaded

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            record_run(args.output_dir, *self.metadata, self.input_metadata)


@dataclass
class RunSpec:
    """All inputs of a training run. Rewards, model configuration, tokenizer and problems are loaded once, on first use.

    Attributes:
        model (`str` or `PreTrainedModel`): the model or its name.
        config ([`~bupo.BuPOConfig`]), options ([`TrainOptions`]), loading (`ModelConfig`): of the run.
        custom_tokenizer, custom_problems, custom_eval_problems, custom_rewards (*optional*): objects passed from Python.
        callbacks (`list[TrainerCallback]`): of the trainer.
        log (`Callable`): receives a line of progress.
    """

    model: str | PreTrainedModel
    config: BuPOConfig
    options: TrainOptions
    loading: ModelConfig
    custom_tokenizer: PreTrainedTokenizerBase | None
    custom_problems: Dataset | None
    custom_eval_problems: Dataset | None
    custom_rewards: RewardFunc | Sequence[RewardFunc] | None
    callbacks: Sequence[TrainerCallback]
    log: Callable[[str], None]

    @cached_property
    def rewards(self) -> list[RewardFunc]:
        return as_list(self.custom_rewards) or [load_reward_func(name) for name in self.options.reward_names]

    @property
    def pretrained_kwargs(self) -> dict[str, Any]:
        return get_pretrained_kwargs(self.config, self.loading)

    @cached_property
    def model_config(self) -> PretrainedConfig:
        return load_config(self.model, **self.pretrained_kwargs) if isinstance(self.model, str) else self.model.config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the chat template of the options."""
        if isinstance(self.model, str):
            tokenizer = load_tokenizer(self.model, self.model_config, **self.pretrained_kwargs)
        elif self.custom_tokenizer is None:
            raise UserError("tokenizer is not set: a loaded model needs its tokenizer")
        else:
            tokenizer = copy.deepcopy(self.custom_tokenizer)  # which gets a template
        self.log(describe_chat_template(tokenizer, self.options.chat_template))
        return tokenizer

    @cached_property
    def data(self) -> TrainData:
        data = load_train_data(self.options, self.config, self.custom_problems, self.custom_eval_problems, self.rewards)
        return data.prepare_prompts(self.options, self.config, self.tokenizer, self.log)


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
    metadata: RunMetadataCallback | None = None,
    title: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> TrainingRun:
    """Train a model by BuPO, or by the methods that it is compared with, into the folder `config.output_dir`.

    Args:
        model (`str` or `PreTrainedModel`): a name as for [`load_model`], or a loaded model with its `tokenizer`.
        config ([`BuPOConfig`]): options of the training.
        options ([`TrainOptions`], *optional*): problems, chat template and rewards.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a loaded model.
        problems, eval_problems (`Dataset`), reward_funcs (`list`, *optional*): instead of those that `options` names.
        loading (`ModelConfig`, *optional*): TRL's options of dtype, revision, attention, quantization and PEFT.
        callbacks (`list[TrainerCallback]`, *optional*): of the trainer.
        metadata ([`RunMetadataCallback`], *optional*): content of `config.yaml`; by default the changed options.
        title (`str`, *optional*): above the figures; by default the folder's name.
        log (`Callable`, *optional*): receives a line of progress.

    Raises:
        UserError: for a value that is refused, before anything is written.
        Stopped: after a signal, with a checkpoint written.
    """
    config, options, loading = copy.copy(config), options or TrainOptions(), loading or ModelConfig()
    metadata = metadata or _make_metadata_callback(
        model, config, options, loading, (problems, eval_problems, reward_funcs)
    )
    run = RunSpec(
        model, config, options, loading, tokenizer, problems, eval_problems, reward_funcs, [metadata, *callbacks], log
    )
    check_run_options(run)
    with folder_lock(config.output_dir):
        checkpoint, finished = prepare_run_directory(config, options.overwrite, log)
        check_run_inputs(run)
        loaded = _load_policy(run)
        metadata.input_metadata = {
            "problems": run.data.get_metadata(options),
            "weights": compute_weight_fingerprint(loaded),
        }
        trainer = _make_trainer(run, loaded)
        if finished:
            return _load_finished_run(trainer, finished, log)
        return _train_and_save(trainer, checkpoint, title, log)


def check_run_options(run: RunSpec) -> None:
    """Check all options that need neither the model nor the problems.

    Raises:
        UserError: for the first option that is refused.
    """
    run.options.check()
    check_output_folder("output", run.config.output_dir)
    check_resumable(run.config)
    dry_run_components(run.config, run.loading)
    check_rewards(run.rewards, run.config)
    names = [getattr(reward, "__name__", None) for reward in run.rewards]
    check_best_metric(run.config, run.rewards, names, run.callbacks)


def check_run_inputs(run: RunSpec) -> None:
    """Load and check the model's configuration, the tokenizer and the problems, before any weights are loaded.

    Raises:
        UserError: for the first input that is refused.
    """
    if isinstance(run.model, str):
        check_reference_model(run.model, run.config)
        check_layers(run.model, run.model_config, run.config)
    tokenizer = run.tokenizer  # loaded before the problems, which may take longer
    check_prompts(run.data.train, tokenizer, run.model_config, run.config)


def _make_metadata_callback(
    model: Any, config: BuPOConfig, options: TrainOptions, loading: ModelConfig, objects: tuple
) -> RunMetadataCallback:
    """Return the callback with the options that differ from their defaults, as `bupo train --config` accepts them."""
    defaults = BuPOConfig("", internal_layer=1).to_dict() | {"internal_layer": None}
    derived = ("generation_batch_size", "logging_dir")  # from steps_per_generation and the folder
    changed = {
        name: value for name, value in config.to_dict().items() if value != defaults.get(name) and name not in derived
    }
    model_name = {"model_name_or_path": model} if isinstance(model, str) else {}
    written = get_changed_options(loading) | model_name | changed | get_changed_options(options)
    from_python = zip(PYTHON_ONLY_ARGUMENTS, (*objects, None if model_name else model), strict=True)
    return RunMetadataCallback("train", written, sorted(name for name, value in from_python if value is not None))


def _load_policy(run: RunSpec) -> PreTrainedModel:
    """Load the model by name, or return the loaded one. TRL loads the reference of a KL penalty at the same revision."""
    if not isinstance(run.model, str):
        return run.model
    kwargs = {
        "dtype": run.loading.dtype or "float32",  # TRL's default: the weights train in fp32
        "attn_implementation": run.loading.attn_implementation,
        "quantization_config": get_quantization_config(run.loading),
        **run.pretrained_kwargs,
        **(run.config.model_init_kwargs or {}),
    }
    model = load_model(run.model, run.model_config, **kwargs)
    run.config.model_init_kwargs = {"revision": run.loading.model_revision} if run.config.beta != 0 else None
    return model


def _make_trainer(run: RunSpec, model: PreTrainedModel) -> BuPOTrainer:
    """Return the trainer of a run. Errors by which TRL refuses an argument become [`UserError`]."""
    config = run.config
    config.chat_template_kwargs = get_template_kwargs(run.tokenizer) | (config.chat_template_kwargs or {})
    with wrap_library_errors(str, ValueError, TypeError, ImportError, RuntimeError, OSError):
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=run.rewards,
            args=config,
            train_dataset=run.data.train,
            eval_dataset=run.data.eval_problems,
            processing_class=run.tokenizer,
            callbacks=[MetricsFileCallback(config.output_dir), *run.callbacks],
            benchmarks=run.data.benchmarks,
            peft_config=get_peft_config(run.loading),
        )
    check_trainable(trainer)  # before any file of the folder is replaced
    trainer.system_prompt, trainer.dataset_name = run.data.system_prompt, run.data.name
    for default_callback in (PrinterCallback, ProgressCallback):  # the run's own callbacks print
        trainer.remove_callback(default_callback)
    if notice := describe_short_run(config):
        run.log(notice)
    return trainer


def _train_and_save(
    trainer: BuPOTrainer, checkpoint: str | None, title: str | None, log: Callable[[str], None]
) -> TrainingRun:
    """Train, and save the model, its tokenizer, its model card and the figures into the run directory."""
    folder = Path(trainer.args.output_dir)

    def describe_current_batch() -> str:
        return trainer.describe_rollout_batch(trainer.last_rollout_batch)

    if checkpoint is None:
        log(f"run {folder}: sampling the first rollout batch")
    with wrap_write_errors(folder), graceful_shutdown(trainer, log):
        if checkpoint:
            check_same_run(trainer, Path(checkpoint), trainer.accelerator.print)
        if trainer.is_world_process_zero():
            for name in EXTERNAL_FOLDERS:
                refuse_links(folder / name, folder)
            clear_run_directory(
                folder, checkpoint
            )  # files of a run to overwrite, or of one stopped before a checkpoint
            if get_resume_option(trainer.args):
                resume_tensorboard(trainer.callback_handler.callbacks, folder, get_global_step(checkpoint))
        refusals = wrap_library_errors(
            lambda error: f"{describe_current_batch()}: {summarize_error(error)}", *REFUSAL_ERRORS
        )
        with refusals, failure_messages.wrap_training_errors(describe_current_batch):
            trainer.train_from_checkpoint(checkpoint)
        if checkpoint and trainer.resumed_at_step >= trainer.state.max_steps:
            log(f"the run is finished: all {trainer.resumed_at_step} updates are done, nothing more is trained")
        trainer.save_model_atomically(folder)
        rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
        schedule = trainer.phase_controller.schedule
        if trainer.is_world_process_zero():
            draw_figures(folder, rows, title or folder.name)
            if trainer.state.global_step >= trainer.state.max_steps:  # a stopped run is resumed later
                mark_finished(trainer.args, trainer.state.global_step, schedule, get_resume_options(trainer))
    return TrainingRun(folder, trainer.model, trainer.processing_class, schedule, rows)


def _load_finished_run(trainer: BuPOTrainer, finished: dict[str, Any], log: Callable[[str], None]) -> TrainingRun:
    """Return a resumed run that has no update left, as its folder holds it.

    Raises:
        UserError: if it was trained with other options.
    """
    folder, model = Path(trainer.args.output_dir), trainer.model
    with graceful_shutdown(trainer, log):
        check_same_schedule(finished["planned"], trainer.args.phase_schedule, folder)
        check_resume_options(trainer, finished["options"], folder, lambda line: None)
        log(f"the run is finished: {folder} holds all of it, nothing more is trained")
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)
        else:
            model = load_model(str(folder), dtype=model.dtype, trust_remote_code=trainer.args.trust_remote_code)
        rows = read_metrics(folder / METRICS_FILE)
    return TrainingRun(folder, model, trainer.processing_class, PhaseSchedule.load(finished["schedule"]), rows)
