"""What a run may change when it goes on, and what it may not.

A checkpoint's `options.json` keeps what decides the numbers of a run. On resuming, an option that differs is one of three:

- of no account for what is trained (`affects_training`: how often is logged, saved, evaluated and probed, where to, on which
  machine): it holds from there on, without a word;
- taken over (`TAKEN`): the learning rates and `max_grad_norm` hold from there on, and are said; `max_steps` and
  `num_train_epochs` hold. The learning rate is that of the same schedule over the new rate and length, at the update where the
  run stands;
- refused, whatever else it is, the kind of schedule and its warmup too: by one line with the option and both values. Also
  options that are not known here yet.

Problems are told by their content, not by the names of their files; the chat template and the model likewise; rewards by where
they are defined. A finished run keeps the same in `finished.json`, and is compared as well. The first phase and the cut of a
rollout batch into micro-batches are compared by [`~bupo.training.checkpoints.trainer_state.load_state`].
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
from bupo.training.objective.phases import PhaseSchedule
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.errors import UserError
from bupo.utils.files import write_json

OPTIONS_FILE = "options.json"
CHANGEABLE_OPTIONS = ("learning_rate", "critic_learning_rate", "max_grad_norm", "max_steps", "num_train_epochs")
ADAPTIVE_SCHEDULERS = (
    "reduce_lr_on_plateau",
    "greedy",
)  # schedules whose rate is their state: a new one would not take effect
# options that shape rollout batches or the first phase, which `trainer_state.load_state` compares
SEPARATELY_COMPARED_OPTIONS = (
    *("internal_layer", "internal_steps", "internal_schedule", "per_device_train_batch_size"),
    *("steps_per_generation", "gradient_accumulation_steps", "generation_batch_size"),
)


def _affects_training(name: str) -> bool:
    return affects_training(name) and name not in SEPARATELY_COMPARED_OPTIONS


def get_resume_options(trainer: GRPOTrainerHooks) -> dict[str, Any]:
    """What decides the numbers of a run, by name, as JSON knows it."""
    args = trainer.args
    found = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if _affects_training(f.name)}
    found |= trainer.given
    if (
        args.has_auxiliary_objective and not args.first_phase.stages
    ):  # else the first phase is compared, which holds the layer
        found["internal_layer"] = args.internal_layer
    found["chat_template"] = _hash_json(getattr(trainer.processing_class, "chat_template", None))
    found["reward_funcs"] = list(map(_get_reward_name, trainer.reward_funcs, trainer.reward_func_names))
    found["answers a rollout batch"] = args.generation_batch_size
    return json.loads(json.dumps(drop_secrets(found), default=_to_json_value))


def fingerprint_inputs(trainer: GRPOTrainerHooks) -> dict[str, Any]:
    """What decides a run of its problems, by content, and of its model, as it is before it is trained, sharded or cast.

    Weights that no checkpoint holds are told by some of their values: those below an adapter, and a reference model's that
    stays. Under FSDP, processes do not hold them alike.
    """
    model, config = trainer.model, trainer.model.config
    whole = not trainer.is_fsdp_enabled
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    found: dict[str, Any] = {"problems": _describe_problems(trainer.train_dataset)}
    found["model"] = f"{config.model_type}, {sizes[0]} layers of {sizes[1]}, {sizes[2]} tokens, {model.dtype}"
    adapters = getattr(model, "peft_config", {})
    found["adapters"] = sorted(adapters)
    for adapter, peft in adapters.items():
        own = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias", "modules_to_save")
        found |= {f"{adapter} adapter's {name}": getattr(peft, name, None) for name in own}
    if adapters and whole:
        found["the base model's weights"] = compute_weight_fingerprint(model, without=adapters)
    if trainer.ref_model is not None and not trainer.args.sync_ref_model and whole:
        found["the reference model's weights"] = compute_weight_fingerprint(trainer.ref_model)
    return found


def _get_reward_name(function: Any, name: str) -> str:
    return f"{function.__module__}.{function.__qualname__}" if inspect.isfunction(function) else name


def _to_json_value(value: Any) -> Any:
    return (
        sorted(map(str, value)) if isinstance(value, set | frozenset | tuple) else str(getattr(value, "value", value))
    )


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:12]


def _describe_problems(problems: Any) -> str:
    """Problems by their number and their checksum, which `run.json` notes too."""
    try:
        number = len(problems)
    except TypeError:  # a stream's cannot be looked at without taking from it
        return type(problems).__name__
    return f"{number} problems, SHA-256 {compute_problems_sha256(problems)}"


def check_same_schedule(before: list, planned: PhaseSchedule, folder: Path) -> None:
    """Raises [`UserError`] unless the first phase that the options ask for is that of before, which `folder` keeps."""
    try:
        former = PhaseSchedule.load(before)
    except PARSE_ERRORS as error:
        raise UserError(f"{folder} is damaged: its first phase cannot be read ({error}); go on from another") from error
    if former != planned:
        raise UserError(
            f"{folder} was made with the first phase {former}, the options say {planned}: go on with the same"
        )


def write_options(trainer: GRPOTrainerHooks, folder: Path) -> None:
    """Keep in a checkpoint what decides the run."""
    write_json(folder / OPTIONS_FILE, get_resume_options(trainer))


def check_checkpoint_options(trainer: GRPOTrainerHooks, folder: Path, say: Callable[[str], None]) -> None:
    """Hold a run's options against those of the checkpoint that it goes on from, if that keeps any.

    Raises:
        UserError: for one that would change the run and is not taken over.
    """
    if not os.path.lexists(folder / OPTIONS_FILE):
        return
    check_resume_options(trainer, read_json(folder / OPTIONS_FILE), folder, say)


def check_resume_options(
    trainer: GRPOTrainerHooks, before: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> None:
    """Hold a run's options against those that decided it `before`, as its `folder` or checkpoint keeps them.

    Raises:
        UserError: for one that would change the run and is not taken over.
    """
    now = get_resume_options(trainer)
    adaptive = getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type) in ADAPTIVE_SCHEDULERS
    for name in now:
        if name not in before or before[name] == now[name]:
            continue
        if name in CHANGEABLE_OPTIONS and not (adaptive and name == "learning_rate"):
            if name not in ("max_steps", "num_train_epochs"):
                say(f"{name} is {now[name]} from here on; it was {before[name]}")
            continue
        raise UserError(
            f"{name} is {now[name]}, but {before[name]} in {folder}: a run goes on with the same; choose another output "
            "to start one that differs"
        )
