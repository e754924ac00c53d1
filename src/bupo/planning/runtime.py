"""Seconds of a rollout batch, from two rates of a device: FLOP/s, and bytes/s of its memory.

Sampling reads the weights once for each token of the longest answer, and for each token the keys and values before it. It
takes as long as these reads or as its products, whichever is longer. The optimizer is limited by memory only, everything else
by FLOPs.
"""

import math
from dataclasses import dataclass

from bupo.planning.flops import Flops
from bupo.planning.memory import HALF_BYTES, compute_vllm_bytes, count_critic_weights, get_optimizer_state_bytes
from bupo.planning.planned_run import PlannedRun

# reads and writes of a gradient outside the optimizer: the check that it is finite; its norm and clipping
GRADIENT_PASSES, CLIPPING_PASSES = 1, 3


@dataclass(frozen=True)
class RolloutBatchSeconds:
    """Seconds of a rollout batch; `None` where a rate is not known."""

    sampling: float | None
    scoring: float | None
    update: float | None

    @property
    def total(self) -> float | None:
        parts = (self.sampling, self.scoring, self.update)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def estimate_seconds(run: PlannedRun, layer: int | None, flops: Flops) -> RolloutBatchSeconds:
    """Return the seconds of the rollout batch whose FLOPs are `flops`."""
    flop_rate, bandwidth = run.hardware.get_flops_per_second(run.is_half_precision), run.hardware.bytes_per_second
    if flop_rate is None:
        return RolloutBatchSeconds(None, None, None)
    scoring = flops.scoring / flop_rate
    if bandwidth is None:
        return RolloutBatchSeconds(None, scoring, None)
    update = flops.update / flop_rate + run.num_updates * compute_optimizer_traffic(run, layer) / bandwidth
    server = run.config.use_vllm and run.config.vllm_mode == "server"
    sampling = 0.0 if server else max(flops.sampling / flop_rate, compute_sampling_traffic(run) / bandwidth)
    return RolloutBatchSeconds(sampling, scoring, update)


def compute_optimizer_traffic(run: PlannedRun, layer: int | None) -> float:
    """Return the bytes that one update reads and writes: weights, optimizer states, and the gradient several times."""
    num_trained = run.count_trained_parameters(layer)
    num_shards = 1 if run.hardware.resolved_sharding in ("one", "ddp") else run.hardware.num_processes
    traffic = _compute_step_traffic(run, run.config.optim.value, num_shards) * num_trained
    if run.has_copied_critic:  # a separate AdamW over all its weights, which DeepSpeed does not shard
        critic_shards = 1 if run.hardware.resolved_sharding.startswith("zero") else num_shards
        traffic += _compute_step_traffic(run, "adamw", critic_shards) * count_critic_weights(run)
    return traffic


def _compute_step_traffic(run: PlannedRun, optimizer: str, num_shards: int) -> float:
    """Return the bytes per parameter that this device reads and writes in a step, with the states in `num_shards` shards."""
    size = run.trained_bytes if num_shards == 1 else 4
    gradient = size * (1 + GRADIENT_PASSES + (CLIPPING_PASSES if run.config.max_grad_norm else 0))
    return (2 * size + gradient + 2 * get_optimizer_state_bytes(optimizer, size)) / num_shards


def compute_sampling_traffic(run: PlannedRun) -> float:
    """Return the bytes of weights and of keys and values that a device reads while it samples."""
    size = HALF_BYTES if run.is_half_precision else 4
    weights = size * run.sizes.weights / _get_tensor_parallel_size(run)
    lengths = run.mean_lengths
    cached_tokens = lengths.completion * (lengths.prompt + lengths.completion / 2)  # read over one answer
    return count_sampling_steps(run) * weights + run.num_completions * cached_tokens * run.kv_cache_bytes


def count_sampling_steps(run: PlannedRun) -> float:
    """Return the number of decoding steps: the longest answer's tokens, and more if not all answers fit at once."""
    longest = max(run.max_lengths.completion, run.mean_lengths.completion)
    if not (run.config.use_vllm and run.config.vllm_mode == "colocate"):
        return longest
    answers = run.num_completions * _get_tensor_parallel_size(run)
    return max(longest, answers * run.mean_lengths.completion / max(1.0, count_concurrent_completions(run)))


def count_concurrent_completions(run: PlannedRun) -> float:
    """Return how many answers of mean length fit into vLLM's cache of keys and values."""
    return math.floor(compute_vllm_cache_bytes(run) / (run.kv_cache_bytes * run.mean_lengths.total))


def compute_vllm_cache_bytes(run: PlannedRun) -> float:
    """Return the bytes for keys and values on all devices of one vLLM engine."""
    num_shards = _get_tensor_parallel_size(run)
    return max(0.0, num_shards * compute_vllm_bytes(run) - HALF_BYTES * run.sizes.weights)


def describe_vllm_shortage(run: PlannedRun) -> str | None:
    """Return a message if vLLM cannot hold its weights and the longest answer, else None."""
    config = run.config
    if not (config.use_vllm and config.vllm_mode == "colocate"):
        return None
    answer_bytes = run.max_lengths.total * run.kv_cache_bytes
    if compute_vllm_cache_bytes(run) >= answer_bytes:
        return None
    share = (HALF_BYTES * run.sizes.weights + answer_bytes) / _get_tensor_parallel_size(run) / run.hardware.device_bytes
    return (
        f"vLLM has no room: its weights and one answer take {share:.0%} of a device's memory, and "
        f"vllm_gpu_memory_utilization is {config.vllm_gpu_memory_utilization:g}"
    )


def _get_tensor_parallel_size(run: PlannedRun) -> int:
    return run.config.vllm_tensor_parallel_size if run.config.use_vllm else 1
