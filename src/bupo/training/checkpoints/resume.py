"""Comparison of a resumed run's options and inputs with those of its checkpoint.

`options.json` in a checkpoint holds the options that decide the numbers of a run. An option that differs when the run
is resumed belongs to one of three kinds:

- It does not affect training (`affects_training` is false: logging, saving, evaluation, probes, output, hardware). The new
  value applies.
- It may change (`CHANGEABLE_OPTIONS`). New learning rates and a new `max_grad_norm` apply and are printed, and so do
  `max_steps` and `num_train_epochs`. The learning rate follows the same schedule over the new rate and length, at the
  run's update.
- Any other option, also an unknown one and the kind and warmup of the schedule, is refused with one line that holds
  both values.

Problems, chat template and model are compared by content, rewards by where they are defined. A finished run keeps the
same values in `finished.json`. [`~bupo.training.checkpoints.trainer_state.load_state`] compares the first phase and the
micro-batches.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bupo.data.problems import compute_problems_sha256
from bupo.models.loading import compute_weight_fingerprint
from bupo.options.training import affects_training
from bupo.run_files.provenance import drop_secrets
from bupo.run_files.reading import PARSE_ERRORS, read_json
from bupo.training.callbacks.best_metric import ADAPTIVE_SCHEDULERS
from bupo.training.objective.phases import PhaseSchedule
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.errors import UserError
from bupo.utils.files import write_json

OPTIONS_FILE = "options.json"
CHANGEABLE_OPTIONS = ("learning_rate", "critic_learning_rate", "max_grad_norm", "max_steps", "num_train_epochs")
# options that shape rollout batches or the first phase, which `trainer_state.load_state` compares
SEPARATELY_COMPARED_OPTIONS = (
    *("internal_layer", "internal_steps", "internal_schedule", "per_device_train_batch_size"),
    *("steps_per_generation", "gradient_accumulation_steps", "generation_batch_size"),
)


def _affects_training(name: str) -> bool:
    return affects_training(name) and name not in SEPARATELY_COMPARED_OPTIONS


def get_resume_options(trainer: GRPOTrainerHooks) -> dict[str, Any]:
    """Return the options and inputs that decide the numbers of a run, by name, as JSON values."""
    args = trainer.args
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if _affects_training(f.name)}
    options |= trainer.input_fingerprint
    if (
        args.has_auxiliary_objective and not args.phase_schedule.stages
    ):  # a first phase, which holds the layer, is compared
        options["internal_layer"] = args.internal_layer
    template = getattr(trainer.processing_class, "chat_template", None)
    options["chat_template"] = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:12]
    options["reward_funcs"] = list(map(_get_reward_name, trainer.reward_funcs, trainer.reward_func_names))
    options["completions per rollout batch"] = args.generation_batch_size
    return json.loads(json.dumps(drop_secrets(options), default=_to_json_value))


def fingerprint_inputs(trainer: GRPOTrainerHooks) -> dict[str, Any]:
    """Return a description of the problems, by content, and of the model before it is trained, sharded or cast.

    Weights that are not in the checkpoint are identified by some of their values: the base model's below an adapter,
    and those of a fixed reference model. They are left out under FSDP, where processes hold different parts.
    """
    model, config = trainer.model, trainer.model.config
    layers, width, vocabulary = (
        getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    adapters = getattr(model, "peft_config", {})
    fingerprint: dict[str, Any] = {
        "problems": _describe_problems(trainer.train_dataset),
        "model": f"{config.model_type}, {layers} layers of {width}, {vocabulary} tokens, {model.dtype}",
        "adapters": sorted(adapters),
    }
    settings = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "use_dora",
        "bias",
        "modules_to_save",
    )
    for adapter, peft_config in adapters.items():
        fingerprint |= {f"{adapter} adapter's {name}": getattr(peft_config, name, None) for name in settings}
    if trainer.is_fsdp_enabled:
        return fingerprint
    if adapters:
        fingerprint["the base model's weights"] = compute_weight_fingerprint(model, without=adapters)
    if trainer.ref_model is not None and not trainer.args.sync_ref_model:
        fingerprint["the reference model's weights"] = compute_weight_fingerprint(trainer.ref_model)
    return fingerprint


def _get_reward_name(function: Any, name: str) -> str:
    return f"{function.__module__}.{function.__qualname__}" if inspect.isfunction(function) else name


def _to_json_value(value: Any) -> Any:
    """Return a set in a fixed order, an enum by its value, and anything else as text."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(getattr(value, "value", value))


def _describe_problems(problems: Any) -> str:
    """Return the number of problems and the checksum that `run.json` holds too."""
    try:
        number = len(problems)
    except TypeError:  # rows of a stream cannot be read without using them up
        return type(problems).__name__
    return f"{number} problems, SHA-256 {compute_problems_sha256(problems)}"


def check_same_schedule(saved: list, planned: PhaseSchedule, folder: Path) -> None:
    """Refuse a run whose first phase differs from the one that its folder or checkpoint holds.

    Args:
        saved (`list`): the state of the earlier schedule.
        planned ([`~bupo.training.objective.phases.PhaseSchedule`]): the schedule that the options set.
        folder (`Path`): of the earlier schedule, for messages.

    Raises:
        UserError: with both schedules.
    """
    try:
        schedule = PhaseSchedule.load(saved)
    except PARSE_ERRORS as error:
        raise UserError(
            f"{folder} is damaged: its first phase cannot be read ({error}); resume from another checkpoint"
        ) from error
    if schedule != planned:
        raise UserError(
            f"{folder} was made with the first phase {schedule}, and the options set {planned}: resume with the same one"
        )


def write_options(trainer: GRPOTrainerHooks, folder: Path) -> None:
    """Write the options that decide a run into a checkpoint."""
    write_json(folder / OPTIONS_FILE, get_resume_options(trainer))


def check_checkpoint_options(trainer: GRPOTrainerHooks, folder: Path, log: Callable[[str], None]) -> None:
    """Compare a run's options with those of its checkpoint. Checkpoints of other trainers have none.

    Raises:
        UserError: for an option that would change the run.
    """
    if os.path.lexists(folder / OPTIONS_FILE):
        check_resume_options(trainer, read_json(folder / OPTIONS_FILE), folder, log)


def check_resume_options(
    trainer: GRPOTrainerHooks, saved: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> None:
    """Compare a run's options with those that its folder or checkpoint holds.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): of the resumed run.
        saved (`dict[str, Any]`): the earlier result of [`get_resume_options`].
        folder (`Path`): that holds `saved`, for messages.
        say (`Callable`): prints a line about an option that changes.

    Raises:
        UserError: for an option that would change the run.
    """
    options = get_resume_options(trainer)
    scheduler = getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type)
    changeable = set(CHANGEABLE_OPTIONS)
    if scheduler in ADAPTIVE_SCHEDULERS:  # their state holds the rate: a new one would not take effect
        changeable.remove("learning_rate")
    for name, value in options.items():
        if name not in saved or saved[name] == value:
            continue
        if name not in changeable:
            raise UserError(
                f"{name} is {value}, but {saved[name]} in {folder}: resume with the same value, or choose another output to "
                "start a different run"
            )
        if name not in ("max_steps", "num_train_epochs"):
            say(f"{name} changes from {saved[name]} to {value}")
