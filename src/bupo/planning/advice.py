"""Changes that make a run fit its devices, each with the memory it leads to, computed like the plan itself."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bupo.planning.memory import HALF_BYTES, compute_peak_memory, has_sync_each_batch
from bupo.planning.planned_run import PhaseTarget, PlannedRun

VLLM_SHARE_STEP = 0.05  # step of `vllm_gpu_memory_utilization`
VLLM_HEADROOM = 1.1  # factor on the weights and one answer, for vLLM's activations
MAX_GPUS = 1024


@dataclass(frozen=True)
class OptionChange:
    """Changed options and the peak bytes of a device with them."""

    options: str
    bytes: float


@dataclass(frozen=True)
class MemoryAdvice:
    """Changes for a run that does not fit its devices.

    Attributes:
        single_changes (`list[OptionChange]`): changes that help, each applied alone.
        combined_changes (`list[OptionChange]`): changes applied one after another until the run fits; empty if all of them
            together are not enough.
        gpus (`OptionChange`, *optional*): the smallest number of GPUs on which the run fits with all changes, if more are
            needed.
    """

    single_changes: list[OptionChange]
    combined_changes: list[OptionChange]
    gpus: OptionChange | None


def suggest_changes(run: PlannedRun, targets: Sequence[PhaseTarget]) -> MemoryAdvice:
    """Try the changes that may help, the cheapest first.

    Args:
        run ([`PlannedRun`]): a run that is too large for its devices.
        targets (`list[PhaseTarget]`): the policies that the run optimises.
    """
    initial_bytes, limit = compute_peak_bytes(run, targets), run.hardware.device_bytes
    single = [OptionChange(text, compute_peak_bytes(changed, targets)) for text, changed in propose_changes(run)]
    combined: list[OptionChange] = []
    current, size = run, initial_bytes
    while size > limit:
        better = next(
            (
                (text, changed)
                for text, changed in propose_changes(current)
                if compute_peak_bytes(changed, targets) < size
            ),
            None,
        )
        if better is None:
            break
        text, current = better
        size = compute_peak_bytes(current, targets)
        option = text.split()[0]  # a second change of the same option replaces the first
        combined = [change for change in combined if change.options.split()[0] != option] + [OptionChange(text, size)]
    gpus = None if size <= limit else _find_sufficient_gpus(current, targets)
    return MemoryAdvice(
        [change for change in single if change.bytes < initial_bytes], combined if size <= limit or gpus else [], gpus
    )


def compute_peak_bytes(run: PlannedRun, targets: Sequence[PhaseTarget]) -> float:
    """Return the peak bytes of a device over all phases of a run."""
    return max(compute_peak_memory(run, *target).bytes for target in targets)


def propose_changes(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    """Yield the changes that this run does not use yet.

    Only the 8-bit optimizer and the shared critic change the result of the training.
    """
    config, hardware = run.config, run.hardware
    if hardware.gpus > 1 and hardware.resolved_sharding != "fsdp2":
        yield (
            "sharding fsdp2 (accelerate launch --config_file recipes/accelerate/fsdp2.yaml)",
            run.with_options({"sharding": "fsdp2"}),
        )
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing true", run.with_options(gradient_checkpointing=True)
    if hardware.resolved_sharding == "fsdp2" and run.is_accumulating and not has_sync_each_batch(run):
        yield from _propose_gradient_sync(run)
    if config.use_vllm and config.vllm_mode == "colocate":
        yield from _propose_vllm_changes(run)
    if config.per_device_train_batch_size > 1:
        yield _propose_smaller_batches(run)
    if run.has_copied_critic:
        yield "critic_backbone shared (another critic)", run.with_options(critic_backbone="shared")
    if config.optim.value.startswith("adamw_torch"):
        optimizer = type(config.optim)("adamw_8bit")
        yield "optim adamw_8bit (bitsandbytes; moments of 8 bits)", run.with_options(optim=optimizer)


def _propose_gradient_sync(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    kwargs = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    changed = run.with_options(accelerator_config=replace(run.config.accelerator_config, **kwargs))
    yield f"accelerator_config '{json.dumps(kwargs)}' (gradients are reduced at each micro-batch)", changed


def _propose_vllm_changes(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    config = run.config
    if not config.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode true", run.with_options(vllm_enable_sleep_mode=True)
    num_shards = config.vllm_tensor_parallel_size
    min_share = (
        VLLM_HEADROOM
        * (HALF_BYTES * run.sizes.weights + run.max_lengths.total * run.kv_cache_bytes)
        / num_shards
        / run.hardware.device_bytes
    )
    share = round(VLLM_SHARE_STEP * math.ceil(min_share / VLLM_SHARE_STEP), 2)
    if share < config.vllm_gpu_memory_utilization:
        text = f"vllm_gpu_memory_utilization {share:g} (sampling takes more turns)"
        yield text, run.with_options(vllm_gpu_memory_utilization=share)


def _propose_smaller_batches(run: PlannedRun) -> tuple[str, PlannedRun]:
    """Return smaller micro-batches with the same number of answers per update."""
    config = run.config
    size = config.per_device_train_batch_size
    smaller = next(part for part in range(size // 2, 0, -1) if size % part == 0)
    options = {
        "per_device_train_batch_size": smaller,
        "gradient_accumulation_steps": config.gradient_accumulation_steps * (size // smaller),
        "steps_per_generation": config.steps_per_generation * (size // smaller),
    }
    text = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"{text} (the same answers per update)", run.with_options(**options)


def _find_sufficient_gpus(run: PlannedRun, targets: Sequence[PhaseTarget]) -> OptionChange | None:
    """Double the GPUs until the run fits; each GPU then computes fewer of an update's answers."""
    gpus = run.hardware.gpus
    while 1 <= gpus < MAX_GPUS:
        gpus *= 2
        size = compute_peak_bytes(run.with_options({"gpus": gpus, "sharding": "fsdp2"}), targets)
        if size <= run.hardware.device_bytes:
            return OptionChange(f"{gpus} GPUs, sharding fsdp2", size)
    return None
