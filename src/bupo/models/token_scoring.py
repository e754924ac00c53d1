"""Per-token log-probability and entropy from hidden states, without a (tokens x vocabulary) tensor.

Both numbers come from one pass over tiles of (positions x vocabulary entries). A running maximum `m` per position keeps

    s = sum_j exp(x_j - m)              log p(y) = (x_y - m) - log s
    u = sum_j exp(x_j - m) (x_j - m)    H(p)     = log s - u / s

so no precision is lost for large logits, such as those of a raw residual stream (without the final norm). The backward pass
recomputes each tile. All computation after the matrix product is in fp32.

Masked vocabulary entries, whose logit is -inf or near the lowest float, have probability 0 and add 0 to `s` and `u`.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from bupo.models.unembedding import Unembedding
from bupo.utils.errors import UserError

ROWS_PER_TILE = 1024
VOCABULARY_PER_TILE = 4096
MIN_EXPONENT = -80.0  # e^-80 is 2e-35: a full vocabulary of such tokens adds nothing in fp32 or fp64
MASKED_LOGIT = -1e12  # below any computed logit; entries below half of it count as masked
UNDERFLOW_EXPONENT = -1000.0  # exp of it is 0 in fp32 and in fp64
IGNORE_INDEX = -100  # label of a position that is not scored, as in transformers

ALL_MASKED_MESSAGE = (
    "every logit of a position is masked (-inf, or near the lowest float), so it has no next token: the unembedding's bias "
    "masks the full vocabulary; leave at least one entry unmasked"
)


class TokenScores(NamedTuple):
    """Per-position results, of the shape of the targets. Zero where the target is `-100`."""

    log_probs: torch.Tensor
    entropy: torch.Tensor  # nats


def _clamped_exp(x: torch.Tensor) -> torch.Tensor:
    """Return `exp(x)` for `x <= 0`, clamped to normal numbers: denormal ones take a CPU ten times as long."""
    return x.clamp_(min=MIN_EXPONENT).exp()


def _get_tile_slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _find_targets(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows whose target is among these vocabulary entries, and the target's column in the tile."""
    rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero(as_tuple=True)[0]
    return rows, targets[rows] - columns.start


class _ScoreTokens(torch.autograd.Function):
    """Autograd function of [`score_states`]: log-probs and entropies `(n,)` of states `(n, D)`.

    `rule` holds the unembedding's scale, softcap and temperature.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rule, dtype):
        head = Unembedding(weight, bias, *rule)
        n, kind = hidden.size(0), torch.float64 if dtype == torch.float64 else torch.float32
        top = hidden.new_full((n,), -torch.inf, dtype=kind)
        total = hidden.new_zeros(n, dtype=kind)  # s
        moment = hidden.new_zeros(n, dtype=kind)  # u
        chosen = hidden.new_zeros(n, dtype=kind)  # x_y
        for columns in _get_tile_slices(weight.size(0), VOCABULARY_PER_TILE):
            tile = head.slice_vocab(columns, dtype)
            for rows in _get_tile_slices(n, ROWS_PER_TILE):
                x = tile.logits(hidden[rows].to(dtype))
                at, column = _find_targets(targets[rows], columns)
                chosen[rows][at] = x[at, column]
                new = torch.maximum(top[rows], x.amax(1))
                # all logits up to here may be -inf, and -inf - -inf is NaN
                finite = new.clamp(min=torch.finfo(kind).min)
                shift = torch.where(total[rows] > 0, top[rows] - finite, 0.0)  # the first tile has no old maximum
                # the lowest float after a masked tile: times `s`, it is -inf
                shift = shift.clamp(min=UNDERFLOW_EXPONENT)
                weights = _clamped_exp(x.sub_(finite[:, None]))
                moment[rows] = shift.exp() * (moment[rows] + shift * total[rows]) + torch.linalg.vecdot(weights, x)
                total[rows] = shift.exp() * total[rows] + weights.sum(1)
                top[rows] = new
        if bool((top < MASKED_LOGIT / 2).any()):
            raise UserError(ALL_MASKED_MESSAGE)
        log_total = total.log()
        entropy = log_total - moment / total
        ctx.save_for_backward(hidden, weight, bias, targets, top, log_total, entropy)
        ctx.rule, ctx.dtype = rule, dtype
        ctx.set_materialize_grads(False)
        return chosen - top - log_total, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        hidden, weight, bias, targets, top, log_total, entropy = ctx.saved_tensors
        if all(grad is None for grad in upstream):
            return (None,) * 6
        head, kind = Unembedding(weight, bias, *ctx.rule), top.dtype
        allocate = torch.empty_like if len(hidden) else torch.zeros_like
        inputs = zip((hidden, weight, bias), (kind, weight.dtype, kind), ctx.needs_input_grad[:3], strict=True)
        hidden_grad, weight_grad, bias_grad = (
            allocate(x, dtype=dtype) if needed else None for x, dtype, needed in inputs
        )
        for columns in _get_tile_slices(weight.size(0), VOCABULARY_PER_TILE):
            tile = head.slice_vocab(columns)
            # a view of the gradient if the dtypes are equal
            tile_weight_grad = None if weight_grad is None else weight_grad[columns].to(kind)
            for rows in _get_tile_slices(len(hidden), ROWS_PER_TILE):
                states = hidden[rows]
                x = tile.logits(states.to(ctx.dtype))
                log_p = torch.sub(x, (top[rows] + log_total[rows])[:, None], out=None if head.softcap else x)
                log_prob_grad, entropy_grad = (None if grad is None else grad[rows] for grad in upstream)
                grad = _compute_logit_grad(
                    log_p, entropy[rows], _find_targets(targets[rows], columns), log_prob_grad, entropy_grad
                )
                grad = tile.compute_product_grad(grad, x)
                # the first tile writes and the others add, so no buffer needs zeros
                if hidden_grad is not None:
                    hidden_grad[rows].addmm_(grad, tile.weight.to(kind), beta=columns.start > 0)
                if tile_weight_grad is not None:
                    tile_weight_grad.addmm_(grad.t(), states.to(kind), beta=rows.start > 0)
                if bias_grad is not None:
                    bias_grad[columns] = grad.sum(0) + (bias_grad[columns] if rows.start else 0)
            if weight_grad is not None and tile_weight_grad is not None and weight_grad.dtype != kind:
                weight_grad[columns] = tile_weight_grad
        if hidden_grad is not None:
            hidden_grad = hidden_grad.to(hidden.dtype)
        if bias_grad is not None:
            bias_grad = bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _compute_logit_grad(log_p, entropy, hits, grad_log_probs, grad_entropy) -> torch.Tensor:
    """Return the gradient of a tile's logits, `(rows, columns)`; `hits` holds the indices of the target tokens.

    d log p(y) / dx_j = [j = y] - p_j          dH / dx_j = -p_j (log p_j + H)
    """
    grad = _clamped_exp(log_p)
    if grad_entropy is not None:
        slope = (log_p + entropy[:, None]).mul_(-grad_entropy[:, None])
        grad *= slope if grad_log_probs is None else slope.sub_(grad_log_probs[:, None])
    elif grad_log_probs is not None:
        grad *= -grad_log_probs[:, None]
    if grad_log_probs is not None:
        grad[hits] += grad_log_probs[hits[0]]
    return grad


def score_states(hidden: torch.Tensor, head: Unembedding, targets: torch.Tensor) -> TokenScores:
    """Score states `(..., D)` with an unembedding; see [`score_tokens`]."""
    if head.temperature <= 0:
        raise ValueError(f"temperature must be positive, got {head.temperature}")
    scored = targets != IGNORE_INDEX
    labels = targets[scored]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < head.weight.size(0):
        raise ValueError(f"targets must be token ids below {head.weight.size(0)} or {IGNORE_INDEX}")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    rule = (head.scale, head.softcap, head.temperature)
    # indexing copies the states, and their gradient
    states = hidden[scored] if labels.numel() < targets.numel() else hidden.reshape(-1, hidden.size(-1))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        log_probs, entropy = _ScoreTokens.apply(states, head.weight, head.bias, labels, rule, dtype)
    return scatter_scores(TokenScores(log_probs, entropy), scored)


def scatter_scores(scores: TokenScores, scored: torch.Tensor) -> TokenScores:
    """Scatter `(n,)` scores to the n scored positions. Other positions get zeros."""
    # masked_scatter keeps the result connected to the model when nothing is scored: a differentiable zero
    empty = scores.log_probs.new_zeros(scored.shape)
    return TokenScores(*(empty.masked_scatter(scored, value) for value in scores))


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> TokenScores:
    """Compute the log-probability of each target and the entropy (nats) of `softmax(softcap(scale (h W^T + b)) / T)`.

    Differentiable in `hidden`, `weight` and `bias`. Positions whose target is `-100` are skipped: they return zeros and receive
    no gradient. Under autocast, the matrix product uses autocast's dtype, like a linear layer.

    Args:
        hidden (`torch.Tensor` of shape `(..., D)`): states of the positions, fp32, bf16, fp16 or fp64.
        weight (`torch.Tensor` of shape `(V, D)`): unembedding matrix.
        targets (`torch.Tensor` of shape `(...)`): token ids below V, or `-100`.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): bias of the unembedding.
        scale (`float`, *optional*, defaults to `1.0`): factor of the logits, before the softcap.
        softcap (`float`, *optional*): `c` in `c tanh(x / c)`.
        temperature (`float`, *optional*, defaults to `1.0`): divides the logits last.

    Returns:
        [`TokenScores`]: two tensors of the shape of `targets`, fp32 (fp64 for fp64 states).

    Raises:
        ValueError: if a target is outside the vocabulary, or the temperature is not positive.
        UserError: if all logits of a position are masked.
    """
    return score_states(hidden, Unembedding(weight, bias, scale, softcap, temperature), targets)
