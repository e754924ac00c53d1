"""FLOPs of a rollout batch on one device, a multiplication and an addition being two.

A layer costs a token two FLOPs for each entry of its matrices, and attention `2 heads (d_key + d_value)` for each pair of
tokens that it multiplies. The backward pass is that for the gradient of what a layer reads and once more for the gradient of
its weights; of attention, whose products are computed again, it is two and a half times the forward pass (Dao, arXiv
2307.08691).
"""

from dataclasses import asdict, dataclass

from bupo.planning.micro_batches import MicroBatch
from bupo.planning.planned_run import PlannedRun

ATTENTION_BACKWARD_FACTOR = 2.5


@dataclass(frozen=True)
class Flops:
    """Of one device and rollout batch; `scoring` comes before the updates, `recomputed` is gradient checkpointing's."""

    sampling: float
    scoring: float
    forward: float
    backward: float
    recomputed: float
    critic: float

    @property
    def update(self) -> float:
        return self.forward + self.backward + self.recomputed + self.critic

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def count_flops(setting: PlannedRun, layer: int | None, besides: int | None = None) -> Flops:
    """Of a rollout batch that optimises a stage's layer, or the whole policy, and a layer's besides."""
    layer = setting.get_last_layer(layer)
    count, policies = layer or setting.sizes.layers, 1 if besides is None else 2
    often = setting.config.num_iterations
    forward = sum(
        count_layers_forward(setting, batch, count) + policies * count_head_forward(setting, batch)
        for batch in setting.micro_batches
    )
    backward = sum(
        count_layers_backward(setting, batch, count) + policies * count_head_backward(setting, batch)
        for batch in setting.micro_batches
    )
    recomputed = sum(_count_recomputed(setting, batch, count, layer or besides) for batch in setting.micro_batches)
    return Flops(
        count_sampling(setting),
        count_scoring(setting, layer, besides),
        often * forward,
        often * backward,
        often * recomputed,
        often * count_critic_updates(setting),
    )


def _count_recomputed(setting: PlannedRun, batch: MicroBatch, count: int, seen: int | None) -> float:
    """By gradient checkpointing, of the first so many layers: one whose states are read keeps its activations."""
    if not setting.config.gradient_checkpointing:
        return 0.0
    kept = (
        0.0
        if seen is None
        else count_layers_forward(setting, batch, seen) - count_layers_forward(setting, batch, seen - 1)
    )
    return count_layers_forward(setting, batch, count) - kept


def count_layers_forward(setting: PlannedRun, batch: MicroBatch, count: int) -> float:
    """A forward pass of the first so many layers."""
    return sum(_count_matmuls(setting, batch, i) + _count_attention(setting, batch, i) for i in range(count))


def _count_matmuls(setting: PlannedRun, batch: MicroBatch, index: int) -> float:
    return 2.0 * setting.sizes.blocks[index].active * batch.num_tokens


def _count_attention(setting: PlannedRun, batch: MicroBatch, index: int) -> float:
    if index >= len(setting.attention_shapes):  # a layer without attention
        return 0.0
    each = setting.attention_shapes[index]
    return 2.0 * each.heads * (each.key + each.value) * batch.count_attention_pairs(each.window)


def count_layers_backward(setting: PlannedRun, batch: MicroBatch, count: int) -> float:
    """Down to the lowest layer that trains; weights that do not train need no gradient of theirs."""
    sizes = setting.sizes
    trains = sizes.embedding.trained > 0
    found = 0.0
    for index, block in enumerate(sizes.blocks[:count]):
        trains = trains or block.trained > 0
        if trains:
            found += _count_matmuls(setting, batch, index) + 2.0 * block.active_trained * batch.num_tokens
            found += ATTENTION_BACKWARD_FACTOR * _count_attention(setting, batch, index)
    return found


def count_head_forward(setting: PlannedRun, batch: MicroBatch) -> float:
    """The unembedding on the answers' positions."""
    return 2.0 * setting.sizes.width * setting.sizes.vocabulary * batch.completion_tokens


def count_head_backward(setting: PlannedRun, batch: MicroBatch) -> float:
    """Logits are computed again, and give the states' gradient and that of the weights, if they train."""
    return (3 if setting.sizes.head.trained else 2) * count_head_forward(setting, batch)


def count_scoring(setting: PlannedRun, layer: int | None, besides: int | None = None) -> float:
    """Forward passes over the whole rollout batch: old log-probs, entropies, the reference's, PPO's values.

    Of a layer's policy, the whole one, or of both in one pass.
    """
    config, sizes = setting.config, setting.sizes
    batches = setting.scoring_batches
    whole = sum(count_layers_forward(setting, batch, sizes.layers) for batch in batches)
    heads = sum(count_head_forward(setting, batch) for batch in batches)
    mine = sum(count_layers_forward(setting, batch, layer or sizes.layers) for batch in batches) + heads
    found = 0.0
    if layer is not None:
        found += whole + 2 * heads  # pi_theta's entropies and the layer's log-probs, from one pass
    elif besides is not None:
        scored = should_score_old_policy(setting) or config.use_vllm  # a sampler's log-probs are moved by the old ones
        found += (whole + 2 * heads) * (scored + (config.beta != 0))
    elif should_score_old_policy(setting):
        found += whole + heads
    if config.beta != 0 and besides is None:
        found += mine
    if setting.has_copied_critic:
        found += whole
    elif config.advantage_estimator == "ppo":
        found += mine
    return found


def should_score_old_policy(setting: PlannedRun) -> bool:
    """Whether TRL scores the answers before it updates: one update a rollout batch is its own old policy."""
    config = setting.config
    aligned = config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) == 0
    return not aligned or bool(config.use_vllm and config.vllm_importance_sampling_correction)


def count_critic_updates(setting: PlannedRun) -> float:
    """Forward and backward passes of PPO's second model; a head on the policy's states costs next to nothing."""
    if not setting.has_copied_critic:
        return 0.0
    count, often = setting.sizes.layers, 2 if setting.config.gradient_checkpointing else 1
    return sum(
        often * count_layers_forward(setting, batch, count) + count_layers_backward(setting, batch, count)
        for batch in setting.micro_batches
    )


def count_sampling(setting: PlannedRun) -> float:
    """Prompts, each once but for `generate` on a GPU, and each answer's tokens one by one."""
    lengths, sizes = setting.mean_lengths, setting.sizes
    shared = setting.config.use_vllm or setting.hardware.is_cpu
    prompts = setting.num_prompts if shared else float(setting.num_completions)
    met = sum(block.active for block in sizes.blocks)
    tokens = prompts * lengths.prompt + setting.num_completions * lengths.completion
    products = 2.0 * met * tokens + 2.0 * sizes.width * sizes.vocabulary * setting.num_completions * lengths.completion
    a_pair = sum(2.0 * each.heads * (each.key + each.value) for each in setting.attention_shapes)
    pairs = prompts * lengths.prompt**2 / 2 + setting.num_completions * lengths.completion * (
        lengths.prompt + lengths.completion / 2
    )
    return products + a_pair * pairs
