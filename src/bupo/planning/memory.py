"""Bytes of a device by part, at the moment of a rollout batch and its updates at which they are most.

Weights, gradients and optimizer follow from the parameters and the sharding; activations are counted on the meta device
(`kept`). A sum of all parts would be too much: gradients are there when activations no longer are. So a plan looks at each
moment: the rollout batch being sampled and scored, the start of a backward pass, the block that is differentiated first, and
its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bupo.models.token_scoring import ROWS_PER_TILE, VOCABULARY_PER_TILE
from bupo.planning.planned_run import PlannedRun

MemoryParts = dict[str, float]  # bytes by part

FP32_BYTES, HALF_BYTES = 4, 2
LIVE_LOGIT_TILES = 2  # of logits that are there at once
LIVE_LARGEST_TENSORS = (
    3  # gradients of a block's largest states: of gate, up and their product, when that is differentiated
)
GATHERED_BLOCKS = 2  # blocks that are whole at once: that which computes, and the next
DEEPSPEED_BUCKET_SIZE = 5e8  # elements that DeepSpeed reduces at once
OPTIMIZER_STATES = {
    "adamw": 2,
    "adam": 2,
    "adafactor": 0,
    "sgd": 0,
    "lion": 1,
    "rmsprop": 1,
}  # fp32 numbers a parameter


@dataclass(frozen=True)
class MemoryEstimate:
    """Of a rollout batch that optimises one policy.

    Attributes:
        moment (`str`), at_once (`dict[str, float]`): when a device is fullest, and its parts then.
        largest (`dict[str, float]`): each part when that is at its largest.
    """

    peak_moment: str
    peak_parts: MemoryParts
    max_by_part: MemoryParts

    @property
    def bytes(self) -> float:
        """That a device must hold."""
        return sum(self.peak_parts.values())


def compute_peak_memory(setting: PlannedRun, layer: int | None, besides: int | None = None) -> MemoryEstimate:
    """Of a rollout batch that optimises a stage's layer, or the whole policy, and a layer's besides."""
    found = list(iterate_moments(setting, layer, besides))
    moment, at_once = max(found, key=lambda each: sum(each[1].values()))
    parts = dict.fromkeys(part for _, parts in found for part in parts)
    return MemoryEstimate(moment, at_once, {part: max(each.get(part, 0.0) for _, each in found) for part in parts})


def iterate_moments(
    setting: PlannedRun, layer: int | None, besides: int | None = None
) -> Iterator[tuple[str, MemoryParts]]:
    """Each with its parts, those of 0 bytes left out."""
    always = compute_persistent_memory(setting, layer)
    for name, parts in (
        *_iterate_rollout_moments(setting),
        *_iterate_critic_moments(setting, layer),
        *_iterate_update_moments(setting, layer, besides),
    ):
        found = dict(always)
        for part, size in parts.items():
            found[part] = found.get(part, 0.0) + size
        yield name, {part: size for part, size in found.items() if size > 0}


# -- what lasts ------------------------------------------------------------------------------------------------------


def compute_persistent_memory(setting: PlannedRun, layer: int | None) -> MemoryParts:
    """What is there all the time. In phase 1 nothing above the layer has an optimizer's state yet."""
    sizes, config = setting.sizes, setting.config
    found = {
        "weights": _compute_weight_bytes(setting, sizes.weights, sizes.count_trained_parameters(None, True)),
        "optimizer": _compute_optimizer_bytes(setting, setting.count_trained_parameters(layer)),
        "buckets": _compute_bucket_bytes(setting, sizes.count_trained_parameters(None, True)),
    }
    if setting.has_reference_model:
        found["reference model"] = _compute_weight_bytes(setting, sizes.weights, 0)
    if setting.has_copied_critic:
        found["critic"] = _compute_critic_bytes(setting)
    if config.use_vllm and config.vllm_mode == "colocate" and not config.vllm_enable_sleep_mode:
        found["vLLM"] = compute_vllm_bytes(setting)
    return found


def _compute_critic_bytes(setting: PlannedRun) -> float:
    """Weights, moments of an AdamW of its own, whatever the policy's is, and what reduces gradients. DeepSpeed's engine is the
    policy's: beside it the critic is whole on each process."""
    count = count_critic_weights(setting)
    if setting.hardware.resolved_sharding.startswith("zero"):
        return (2 * setting.trained_bytes + get_optimizer_state_bytes("adamw", setting.trained_bytes)) * count
    return (
        _compute_weight_bytes(setting, count, count)
        + _compute_bucket_bytes(setting, count)
        + _compute_optimizer_bytes(setting, count, "adamw")
    )


def _compute_weight_bytes(setting: PlannedRun, count: float, trained: float) -> float:
    """Weights, and DeepSpeed's fp32 ones beside those that it computes with."""
    size, shared, processes = setting.weight_bytes, setting.hardware.resolved_sharding, setting.hardware.num_processes
    if shared == "fsdp2":
        return (FP32_BYTES * trained + size * (count - trained)) / processes
    if shared.startswith("zero"):
        own = (HALF_BYTES if setting.is_half_precision else FP32_BYTES) * count
        return own + FP32_BYTES * trained / processes
    return setting.trained_bytes * trained + size * (count - trained)


def _compute_optimizer_bytes(setting: PlannedRun, count: float, name: str | None = None) -> float:
    """Moments of the parameters that have been moved."""
    whole = setting.hardware.resolved_sharding in ("one", "ddp")
    size = setting.trained_bytes if whole else FP32_BYTES
    state = get_optimizer_state_bytes(name or setting.config.optim.value, size)
    return state * count / (1 if whole else setting.hardware.num_processes)


def get_optimizer_state_bytes(name: str, size: int) -> float:
    """Of the state of a parameter of `size` bytes. An optimizer that is not known counts as AdamW."""
    if "8bit" in name:
        return 2.0  # two moments of a byte each
    return size * OPTIMIZER_STATES.get(name.split("_")[0], 2)


def _compute_bucket_bytes(setting: PlannedRun, trained: float) -> float:
    """DDP keeps gradients a second time, to reduce them; DeepSpeed a bucket."""
    if setting.hardware.resolved_sharding == "ddp":
        return setting.trained_bytes * trained
    return (
        HALF_BYTES * min(DEEPSPEED_BUCKET_SIZE, trained)
        if setting.hardware.resolved_sharding.startswith("zero")
        else 0.0
    )


def count_critic_weights(setting: PlannedRun) -> float:
    """A copy of the decoder and a value for each of its dimensions."""
    sizes = setting.sizes
    return sizes.weights - sizes.unembedding.weights + sizes.width + 1


def compute_vllm_bytes(setting: PlannedRun) -> float:
    """What vLLM takes for itself, whatever the model."""
    return setting.config.vllm_gpu_memory_utilization * setting.hardware.device_bytes


# -- gradients -------------------------------------------------------------------------------------------------------


def _compute_gradient_bytes(setting: PlannedRun, count: float) -> float:
    """Between two micro-batches and when the optimizer steps."""
    shared, processes = setting.hardware.resolved_sharding, setting.hardware.num_processes
    if shared == "fsdp2":
        return FP32_BYTES * count / processes
    if shared.startswith("zero"):
        size = HALF_BYTES if setting.is_half_precision else FP32_BYTES
        return size * count / (1 if shared == "zero1" else processes)
    return setting.trained_bytes * count


def _compute_unreduced_gradient_bytes(setting: PlannedRun, count: float) -> float:
    """Between two micro-batches of an update. transformers lets FSDP2 reduce gradients at the last one only: until then each
    device holds them whole, in the type that layers compute in."""
    if setting.hardware.resolved_sharding == "fsdp2" and not has_sync_each_batch(setting):
        return (HALF_BYTES if setting.is_half_precision else FP32_BYTES) * count
    return _compute_gradient_bytes(setting, count)


def _compute_accumulated_gradient_bytes(setting: PlannedRun, layer: int | None) -> float:
    """Gradients that a micro-batch of an update finds of those before it. What FSDP2 has not reduced cannot be dropped."""
    if not setting.is_accumulating:
        return 0.0
    whole = setting.hardware.resolved_sharding == "fsdp2" and not has_sync_each_batch(setting)
    return _compute_unreduced_gradient_bytes(
        setting, setting.count_trained_parameters(setting.get_last_layer(layer) if whole else layer)
    )


def has_sync_each_batch(setting: PlannedRun) -> bool:
    """Whether gradients are reduced after each micro-batch (accelerate's `sync_each_batch`)."""
    given = getattr(setting.config.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(given.get("sync_each_batch"))


# -- an update -------------------------------------------------------------------------------------------------------


def _iterate_update_moments(
    setting: PlannedRun, layer: int | None, besides: int | None
) -> Iterator[tuple[str, MemoryParts]]:
    """The policy's passes over its fullest micro-batch, and what its backward pass leaves."""
    sizes, config, moved, read = (
        setting.sizes,
        setting.config,
        setting.count_trained_parameters(layer),
        setting.get_last_layer(layer),
    )
    kept = compute_activation_bytes(setting, layer, besides)
    if besides is not None:
        kept += (
            setting.saved_activations.residual_stream
        )  # the gradient of the layer's states, which waits for that from above
    head = _compute_logit_tile_bytes(setting) + FP32_BYTES * setting.largest_micro_batch.completion_tokens * sizes.width
    head_grad = (
        float(_get_compute_weight_bytes(setting) * sizes.width * sizes.vocabulary) if sizes.head.trained else 0.0
    )
    late = {"critic": _compute_critic_gradient_bytes(setting) if setting.is_accumulating else 0.0}
    start = {
        "gradients": _compute_accumulated_gradient_bytes(setting, layer),
        "activations": kept,
        **_compute_gathered_part(setting),
        **late,
    }
    twice = 1 if besides is None else 2  # the other policy's gradient of the weights waits for this one's
    yield "the unembedding is differentiated", {**start, "unembedding": head + twice * head_grad}
    # of a weight that is also the embedding's, the gradient waits for the rest of it
    waits = head_grad if sizes.tied or not setting.is_accumulating else 0.0
    yield (
        "the last layer is differentiated",
        {**start, "activations": kept + compute_backward_workspace(setting), "unembedding": waits},
    )
    if config.gradient_checkpointing and read != 1:
        below = (
            kept
            - (setting.saved_activations.blocks[read - 1] if read is not None else 0)
            + max(setting.saved_activations.blocks)
        )
        yield (
            "a layer is computed again",
            {**start, "activations": below + compute_backward_workspace(setting), "unembedding": waits},
        )
    own = sizes.embedding.trained * _get_compute_weight_bytes(setting)
    again = own * (sizes.tied + setting.is_accumulating)
    left = _compute_unreduced_gradient_bytes(
        setting, setting.count_trained_parameters(read)
    )  # with those that are dropped now
    yield "a backward pass ends", {"gradients": left + again, **_compute_gathered_part(setting), **late}
    step = (
        FP32_BYTES * moved / setting.hardware.num_processes
        if setting.hardware.resolved_sharding.startswith("zero")
        else 0.0
    )
    yield "the optimizer steps", {"gradients": _compute_gradient_bytes(setting, moved) + step}


def compute_activation_bytes(setting: PlannedRun, layer: int | None, besides: int | None = None) -> float:
    """What the forward pass keeps; under checkpointing of each block what it reads, but for the one whose states are read."""
    kept, config, layer = setting.saved_activations, setting.config, setting.get_last_layer(layer)
    count, seen = layer or setting.sizes.layers, layer or besides
    blocks = list(kept.blocks[:count])
    if config.gradient_checkpointing:
        blocks = [size if number == seen else kept.residual_stream for number, size in enumerate(blocks, 1)]
    internal = seen is not None and config.internal_lens == "final_norm"
    normed = kept.after_blocks * ((layer is None) + internal)
    states = (
        setting.largest_micro_batch.completion_tokens
        * setting.sizes.width
        * setting.state_bytes
        * (1 if besides is None else 2)
    )
    copies = HALF_BYTES * setting.sizes.linear if setting.precision == "autocast" else 0
    if copies and layer is not None:
        copies = HALF_BYTES * sum(block.linear for block in setting.sizes.blocks[:count])
    return float(kept.before_blocks + sum(blocks) + normed + states + copies)


def _compute_logit_tile_bytes(setting: PlannedRun) -> float:
    """Of logits, some rows and words at a time; their factors are fp32 in the backward pass."""
    rows, words = (
        min(ROWS_PER_TILE, setting.largest_micro_batch.completion_tokens),
        min(VOCABULARY_PER_TILE, setting.sizes.vocabulary),
    )
    converted = setting.sizes.width * (rows + 2 * words) if setting.state_bytes == HALF_BYTES else 0
    return float(FP32_BYTES * (LIVE_LOGIT_TILES * rows * words + converted))


def compute_backward_workspace(setting: PlannedRun) -> float:
    """What the backward pass of a block makes."""
    return float(
        LIVE_LARGEST_TENSORS * setting.saved_activations.largest_tensor + 2 * setting.saved_activations.residual_stream
    )


def _compute_gathered_part(setting: PlannedRun) -> MemoryParts:
    """What sharded weights are whole for a while: embedding, norm and unembedding, blocks, and the gradients of a block."""
    if setting.hardware.resolved_sharding != "fsdp2":
        return {}
    size, sizes = _get_compute_weight_bytes(setting), setting.sizes
    root = sizes.embedding.weights + sizes.other.weights + sizes.unembedding.weights
    block = max(part.weights for part in sizes.blocks)
    trained = max(part.trained for part in sizes.blocks)
    return {"gathered": size * (root + GATHERED_BLOCKS * block + trained)}


def _get_compute_weight_bytes(setting: PlannedRun) -> int:
    """Of a weight where layers compute with it, and of its gradient there."""
    return HALF_BYTES if setting.precision == "bfloat16" else FP32_BYTES


# -- PPO's second model ----------------------------------------------------------------------------------------------


def _iterate_critic_moments(setting: PlannedRun, layer: int | None) -> Iterator[tuple[str, MemoryParts]]:
    """Its passes, which come before the policy's of the same micro-batch."""
    if not setting.has_copied_critic:
        return
    policy = _compute_accumulated_gradient_bytes(setting, layer)
    again = max(setting.saved_activations.blocks) if setting.config.gradient_checkpointing else 0
    kept = compute_activation_bytes(setting, None) + again + compute_backward_workspace(setting)
    before = _compute_critic_gradient_bytes(setting) if setting.is_accumulating else 0.0
    yield (
        "the critic is differentiated",
        {"gradients": policy, "critic": before, "activations": kept, **_compute_gathered_part(setting)},
    )
    yield "the critic steps", {"gradients": policy, "critic": _compute_critic_gradient_bytes(setting)}


def _compute_critic_gradient_bytes(setting: PlannedRun) -> float:
    """Reduced at once where it is sharded."""
    if not setting.has_copied_critic:
        return 0.0
    count = count_critic_weights(setting)
    return (
        setting.trained_bytes * count
        if setting.hardware.resolved_sharding.startswith("zero")
        else _compute_gradient_bytes(setting, count)
    )


# -- a rollout batch -------------------------------------------------------------------------------------------------


def _iterate_rollout_moments(setting: PlannedRun) -> Iterator[tuple[str, MemoryParts]]:
    """Answers are sampled, then scored without a gradient."""
    config, sizes = setting.config, setting.sizes
    asleep = config.use_vllm and config.vllm_mode == "colocate" and config.vllm_enable_sleep_mode
    if asleep:
        yield "answers are sampled", {"vLLM": compute_vllm_bytes(setting)}
    elif not config.use_vllm:
        cache = setting.num_completions * setting.max_lengths.total * setting.kv_cache_bytes
        logits = LIVE_LARGEST_TENSORS * FP32_BYTES * setting.num_completions * sizes.vocabulary
        yield "answers are sampled", {"keys and values": float(cache + logits), **_compute_gathered_part(setting)}
    states = setting.largest_micro_batch.completion_tokens * sizes.width * setting.state_bytes
    passing = (
        LIVE_LARGEST_TENSORS * setting.saved_activations.largest_tensor
        + 3 * setting.saved_activations.residual_stream
        + 2 * states
    )
    yield (
        "answers are scored",
        {
            "activations": float(passing),
            "unembedding": _compute_logit_tile_bytes(setting),
            **_compute_gathered_part(setting),
        },
    )
