"""Peak memory of a device by part, over the moments of a rollout batch and its updates.

Weights, gradients and optimizer states follow from the parameters and the sharding; activations are counted on the meta device
(`saved_activations`). The sum of all maxima would be too high, because gradients are complete when activations are already
freed. A plan therefore computes each moment: sampling and scoring the rollout batch, and the start, the first block and the end
of a backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bupo.models.token_scoring import ROWS_PER_TILE, VOCABULARY_PER_TILE
from bupo.planning.planned_run import PlannedRun

MemoryParts = dict[str, float]  # bytes by part

FP32_BYTES, HALF_BYTES = 4, 2
LIVE_LOGIT_TILES = 2  # logit tiles in memory at the same time
LIVE_LARGEST_TENSORS = 3  # gradients of a block's largest states at the same time: gate, up and their product
GATHERED_BLOCKS = 2  # unsharded blocks in memory at the same time: the current one and the next
DEEPSPEED_BUCKET_SIZE = 5e8  # elements that DeepSpeed reduces at once
OPTIMIZER_STATES = {
    "adamw": 2,
    "adam": 2,
    "adafactor": 0,
    "sgd": 0,
    "lion": 1,
    "rmsprop": 1,
}  # states per parameter


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a device for one rollout batch and its updates.

    Attributes:
        peak_moment (`str`): the moment with the most memory in use.
        peak_parts (`dict[str, float]`): bytes by part at that moment.
        max_by_part (`dict[str, float]`): the maximum of each part over all moments.
    """

    peak_moment: str
    peak_parts: MemoryParts
    max_by_part: MemoryParts

    @property
    def bytes(self) -> float:
        """Bytes that a device must have."""
        return sum(self.peak_parts.values())


def compute_peak_memory(run: PlannedRun, layer: int | None, auxiliary_layer: int | None = None) -> MemoryEstimate:
    """Return the peak memory of a rollout batch.

    Args:
        run ([`PlannedRun`]): the run.
        layer (`int`, *optional*): the layer whose policy is optimised; `None` for the full model.
        auxiliary_layer (`int`, *optional*): a layer whose auxiliary objective is added in phase 2.
    """
    moments = list(iterate_moments(run, layer, auxiliary_layer))
    peak_moment, peak_parts = max(moments, key=lambda moment: sum(moment[1].values()))
    names = dict.fromkeys(name for _, parts in moments for name in parts)
    return MemoryEstimate(
        peak_moment, peak_parts, {name: max(parts.get(name, 0.0) for _, parts in moments) for name in names}
    )


def iterate_moments(
    run: PlannedRun, layer: int | None, auxiliary_layer: int | None = None
) -> Iterator[tuple[str, MemoryParts]]:
    """Yield each moment with its bytes by part, without the parts of 0 bytes."""
    persistent = compute_persistent_memory(run, layer)
    for name, parts in (
        *_iterate_rollout_moments(run),
        *_iterate_critic_moments(run, layer),
        *_iterate_update_moments(run, layer, auxiliary_layer),
    ):
        total = dict(persistent)
        for part, size in parts.items():
            total[part] = total.get(part, 0.0) + size
        yield name, {part: size for part, size in total.items() if size > 0}


# -- persistent memory -------------------------------------------------------------------------------------------------


def compute_persistent_memory(run: PlannedRun, layer: int | None) -> MemoryParts:
    """Return the bytes that are in use at every moment. In phase 1, parameters above the layer have no optimizer state yet."""
    sizes, config = run.sizes, run.config
    parts = {
        "weights": _compute_weight_bytes(run, sizes.weights, sizes.count_trained_parameters(None, True)),
        "optimizer": _compute_optimizer_bytes(run, run.count_trained_parameters(layer)),
        "buckets": _compute_bucket_bytes(run, sizes.count_trained_parameters(None, True)),
    }
    if run.has_reference_model:
        parts["reference model"] = _compute_weight_bytes(run, sizes.weights, 0)
    if run.has_copied_critic:
        parts["critic"] = _compute_critic_bytes(run)
    if config.use_vllm and config.vllm_mode == "colocate" and not config.vllm_enable_sleep_mode:
        parts["vLLM"] = compute_vllm_bytes(run)
    return parts


def _compute_critic_bytes(run: PlannedRun) -> float:
    """Return the bytes of the separate critic: weights, AdamW moments and gradient buckets.

    The critic always uses AdamW. DeepSpeed's engine covers the policy only, so each process holds an unsharded critic.
    """
    count = count_critic_weights(run)
    if run.hardware.resolved_sharding.startswith("zero"):
        return (2 * run.trained_bytes + get_optimizer_state_bytes("adamw", run.trained_bytes)) * count
    return (
        _compute_weight_bytes(run, count, count)
        + _compute_bucket_bytes(run, count)
        + _compute_optimizer_bytes(run, count, "adamw")
    )


def _compute_weight_bytes(run: PlannedRun, count: float, trained: float) -> float:
    """Return the bytes of the weights, and of DeepSpeed's additional fp32 copy of trained weights."""
    size, sharding, processes = run.weight_bytes, run.hardware.resolved_sharding, run.hardware.num_processes
    if sharding == "fsdp2":
        return (FP32_BYTES * trained + size * (count - trained)) / processes
    if sharding.startswith("zero"):
        compute_copy = (HALF_BYTES if run.is_half_precision else FP32_BYTES) * count
        return compute_copy + FP32_BYTES * trained / processes
    return run.trained_bytes * trained + size * (count - trained)


def _compute_optimizer_bytes(run: PlannedRun, count: float, name: str | None = None) -> float:
    """Return the bytes of the optimizer states of `count` parameters."""
    unsharded = run.hardware.resolved_sharding in ("one", "ddp")
    size = run.trained_bytes if unsharded else FP32_BYTES
    state = get_optimizer_state_bytes(name or run.config.optim.value, size)
    return state * count / (1 if unsharded else run.hardware.num_processes)


def get_optimizer_state_bytes(name: str, size: int) -> float:
    """Return the bytes of the state of a parameter of `size` bytes. An unknown optimizer counts as AdamW."""
    if "8bit" in name:
        return 2.0  # two moments of a byte each
    return size * OPTIMIZER_STATES.get(name.split("_")[0], 2)


def _compute_bucket_bytes(run: PlannedRun, trained: float) -> float:
    """Return the bytes of the buckets that reduce gradients: a second copy for DDP, one bucket for DeepSpeed."""
    if run.hardware.resolved_sharding == "ddp":
        return run.trained_bytes * trained
    return (
        HALF_BYTES * min(DEEPSPEED_BUCKET_SIZE, trained) if run.hardware.resolved_sharding.startswith("zero") else 0.0
    )


def count_critic_weights(run: PlannedRun) -> float:
    """Return the parameters of the critic: a copy of the decoder and a linear value head."""
    sizes = run.sizes
    return sizes.weights - sizes.unembedding.weights + sizes.width + 1


def compute_vllm_bytes(run: PlannedRun) -> float:
    """Return the bytes that vLLM reserves, independent of the model."""
    return run.config.vllm_gpu_memory_utilization * run.hardware.device_bytes


# -- gradients -------------------------------------------------------------------------------------------------------


def _compute_gradient_bytes(run: PlannedRun, count: float) -> float:
    """Return the bytes of reduced gradients when the optimizer steps."""
    sharding, processes = run.hardware.resolved_sharding, run.hardware.num_processes
    if sharding == "fsdp2":
        return FP32_BYTES * count / processes
    if sharding.startswith("zero"):
        size = HALF_BYTES if run.is_half_precision else FP32_BYTES
        return size * count / (1 if sharding == "zero1" else processes)
    return run.trained_bytes * count


def _compute_unreduced_gradient_bytes(run: PlannedRun, count: float) -> float:
    """Return the bytes of gradients between two micro-batches of an update.

    transformers lets FSDP2 reduce gradients at the last micro-batch only. Until then each device holds them unsharded, in the
    dtype of the computation.
    """
    if run.hardware.resolved_sharding == "fsdp2" and not has_sync_each_batch(run):
        return (HALF_BYTES if run.is_half_precision else FP32_BYTES) * count
    return _compute_gradient_bytes(run, count)


def _compute_accumulated_gradient_bytes(run: PlannedRun, layer: int | None) -> float:
    """Return the bytes of gradients from earlier micro-batches. Unreduced FSDP2 gradients cannot be freed."""
    if not run.is_accumulating:
        return 0.0
    unreduced = run.hardware.resolved_sharding == "fsdp2" and not has_sync_each_batch(run)
    return _compute_unreduced_gradient_bytes(
        run, run.count_trained_parameters(run.get_last_layer(layer) if unreduced else layer)
    )


def has_sync_each_batch(run: PlannedRun) -> bool:
    """Return whether gradients are reduced after each micro-batch (accelerate's `sync_each_batch`)."""
    kwargs = getattr(run.config.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(kwargs.get("sync_each_batch"))


# -- an update -------------------------------------------------------------------------------------------------------


def _iterate_update_moments(
    run: PlannedRun, layer: int | None, auxiliary_layer: int | None
) -> Iterator[tuple[str, MemoryParts]]:
    """Yield the moments of an update: the backward pass over the largest micro-batch and the optimizer step."""
    sizes, config = run.sizes, run.config
    num_trained, last_layer = run.count_trained_parameters(layer), run.get_last_layer(layer)
    activations = compute_activation_bytes(run, layer, auxiliary_layer)
    if auxiliary_layer is not None:
        # the gradient of the layer's states is kept until the gradient from above arrives
        activations += run.saved_activations.residual_stream
    head = _compute_logit_tile_bytes(run) + FP32_BYTES * run.largest_micro_batch.completion_tokens * sizes.width
    head_grad = float(_get_compute_weight_bytes(run) * sizes.width * sizes.vocabulary) if sizes.head.trained else 0.0
    critic = {"critic": _compute_critic_gradient_bytes(run) if run.is_accumulating else 0.0}
    start = {
        "gradients": _compute_accumulated_gradient_bytes(run, layer),
        "activations": activations,
        **_compute_gathered_part(run),
        **critic,
    }
    policies = 1 if auxiliary_layer is None else 2  # both gradients of the weights exist before they are added
    yield "the unembedding is differentiated", {**start, "unembedding": head + policies * head_grad}
    # the gradient of tied weights is kept until the embedding's part is added
    pending = head_grad if sizes.tied or not run.is_accumulating else 0.0
    yield (
        "the last layer is differentiated",
        {**start, "activations": activations + compute_backward_workspace(run), "unembedding": pending},
    )
    if config.gradient_checkpointing and last_layer != 1:
        recomputed = (
            activations
            - (run.saved_activations.blocks[last_layer - 1] if last_layer is not None else 0)
            + max(run.saved_activations.blocks)
        )
        yield (
            "a layer is computed again",
            {**start, "activations": recomputed + compute_backward_workspace(run), "unembedding": pending},
        )
    embedding_grad = sizes.embedding.trained * _get_compute_weight_bytes(run)
    extra = embedding_grad * (sizes.tied + run.is_accumulating)
    # includes the gradients above the layer, which are dropped at this moment
    gradients = _compute_unreduced_gradient_bytes(run, run.count_trained_parameters(last_layer))
    yield "a backward pass ends", {"gradients": gradients + extra, **_compute_gathered_part(run), **critic}
    step = (
        FP32_BYTES * num_trained / run.hardware.num_processes
        if run.hardware.resolved_sharding.startswith("zero")
        else 0.0
    )
    yield "the optimizer steps", {"gradients": _compute_gradient_bytes(run, num_trained) + step}


def compute_activation_bytes(run: PlannedRun, layer: int | None, auxiliary_layer: int | None = None) -> float:
    """Return the bytes that the forward pass saves.

    With gradient checkpointing, each block saves its input only, except the one whose states are scored.
    """
    saved, config, layer = run.saved_activations, run.config, run.get_last_layer(layer)
    num_layers, scored_layer = layer or run.sizes.layers, layer or auxiliary_layer
    blocks = list(saved.blocks[:num_layers])
    if config.gradient_checkpointing:
        blocks = [size if number == scored_layer else saved.residual_stream for number, size in enumerate(blocks, 1)]
    internal = scored_layer is not None and config.internal_lens == "final_norm"
    norms = saved.after_blocks * ((layer is None) + internal)
    states = (
        run.largest_micro_batch.completion_tokens
        * run.sizes.width
        * run.state_bytes
        * (1 if auxiliary_layer is None else 2)
    )
    copies = HALF_BYTES * run.sizes.linear if run.precision == "autocast" else 0
    if copies and layer is not None:
        copies = HALF_BYTES * sum(block.linear for block in run.sizes.blocks[:num_layers])
    return float(saved.before_blocks + sum(blocks) + norms + states + copies)


def _compute_logit_tile_bytes(run: PlannedRun) -> float:
    """Return the bytes of the logits of one tile of rows and vocabulary; its factors are fp32 in the backward pass."""
    rows, tokens = (
        min(ROWS_PER_TILE, run.largest_micro_batch.completion_tokens),
        min(VOCABULARY_PER_TILE, run.sizes.vocabulary),
    )
    converted = run.sizes.width * (rows + 2 * tokens) if run.state_bytes == HALF_BYTES else 0
    return float(FP32_BYTES * (LIVE_LOGIT_TILES * rows * tokens + converted))


def compute_backward_workspace(run: PlannedRun) -> float:
    """Return the bytes of the temporary tensors in the backward pass of a block."""
    return float(
        LIVE_LARGEST_TENSORS * run.saved_activations.largest_tensor + 2 * run.saved_activations.residual_stream
    )


def _compute_gathered_part(run: PlannedRun) -> MemoryParts:
    """Return the bytes of gathered FSDP2 weights: embedding, norm, unembedding, two blocks, and the gradients of a block."""
    if run.hardware.resolved_sharding != "fsdp2":
        return {}
    size, sizes = _get_compute_weight_bytes(run), run.sizes
    root = sizes.embedding.weights + sizes.other.weights + sizes.unembedding.weights
    block = max(part.weights for part in sizes.blocks)
    trained = max(part.trained for part in sizes.blocks)
    return {"gathered": size * (root + GATHERED_BLOCKS * block + trained)}


def _get_compute_weight_bytes(run: PlannedRun) -> int:
    """Return the bytes of a weight in the computation, and of its gradient there."""
    return HALF_BYTES if run.precision == "bfloat16" else FP32_BYTES


# -- PPO's separate critic---------------------------------------------------------------------------------------------


def _iterate_critic_moments(run: PlannedRun, layer: int | None) -> Iterator[tuple[str, MemoryParts]]:
    """Yield the moments of the critic's update, which comes before the policy's for each micro-batch."""
    if not run.has_copied_critic:
        return
    policy_gradients = _compute_accumulated_gradient_bytes(run, layer)
    recomputed = max(run.saved_activations.blocks) if run.config.gradient_checkpointing else 0
    activations = compute_activation_bytes(run, None) + recomputed + compute_backward_workspace(run)
    accumulated = _compute_critic_gradient_bytes(run) if run.is_accumulating else 0.0
    yield (
        "the critic is differentiated",
        {
            "gradients": policy_gradients,
            "critic": accumulated,
            "activations": activations,
            **_compute_gathered_part(run),
        },
    )
    yield "the critic steps", {"gradients": policy_gradients, "critic": _compute_critic_gradient_bytes(run)}


def _compute_critic_gradient_bytes(run: PlannedRun) -> float:
    """Return the bytes of the critic's gradients. A sharded critic reduces them immediately."""
    if not run.has_copied_critic:
        return 0.0
    count = count_critic_weights(run)
    return (
        run.trained_bytes * count
        if run.hardware.resolved_sharding.startswith("zero")
        else _compute_gradient_bytes(run, count)
    )


# -- a rollout batch -------------------------------------------------------------------------------------------------


def _iterate_rollout_moments(run: PlannedRun) -> Iterator[tuple[str, MemoryParts]]:
    """Yield the moments of a rollout batch: sampling, then scoring without gradients."""
    config, sizes = run.config, run.sizes
    sleeps = config.use_vllm and config.vllm_mode == "colocate" and config.vllm_enable_sleep_mode
    if sleeps:
        yield "answers are sampled", {"vLLM": compute_vllm_bytes(run)}
    elif not config.use_vllm:
        cache = run.num_completions * run.max_lengths.total * run.kv_cache_bytes
        logits = LIVE_LARGEST_TENSORS * FP32_BYTES * run.num_completions * sizes.vocabulary
        yield "answers are sampled", {"keys and values": float(cache + logits), **_compute_gathered_part(run)}
    states = run.largest_micro_batch.completion_tokens * sizes.width * run.state_bytes
    activations = (
        LIVE_LARGEST_TENSORS * run.saved_activations.largest_tensor
        + 3 * run.saved_activations.residual_stream
        + 2 * states
    )
    yield (
        "answers are scored",
        {
            "activations": float(activations),
            "unembedding": _compute_logit_tile_bytes(run),
            **_compute_gathered_part(run),
        },
    )
