"""FLOPs of a rollout batch on one device; a multiply-add counts as two.

Forward pass: two FLOPs per token and matrix entry, and `2 heads (d_key + d_value)` per pair of tokens in attention. Backward
pass: the same again for the gradient of a layer's input, and once more for the gradient of its weights. Attention recomputes
its products, so its backward pass costs 2.5 times the forward pass (Dao, arXiv 2307.08691).
"""

from dataclasses import asdict, dataclass

from bupo.planning.micro_batches import MicroBatch
from bupo.planning.planned_run import PlannedRun

ATTENTION_BACKWARD_FACTOR = 2.5


@dataclass(frozen=True)
class Flops:
    """FLOPs of one device and rollout batch; `scoring` precedes the updates, `recomputed` is gradient checkpointing."""

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


def count_flops(run: PlannedRun, layer: int | None, auxiliary_layer: int | None = None) -> Flops:
    """Count the FLOPs of a rollout batch.

    Args:
        run ([`PlannedRun`]): the run.
        layer (`int`, *optional*): the layer whose policy is optimised; `None` for the full model.
        auxiliary_layer (`int`, *optional*): a layer whose auxiliary objective is added in phase 2.
    """
    layer = run.get_last_layer(layer)
    num_layers, policies = layer or run.sizes.layers, 1 if auxiliary_layer is None else 2
    iterations = run.config.num_iterations
    forward = sum(
        count_layers_forward(run, batch, num_layers) + policies * count_head_forward(run, batch)
        for batch in run.micro_batches
    )
    backward = sum(
        count_layers_backward(run, batch, num_layers) + policies * count_head_backward(run, batch)
        for batch in run.micro_batches
    )
    recomputed = sum(_count_recomputed(run, batch, num_layers, layer or auxiliary_layer) for batch in run.micro_batches)
    return Flops(
        count_sampling(run),
        count_scoring(run, layer, auxiliary_layer),
        iterations * forward,
        iterations * backward,
        iterations * recomputed,
        iterations * count_critic_updates(run),
    )


def _count_recomputed(run: PlannedRun, batch: MicroBatch, num_layers: int, scored_layer: int | None) -> float:
    """Count the FLOPs that gradient checkpointing repeats. A layer whose states are scored keeps its activations."""
    if not run.config.gradient_checkpointing:
        return 0.0
    not_repeated = (
        0.0
        if scored_layer is None
        else count_layers_forward(run, batch, scored_layer) - count_layers_forward(run, batch, scored_layer - 1)
    )
    return count_layers_forward(run, batch, num_layers) - not_repeated


def count_layers_forward(run: PlannedRun, batch: MicroBatch, num_layers: int) -> float:
    """Count a forward pass of the first `num_layers` layers."""
    return sum(_count_matmuls(run, batch, i) + _count_attention(run, batch, i) for i in range(num_layers))


def _count_matmuls(run: PlannedRun, batch: MicroBatch, index: int) -> float:
    return 2.0 * run.sizes.blocks[index].active * batch.num_tokens


def _count_attention(run: PlannedRun, batch: MicroBatch, index: int) -> float:
    if index >= len(run.attention_shapes):  # a layer without attention
        return 0.0
    shape = run.attention_shapes[index]
    return 2.0 * shape.heads * (shape.key + shape.value) * batch.count_attention_pairs(shape.window)


def count_layers_backward(run: PlannedRun, batch: MicroBatch, num_layers: int) -> float:
    """Count a backward pass down to the lowest trained layer; frozen weights need no gradient."""
    sizes = run.sizes
    trains = sizes.embedding.trained > 0
    flops = 0.0
    for index, block in enumerate(sizes.blocks[:num_layers]):
        trains = trains or block.trained > 0
        if trains:
            flops += _count_matmuls(run, batch, index) + 2.0 * block.active_trained * batch.num_tokens
            flops += ATTENTION_BACKWARD_FACTOR * _count_attention(run, batch, index)
    return flops


def count_head_forward(run: PlannedRun, batch: MicroBatch) -> float:
    """Count the unembedding on the answers' positions."""
    return 2.0 * run.sizes.width * run.sizes.vocabulary * batch.completion_tokens


def count_head_backward(run: PlannedRun, batch: MicroBatch) -> float:
    """Count the recomputed logits, the gradient of the states and, if they train, of the weights."""
    return (3 if run.sizes.head.trained else 2) * count_head_forward(run, batch)


def count_scoring(run: PlannedRun, layer: int | None, auxiliary_layer: int | None = None) -> float:
    """Count the forward passes over a rollout batch: old log-probs, entropies, reference log-probs and PPO's values.

    They score a layer's policy, the full model, or both in one pass.
    """
    config, sizes = run.config, run.sizes
    batches = run.scoring_batches
    full = sum(count_layers_forward(run, batch, sizes.layers) for batch in batches)
    heads = sum(count_head_forward(run, batch) for batch in batches)
    optimised = sum(count_layers_forward(run, batch, layer or sizes.layers) for batch in batches) + heads
    flops = 0.0
    if layer is not None:
        flops += full + 2 * heads  # one pass gives the full model's entropies and the layer's log-probs
    elif auxiliary_layer is not None:
        # with vLLM, the importance weights need the old log-probs
        scores_old = should_score_old_policy(run) or config.use_vllm
        flops += (full + 2 * heads) * (scores_old + (config.beta != 0))
    elif should_score_old_policy(run):
        flops += full + heads
    if config.beta != 0 and auxiliary_layer is None:
        flops += optimised
    if run.has_copied_critic:
        flops += full
    elif config.advantage_estimator == "ppo":
        flops += optimised
    return flops


def should_score_old_policy(run: PlannedRun) -> bool:
    """Return whether TRL scores the answers before the updates. A single update is its own old policy and skips it."""
    config = run.config
    aligned = config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) == 0
    return not aligned or bool(config.use_vllm and config.vllm_importance_sampling_correction)


def count_critic_updates(run: PlannedRun) -> float:
    """Count the passes of PPO's separate critic; a value head on the policy's states is negligible."""
    if not run.has_copied_critic:
        return 0.0
    num_layers, num_forward = run.sizes.layers, 2 if run.config.gradient_checkpointing else 1
    return sum(
        num_forward * count_layers_forward(run, batch, num_layers) + count_layers_backward(run, batch, num_layers)
        for batch in run.micro_batches
    )


def count_sampling(run: PlannedRun) -> float:
    """Count sampling: a prefill per prompt (`generate` on a GPU: per answer) and a decoding step per answer token."""
    lengths, sizes = run.mean_lengths, run.sizes
    shared = run.config.use_vllm or run.hardware.is_cpu
    prompts = run.num_prompts if shared else float(run.num_completions)
    active = sum(block.active for block in sizes.blocks)
    tokens = prompts * lengths.prompt + run.num_completions * lengths.completion
    products = 2.0 * active * tokens + 2.0 * sizes.width * sizes.vocabulary * run.num_completions * lengths.completion
    flops_per_pair = sum(2.0 * shape.heads * (shape.key + shape.value) for shape in run.attention_shapes)
    pairs = prompts * lengths.prompt**2 / 2 + run.num_completions * lengths.completion * (
        lengths.prompt + lengths.completion / 2
    )
    return products + flops_per_pair * pairs
