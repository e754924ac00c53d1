"""What to change where a run does not fit a device: each change with what it leaves, computed like the plan itself."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bupo.planning.memory import HALF_BYTES, compute_peak_memory, has_sync_each_batch
from bupo.planning.planned_run import PhaseTarget, PlannedRun

VLLM_SHARE_STEP = 0.05  # of vLLM's share of a device
VLLM_HEADROOM = 1.1  # of what vLLM's weights and one answer take: its own activations
MAX_GPUS = 1024


@dataclass(frozen=True)
class OptionChange:
    """Options, and the bytes of a device with them."""

    options: str
    bytes: float


@dataclass(frozen=True)
class MemoryAdvice:
    """Of a run that does not fit.

    Attributes:
        each (`list[Change]`): changes that help, each alone.
        together (`list[Change]`): one after another until the run fits; empty where all of them do not suffice.
        gpus (`Change`, *optional*): the fewest GPUs on which the run fits, all changes made, where fewer are too small.
    """

    single_changes: list[OptionChange]
    combined_changes: list[OptionChange]
    gpus: OptionChange | None


def suggest_changes(setting: PlannedRun, targets: Sequence[PhaseTarget]) -> MemoryAdvice:
    """Try what may help, what costs least first.

    Args:
        setting ([`PlannedRun`]): too large for its devices.
        targets (`list[Target]`): what the run optimises.
    """
    before, most = compute_peak_bytes(setting, targets), setting.hardware.device_bytes
    each = [OptionChange(text, compute_peak_bytes(new, targets)) for text, new in propose_changes(setting)]
    together: list[OptionChange] = []
    now, size = setting, before
    while size > most:
        better = next(
            ((text, new) for text, new in propose_changes(now) if compute_peak_bytes(new, targets) < size), None
        )
        if better is None:
            break
        text, now = better
        size = compute_peak_bytes(now, targets)
        option = text.split()[0]  # a smaller batch takes the place of a small one
        together = [change for change in together if change.options.split()[0] != option] + [OptionChange(text, size)]
    gpus = None if size <= most else _find_sufficient_gpus(now, targets)
    return MemoryAdvice(
        [change for change in each if change.bytes < before], together if size <= most or gpus else [], gpus
    )


def compute_peak_bytes(setting: PlannedRun, targets: Sequence[PhaseTarget]) -> float:
    """Bytes of a device at the fullest moment of a run."""
    return max(compute_peak_memory(setting, *target).bytes for target in targets)


def propose_changes(setting: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    """Those that this run has not made yet. None changes what is learned but the optimizer in 8 bits and a shared critic."""
    config, on = setting.config, setting.hardware
    if on.gpus > 1 and on.resolved_sharding != "fsdp2":
        yield (
            "sharding fsdp2 (accelerate launch --config_file recipes/accelerate/fsdp2.yaml)",
            setting.with_options({"sharding": "fsdp2"}),
        )
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing true", setting.with_options(gradient_checkpointing=True)
    if on.resolved_sharding == "fsdp2" and setting.is_accumulating and not has_sync_each_batch(setting):
        yield from _propose_gradient_sync(setting)
    if config.use_vllm and config.vllm_mode == "colocate":
        yield from _propose_vllm_changes(setting)
    if config.per_device_train_batch_size > 1:
        yield _propose_smaller_batches(setting)
    if setting.has_copied_critic:
        yield "critic_backbone shared (another critic)", setting.with_options(critic_backbone="shared")
    if config.optim.value.startswith("adamw_torch"):
        eight = type(config.optim)("adamw_8bit")
        yield "optim adamw_8bit (bitsandbytes; moments of 8 bits)", setting.with_options(optim=eight)


def _propose_gradient_sync(setting: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    given = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    new = setting.with_options(accelerator_config=replace(setting.config.accelerator_config, **given))
    yield f"accelerator_config '{json.dumps(given)}' (gradients are reduced at each micro-batch)", new


def _propose_vllm_changes(setting: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    config = setting.config
    if not config.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode true", setting.with_options(vllm_enable_sleep_mode=True)
    parts = config.vllm_tensor_parallel_size
    least = (
        VLLM_HEADROOM
        * (HALF_BYTES * setting.sizes.weights + setting.max_lengths.total * setting.kv_cache_bytes)
        / parts
        / setting.hardware.device_bytes
    )
    share = round(VLLM_SHARE_STEP * math.ceil(least / VLLM_SHARE_STEP), 2)
    if share < config.vllm_gpu_memory_utilization:
        text = f"vllm_gpu_memory_utilization {share:g} (sampling takes more turns)"
        yield text, setting.with_options(vllm_gpu_memory_utilization=share)


def _propose_smaller_batches(setting: PlannedRun) -> tuple[str, PlannedRun]:
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
    return f"{text} (as many answers an update)", setting.with_options(**options)


def _find_sufficient_gpus(setting: PlannedRun, targets: Sequence[PhaseTarget]) -> OptionChange | None:
    """Twice as many until the run fits; an update's answers are then shared by more."""
    gpus = setting.hardware.gpus
    while 1 <= gpus < MAX_GPUS:
        gpus *= 2
        size = compute_peak_bytes(setting.with_options({"gpus": gpus, "sharding": "fsdp2"}), targets)
        if size <= setting.hardware.device_bytes:
            return OptionChange(f"{gpus} GPUs, sharding fsdp2", size)
    return None
