"""Bytes of a device by part, at the moment of a rollout batch and its updates at which they are most.

Weights, gradients and optimizer follow from the parameters and the sharding; activations are counted on the meta device
(`kept`). A sum of all parts would be too much: gradients are there when activations no longer are. So a plan looks at each
moment: the rollout batch being sampled and scored, the start of a backward pass, the block that is differentiated first, and
its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bupo.models.token_scoring import ROWS_PER_TILE, VOCABULARY_PER_TILE
from bupo.planning.planned_run import Setting

Moment = dict[str, float]  # bytes by part

FP32, HALF = 4, 2
TILES = 2  # of logits that are there at once
AT_ONCE = 3  # gradients of a block's largest states: of gate, up and their product, when that is differentiated
GATHERED = 2  # blocks that are whole at once: that which computes, and the next
BUCKET = 5e8  # elements that DeepSpeed reduces at once
STATES = {"adamw": 2, "adam": 2, "adafactor": 0, "sgd": 0, "lion": 1, "rmsprop": 1}  # fp32 numbers a parameter


@dataclass(frozen=True)
class Memory:
    """Of a rollout batch that optimises one policy.

    Attributes:
        moment (`str`), at_once (`dict[str, float]`): when a device is fullest, and its parts then.
        largest (`dict[str, float]`): each part when that is at its largest.
    """

    moment: str
    at_once: Moment
    largest: Moment

    @property
    def bytes(self) -> float:
        """That a device must hold."""
        return sum(self.at_once.values())


def memory(setting: Setting, layer: int | None, besides: int | None = None) -> Memory:
    """Of a rollout batch that optimises a stage's layer, or the whole policy, and a layer's besides."""
    found = list(moments(setting, layer, besides))
    moment, at_once = max(found, key=lambda each: sum(each[1].values()))
    parts = dict.fromkeys(part for _, parts in found for part in parts)
    return Memory(moment, at_once, {part: max(each.get(part, 0.0) for _, each in found) for part in parts})


def moments(setting: Setting, layer: int | None, besides: int | None = None) -> Iterator[tuple[str, Moment]]:
    """Each with its parts, those of 0 bytes left out."""
    always = lasting(setting, layer)
    for name, parts in (*_rollouts(setting), *_critic(setting, layer), *_update(setting, layer, besides)):
        found = dict(always)
        for part, size in parts.items():
            found[part] = found.get(part, 0.0) + size
        yield name, {part: size for part, size in found.items() if size > 0}


# -- what lasts ------------------------------------------------------------------------------------------------------


def lasting(setting: Setting, layer: int | None) -> Moment:
    """What is there all the time. In phase 1 nothing above the layer has an optimizer's state yet."""
    sizes, config = setting.sizes, setting.config
    found = {
        "weights": _weights(setting, sizes.weights, sizes.moved(None, True)),
        "optimizer": _optimizer(setting, setting.moved(layer)),
        "buckets": _buckets(setting, sizes.moved(None, True)),
    }
    if setting.reference:
        found["reference model"] = _weights(setting, sizes.weights, 0)
    if setting.copied_critic:
        found["critic"] = _critic_held(setting)
    if config.use_vllm and config.vllm_mode == "colocate" and not config.vllm_enable_sleep_mode:
        found["vLLM"] = vllm_bytes(setting)
    return found


def _critic_held(setting: Setting) -> float:
    """Weights, moments of an AdamW of its own, whatever the policy's is, and what reduces gradients. DeepSpeed's engine is the
    policy's: beside it the critic is whole on each process."""
    count = critic_weights(setting)
    if setting.on.shared.startswith("zero"):
        return (2 * setting.trained_bytes + optimizer_bytes("adamw", setting.trained_bytes)) * count
    return _weights(setting, count, count) + _buckets(setting, count) + _optimizer(setting, count, "adamw")


def _weights(setting: Setting, count: float, trained: float) -> float:
    """Weights, and DeepSpeed's fp32 ones beside those that it computes with."""
    size, shared, processes = setting.weight_bytes, setting.on.shared, setting.on.processes
    if shared == "fsdp2":
        return (FP32 * trained + size * (count - trained)) / processes
    if shared.startswith("zero"):
        own = (HALF if setting.half else FP32) * count
        return own + FP32 * trained / processes
    return setting.trained_bytes * trained + size * (count - trained)


def _optimizer(setting: Setting, count: float, name: str | None = None) -> float:
    """Moments of the parameters that have been moved."""
    whole = setting.on.shared in ("one", "ddp")
    size = setting.trained_bytes if whole else FP32
    state = optimizer_bytes(name or setting.config.optim.value, size)
    return state * count / (1 if whole else setting.on.processes)


def optimizer_bytes(name: str, size: int) -> float:
    """Of the state of a parameter of `size` bytes. An optimizer that is not known counts as AdamW."""
    if "8bit" in name:
        return 2.0  # two moments of a byte each
    return size * STATES.get(name.split("_")[0], 2)


def _buckets(setting: Setting, trained: float) -> float:
    """DDP keeps gradients a second time, to reduce them; DeepSpeed a bucket."""
    if setting.on.shared == "ddp":
        return setting.trained_bytes * trained
    return HALF * min(BUCKET, trained) if setting.on.shared.startswith("zero") else 0.0


def critic_weights(setting: Setting) -> float:
    """A copy of the decoder and a value for each of its dimensions."""
    sizes = setting.sizes
    return sizes.weights - sizes.unembedding.weights + sizes.width + 1


def vllm_bytes(setting: Setting) -> float:
    """What vLLM takes for itself, whatever the model."""
    return setting.config.vllm_gpu_memory_utilization * setting.on.memory


# -- gradients -------------------------------------------------------------------------------------------------------


def _gradients(setting: Setting, count: float) -> float:
    """Between two micro-batches and when the optimizer steps."""
    shared, processes = setting.on.shared, setting.on.processes
    if shared == "fsdp2":
        return FP32 * count / processes
    if shared.startswith("zero"):
        size = HALF if setting.half else FP32
        return size * count / (1 if shared == "zero1" else processes)
    return setting.trained_bytes * count


def _kept_back(setting: Setting, count: float) -> float:
    """Between two micro-batches of an update. transformers lets FSDP2 reduce gradients at the last one only: until then each
    device holds them whole, in the type that layers compute in."""
    if setting.on.shared == "fsdp2" and not syncs_each_batch(setting):
        return (HALF if setting.half else FP32) * count
    return _gradients(setting, count)


def _found_again(setting: Setting, layer: int | None) -> float:
    """Gradients that a micro-batch of an update finds of those before it. What FSDP2 has not reduced cannot be dropped."""
    if not setting.accumulates:
        return 0.0
    whole = setting.on.shared == "fsdp2" and not syncs_each_batch(setting)
    return _kept_back(setting, setting.moved(setting.read(layer) if whole else layer))


def syncs_each_batch(setting: Setting) -> bool:
    """Whether gradients are reduced after each micro-batch (accelerate's `sync_each_batch`)."""
    given = getattr(setting.config.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(given.get("sync_each_batch"))


# -- an update -------------------------------------------------------------------------------------------------------


def _update(setting: Setting, layer: int | None, besides: int | None) -> Iterator[tuple[str, Moment]]:
    """The policy's passes over its fullest micro-batch, and what its backward pass leaves."""
    sizes, config, moved, read = setting.sizes, setting.config, setting.moved(layer), setting.read(layer)
    kept = activations(setting, layer, besides)
    if besides is not None:
        kept += setting.kept.stream  # the gradient of the layer's states, which waits for that from above
    head = _tiles(setting) + FP32 * setting.fullest.answer_tokens * sizes.width
    head_grad = float(_compute_bytes(setting) * sizes.width * sizes.vocabulary) if sizes.head.trained else 0.0
    late = {"critic": _critic_gradients(setting) if setting.accumulates else 0.0}
    start = {"gradients": _found_again(setting, layer), "activations": kept, **_gathered(setting), **late}
    twice = 1 if besides is None else 2  # the other policy's gradient of the weights waits for this one's
    yield "the unembedding is differentiated", {**start, "unembedding": head + twice * head_grad}
    # of a weight that is also the embedding's, the gradient waits for the rest of it
    waits = head_grad if sizes.tied or not setting.accumulates else 0.0
    yield "the last layer is differentiated", {**start, "activations": kept + work(setting), "unembedding": waits}
    if config.gradient_checkpointing and read != 1:
        below = kept - (setting.kept.blocks[read - 1] if read is not None else 0) + max(setting.kept.blocks)
        yield "a layer is computed again", {**start, "activations": below + work(setting), "unembedding": waits}
    own = sizes.embedding.trained * _compute_bytes(setting)
    again = own * (sizes.tied + setting.accumulates)
    left = _kept_back(setting, setting.moved(read))  # with those that are dropped now
    yield "a backward pass ends", {"gradients": left + again, **_gathered(setting), **late}
    step = FP32 * moved / setting.on.processes if setting.on.shared.startswith("zero") else 0.0
    yield "the optimizer steps", {"gradients": _gradients(setting, moved) + step}


def activations(setting: Setting, layer: int | None, besides: int | None = None) -> float:
    """What the forward pass keeps; under checkpointing of each block what it reads, but for the one whose states are read."""
    kept, config, layer = setting.kept, setting.config, setting.read(layer)
    count, seen = layer or setting.sizes.layers, layer or besides
    blocks = list(kept.blocks[:count])
    if config.gradient_checkpointing:
        blocks = [size if number == seen else kept.stream for number, size in enumerate(blocks, 1)]
    internal = seen is not None and config.internal_lens == "final_norm"
    normed = kept.after * ((layer is None) + internal)
    states = setting.fullest.answer_tokens * setting.sizes.width * setting.state_bytes * (1 if besides is None else 2)
    copies = HALF * setting.sizes.linear if setting.precision == "autocast" else 0
    if copies and layer is not None:
        copies = HALF * sum(block.linear for block in setting.sizes.blocks[:count])
    return float(kept.before + sum(blocks) + normed + states + copies)


def _tiles(setting: Setting) -> float:
    """Of logits, some rows and words at a time; their factors are fp32 in the backward pass."""
    rows, words = min(ROWS_PER_TILE, setting.fullest.answer_tokens), min(VOCABULARY_PER_TILE, setting.sizes.vocabulary)
    converted = setting.sizes.width * (rows + 2 * words) if setting.state_bytes == HALF else 0
    return float(FP32 * (TILES * rows * words + converted))


def work(setting: Setting) -> float:
    """What the backward pass of a block makes."""
    return float(AT_ONCE * setting.kept.largest + 2 * setting.kept.stream)


def _gathered(setting: Setting) -> Moment:
    """What sharded weights are whole for a while: embedding, norm and unembedding, blocks, and the gradients of a block."""
    if setting.on.shared != "fsdp2":
        return {}
    size, sizes = _compute_bytes(setting), setting.sizes
    root = sizes.embedding.weights + sizes.rest.weights + sizes.unembedding.weights
    block = max(part.weights for part in sizes.blocks)
    trained = max(part.trained for part in sizes.blocks)
    return {"gathered": size * (root + GATHERED * block + trained)}


def _compute_bytes(setting: Setting) -> int:
    """Of a weight where layers compute with it, and of its gradient there."""
    return HALF if setting.precision == "bfloat16" else FP32


# -- PPO's second model ----------------------------------------------------------------------------------------------


def _critic(setting: Setting, layer: int | None) -> Iterator[tuple[str, Moment]]:
    """Its passes, which come before the policy's of the same micro-batch."""
    if not setting.copied_critic:
        return
    policy = _found_again(setting, layer)
    again = max(setting.kept.blocks) if setting.config.gradient_checkpointing else 0
    kept = activations(setting, None) + again + work(setting)
    before = _critic_gradients(setting) if setting.accumulates else 0.0
    yield (
        "the critic is differentiated",
        {"gradients": policy, "critic": before, "activations": kept, **_gathered(setting)},
    )
    yield "the critic steps", {"gradients": policy, "critic": _critic_gradients(setting)}


def _critic_gradients(setting: Setting) -> float:
    """Reduced at once where it is sharded."""
    if not setting.copied_critic:
        return 0.0
    count = critic_weights(setting)
    return setting.trained_bytes * count if setting.on.shared.startswith("zero") else _gradients(setting, count)


# -- a rollout batch -------------------------------------------------------------------------------------------------


def _rollouts(setting: Setting) -> Iterator[tuple[str, Moment]]:
    """Answers are sampled, then scored without a gradient."""
    config, sizes = setting.config, setting.sizes
    asleep = config.use_vllm and config.vllm_mode == "colocate" and config.vllm_enable_sleep_mode
    if asleep:
        yield "answers are sampled", {"vLLM": vllm_bytes(setting)}
    elif not config.use_vllm:
        cache = setting.answers * setting.longest.row * setting.cache_bytes
        logits = AT_ONCE * FP32 * setting.answers * sizes.vocabulary
        yield "answers are sampled", {"keys and values": float(cache + logits), **_gathered(setting)}
    states = setting.fullest.answer_tokens * sizes.width * setting.state_bytes
    passing = AT_ONCE * setting.kept.largest + 3 * setting.kept.stream + 2 * states
    yield (
        "answers are scored",
        {"activations": float(passing), "unembedding": _tiles(setting), **_gathered(setting)},
    )
