"""Seconds of a rollout batch, from two rates that a device is stated to reach: FLOP/s, and bytes/s of its memory.

Sampling reads the weights once for each token of the longest answer, and each token the keys and values before it: it takes
as long as these bytes do, or as its products, whichever is more. The optimizer is bytes only. The rest is products.
"""

import math
from dataclasses import dataclass

from bupo.planning.flops import Flops
from bupo.planning.memory import HALF_BYTES, compute_vllm_bytes, count_critic_weights, get_optimizer_state_bytes
from bupo.planning.planned_run import PlannedRun

# readings and writings of a gradient besides the optimizer's: whether it is finite, its norm, and clipping it
GRADIENT_PASSES, CLIPPING_PASSES = 1, 3


@dataclass(frozen=True)
class RolloutBatchSeconds:
    """Of a rollout batch. None where a rate that it takes is not known."""

    sampling: float | None
    scoring: float | None
    update: float | None

    @property
    def total(self) -> float | None:
        parts = (self.sampling, self.scoring, self.update)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def estimate_seconds(setting: PlannedRun, layer: int | None, counted: Flops) -> RolloutBatchSeconds:
    """Of what `counted` is the arithmetic of."""
    rate, speed = setting.hardware.get_flops_per_second(setting.is_half_precision), setting.hardware.bytes_per_second
    if rate is None:
        return RolloutBatchSeconds(None, None, None)
    scoring = counted.scoring / rate
    if speed is None:
        return RolloutBatchSeconds(None, scoring, None)
    update = counted.update / rate + setting.num_updates * compute_optimizer_traffic(setting, layer) / speed
    server = setting.config.use_vllm and setting.config.vllm_mode == "server"
    sampling = 0.0 if server else max(counted.sampling / rate, compute_sampling_traffic(setting) / speed)
    return RolloutBatchSeconds(sampling, scoring, update)


def compute_optimizer_traffic(setting: PlannedRun, layer: int | None) -> float:
    """Bytes that one update reads and writes: weights and states, and the gradient several times."""
    count = setting.count_trained_parameters(layer)
    share = 1 if setting.hardware.resolved_sharding in ("one", "ddp") else setting.hardware.num_processes
    found = _compute_step_traffic(setting, setting.config.optim.value, share) * count
    if setting.has_copied_critic:  # its own AdamW, of all of it, which DeepSpeed does not share
        own = 1 if setting.hardware.resolved_sharding.startswith("zero") else share
        found += _compute_step_traffic(setting, "adamw", own) * count_critic_weights(setting)
    return found


def _compute_step_traffic(setting: PlannedRun, optimizer: str, share: int) -> float:
    """Bytes a parameter that this device reads and writes where it steps one in `share` of them."""
    size = setting.trained_bytes if share == 1 else 4
    gradient = size * (1 + GRADIENT_PASSES + (CLIPPING_PASSES if setting.config.max_grad_norm else 0))
    return (2 * size + gradient + 2 * get_optimizer_state_bytes(optimizer, size)) / share


def compute_sampling_traffic(setting: PlannedRun) -> float:
    """Bytes of weights and of keys and values that a device reads while it samples."""
    size = HALF_BYTES if setting.is_half_precision else 4
    weights = size * setting.sizes.weights / _get_tensor_parallel_size(setting)
    length = setting.mean_lengths
    before = length.completion * (length.prompt + length.completion / 2)
    return count_sampling_steps(setting) * weights + setting.num_completions * before * setting.kv_cache_bytes


def count_sampling_steps(setting: PlannedRun) -> float:
    """Tokens that are sampled one after another: as many as the longest answer has, and more where not all fit at once."""
    longest = max(setting.max_lengths.completion, setting.mean_lengths.completion)
    if not (setting.config.use_vllm and setting.config.vllm_mode == "colocate"):
        return longest
    answers = setting.num_completions * _get_tensor_parallel_size(setting)
    return max(longest, answers * setting.mean_lengths.completion / max(1.0, count_concurrent_completions(setting)))


def count_concurrent_completions(setting: PlannedRun) -> float:
    """Answers of the mean length whose keys and values vLLM has room for, beside its weights."""
    return math.floor(compute_vllm_cache_bytes(setting) / (setting.kv_cache_bytes * setting.mean_lengths.total))


def compute_vllm_cache_bytes(setting: PlannedRun) -> float:
    """Bytes for keys and values of the devices that share an engine."""
    parts = _get_tensor_parallel_size(setting)
    return max(0.0, parts * compute_vllm_bytes(setting) - HALF_BYTES * setting.sizes.weights)


def describe_vllm_shortage(setting: PlannedRun) -> str | None:
    """What is said where vLLM cannot hold its weights and the longest answer."""
    config = setting.config
    if not (config.use_vllm and config.vllm_mode == "colocate"):
        return None
    wanted = setting.max_lengths.total * setting.kv_cache_bytes
    if compute_vllm_cache_bytes(setting) >= wanted:
        return None
    share = (
        (HALF_BYTES * setting.sizes.weights + wanted)
        / _get_tensor_parallel_size(setting)
        / setting.hardware.device_bytes
    )
    return (
        f"vLLM has no room: its weights and one answer take {share:.0%} of a device's memory, and "
        f"vllm_gpu_memory_utilization is {config.vllm_gpu_memory_utilization:g}"
    )


def _get_tensor_parallel_size(setting: PlannedRun) -> int:
    return setting.config.vllm_tensor_parallel_size if setting.config.use_vllm else 1
