"""What to change where a run does not fit a device: each change with what it leaves, computed like the plan itself."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bupo.planning.memory import HALF, memory, syncs_each_batch
from bupo.planning.planned_run import Setting, Target

STEP = 0.05  # of vLLM's share of a device
ROOM = 1.1  # of what vLLM's weights and one answer take: its own activations
MOST_GPUS = 1024


@dataclass(frozen=True)
class Change:
    """Options, and the bytes of a device with them."""

    options: str
    bytes: float


@dataclass(frozen=True)
class Advice:
    """Of a run that does not fit.

    Attributes:
        each (`list[Change]`): changes that help, each alone.
        together (`list[Change]`): one after another until the run fits; empty where all of them do not suffice.
        gpus (`Change`, *optional*): the fewest GPUs on which the run fits, all changes made, where fewer are too small.
    """

    each: list[Change]
    together: list[Change]
    gpus: Change | None


def advice_for(setting: Setting, targets: Sequence[Target]) -> Advice:
    """Try what may help, what costs least first.

    Args:
        setting ([`Setting`]): too large for its devices.
        targets (`list[Target]`): what the run optimises.
    """
    before, most = needed(setting, targets), setting.on.memory
    each = [Change(text, needed(new, targets)) for text, new in changes(setting)]
    together: list[Change] = []
    now, size = setting, before
    while size > most:
        better = next(((text, new) for text, new in changes(now) if needed(new, targets) < size), None)
        if better is None:
            break
        text, now = better
        size = needed(now, targets)
        option = text.split()[0]  # a smaller batch takes the place of a small one
        together = [change for change in together if change.options.split()[0] != option] + [Change(text, size)]
    gpus = None if size <= most else _more_gpus(now, targets)
    return Advice([change for change in each if change.bytes < before], together if size <= most or gpus else [], gpus)


def needed(setting: Setting, targets: Sequence[Target]) -> float:
    """Bytes of a device at the fullest moment of a run."""
    return max(memory(setting, *target).bytes for target in targets)


def changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Those that this run has not made yet. None changes what is learned but the optimizer in 8 bits and a shared critic."""
    config, on = setting.config, setting.on
    if on.gpus > 1 and on.shared != "fsdp2":
        yield (
            "sharding fsdp2 (accelerate launch --config_file recipes/accelerate/fsdp2.yaml)",
            setting.changed({"sharding": "fsdp2"}),
        )
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing true", setting.changed(gradient_checkpointing=True)
    if on.shared == "fsdp2" and setting.accumulates and not syncs_each_batch(setting):
        yield from _synced(setting)
    if config.use_vllm and config.vllm_mode == "colocate":
        yield from _vllm(setting)
    if config.per_device_train_batch_size > 1:
        yield _smaller_batches(setting)
    if setting.copied_critic:
        yield "critic_backbone shared (another critic)", setting.changed(critic_backbone="shared")
    if config.optim.value.startswith("adamw_torch"):
        eight = type(config.optim)("adamw_8bit")
        yield "optim adamw_8bit (bitsandbytes; moments of 8 bits)", setting.changed(optim=eight)


def _synced(setting: Setting) -> Iterator[tuple[str, Setting]]:
    given = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    new = setting.changed(accelerator_config=replace(setting.config.accelerator_config, **given))
    yield f"accelerator_config '{json.dumps(given)}' (gradients are reduced at each micro-batch)", new


def _vllm(setting: Setting) -> Iterator[tuple[str, Setting]]:
    config = setting.config
    if not config.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode true", setting.changed(vllm_enable_sleep_mode=True)
    parts = config.vllm_tensor_parallel_size
    least = (
        ROOM * (HALF * setting.sizes.weights + setting.longest.row * setting.cache_bytes) / parts / setting.on.memory
    )
    share = round(STEP * math.ceil(least / STEP), 2)
    if share < config.vllm_gpu_memory_utilization:
        text = f"vllm_gpu_memory_utilization {share:g} (sampling takes more turns)"
        yield text, setting.changed(vllm_gpu_memory_utilization=share)


def _smaller_batches(setting: Setting) -> tuple[str, Setting]:
    """As many answers an update, in more passes."""
    config = setting.config
    size = config.per_device_train_batch_size
    smaller = next(part for part in range(size // 2, 0, -1) if size % part == 0)
    options = {
        "per_device_train_batch_size": smaller,
        "gradient_accumulation_steps": config.gradient_accumulation_steps * (size // smaller),
        "steps_per_generation": config.steps_per_generation * (size // smaller),
    }
    text = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"{text} (as many answers an update)", setting.changed(**options)


def _more_gpus(setting: Setting, targets: Sequence[Target]) -> Change | None:
    """Twice as many until the run fits; an update's answers are then shared by more."""
    gpus = setting.on.gpus
    while 1 <= gpus < MOST_GPUS:
        gpus *= 2
        size = needed(setting.changed({"gpus": gpus, "sharding": "fsdp2"}), targets)
        if size <= setting.on.memory:
            return Change(f"{gpus} GPUs, sharding fsdp2", size)
    return None
