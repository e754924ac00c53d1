"""Hidden states to per-token log-probability and entropy, without a (tokens x vocabulary) tensor.

Both numbers come from one pass over tiles of (positions x vocabulary entries). A running maximum `m` per position keeps

    s = sum_j exp(x_j - m)              log p(y) = (x_y - m) - log s
    u = sum_j exp(x_j - m) (x_j - m)    H(p)     = log s - u / s

so nothing is lost when logits are large, as they are when a raw residual stream (no final norm) meets the unembedding.
The backward pass computes each tile again. Everything between the matrix product and the result is fp32.

Masked vocabulary entries, whose logit is -inf or near the lowest float, have probability 0 and add 0 to `s` and `u`.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from bupo.models.unembedding import Unembedding
from bupo.utils.errors import UserError

ROWS_PER_TILE = 1024
VOCABULARY_PER_TILE = 4096
MIN_EXPONENT = -80.0  # e^-80 is 2e-35: a whole vocabulary of such tokens adds nothing in fp32, nor in fp64
MASKED_LOGIT = -1e12  # a logit that no model computes: entries below half of it are masked
UNDERFLOW_EXPONENT = -1000.0  # exp of it is 0 in fp32 and in fp64
IGNORE_INDEX = -100  # label of a position that is not scored, as in transformers

ALL_MASKED_MESSAGE = (
    "every logit of a position is masked (-inf, or near the lowest float), so it has no next token: the unembedding's bias "
    "masks the whole vocabulary; leave at least one entry unmasked"
)


class TokenScores(NamedTuple):
    """Per-position results, of the shape of the targets. Zero where the target is `-100`."""

    log_probs: torch.Tensor
    entropy: torch.Tensor  # nats


def _clamped_exp(x: torch.Tensor) -> torch.Tensor:
    """`exp(x)` of what is at most 0; `x` is raised to where it stays a normal number, as others cost a CPU tenfold."""
    return x.clamp_(min=MIN_EXPONENT).exp()


def _get_tile_slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _find_targets(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target lies in these vocabulary entries, and its column there."""
    rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero(as_tuple=True)[0]
    return rows, targets[rows] - columns.start


class _ScoreTokens(torch.autograd.Function):
    """Of states `(N, D)`: what `score_states` gives, `(N,)` each. `rule` is an unembedding's scale, softcap and temperature."""

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
                finite = new.clamp(min=torch.finfo(kind).min)  # so far all logits may be -inf: -inf - -inf is nan
                shift = torch.where(total[rows] > 0, top[rows] - finite, 0.0)  # the first tile has no old maximum
                shift = shift.clamp(
                    min=UNDERFLOW_EXPONENT
                )  # after a masked tile it is the lowest float, which times `s` is -inf
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
        made = torch.empty_like if len(hidden) else torch.zeros_like
        inputs = zip((hidden, weight, bias), (kind, weight.dtype, kind), ctx.needs_input_grad[:3], strict=True)
        of_hidden, of_weight, of_bias = (made(x, dtype=dtype) if wanted else None for x, dtype, wanted in inputs)
        for columns in _get_tile_slices(weight.size(0), VOCABULARY_PER_TILE):
            tile = head.slice_vocab(columns)
            summed = None if of_weight is None else of_weight[columns].to(kind)  # itself, if it is of that type
            for rows in _get_tile_slices(len(hidden), ROWS_PER_TILE):
                states = hidden[rows]
                x = tile.logits(states.to(ctx.dtype))
                log_p = torch.sub(x, (top[rows] + log_total[rows])[:, None], out=None if head.softcap else x)
                of_log_probs, of_entropy = (None if grad is None else grad[rows] for grad in upstream)
                grad = _compute_logit_grad(
                    log_p, entropy[rows], _find_targets(targets[rows], columns), of_log_probs, of_entropy
                )
                grad = tile.compute_product_grad(grad, x)
                # what is first in a place writes, the others add: nothing is filled with zeros
                if of_hidden is not None:
                    of_hidden[rows].addmm_(grad, tile.weight.to(kind), beta=columns.start > 0)
                if summed is not None:
                    summed.addmm_(grad.t(), states.to(kind), beta=rows.start > 0)
                if of_bias is not None:
                    of_bias[columns] = grad.sum(0) + (of_bias[columns] if rows.start else 0)
            if of_weight is not None and summed is not None and of_weight.dtype != kind:
                of_weight[columns] = summed
        of_hidden, of_bias = (g if g is None else g.to(x.dtype) for g, x in ((of_hidden, hidden), (of_bias, bias)))
        return of_hidden, of_weight, of_bias, None, None, None


def _compute_logit_grad(log_p, entropy, hits, grad_log_probs, grad_entropy) -> torch.Tensor:
    """The gradient of a tile's logits, `(rows, columns)`; `hits` is where the chosen tokens stand in it.

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
    """[`score_tokens`] of states `(..., D)` through an unembedding."""
    if head.temperature <= 0:
        raise ValueError(f"temperature must be positive, got {head.temperature}")
    scored = targets != IGNORE_INDEX
    wanted = targets[scored]
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < head.weight.size(0):
        raise ValueError(f"targets must be token ids below {head.weight.size(0)} or {IGNORE_INDEX}")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    rule = (head.scale, head.softcap, head.temperature)
    # a selection costs a copy, and its gradient another
    states = hidden[scored] if wanted.numel() < targets.numel() else hidden.reshape(-1, hidden.size(-1))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        log_probs, entropy = _ScoreTokens.apply(states, head.weight, head.bias, wanted, rule, dtype)
    return scatter_scores(TokenScores(log_probs, entropy), scored)


def scatter_scores(scores: TokenScores, scored: torch.Tensor) -> TokenScores:
    """`(n,)` scores at the n places that are scored, zeros elsewhere."""
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
    """Log-probability of each target and entropy (nats) of each policy `softmax(softcap(scale (h W^T + b)) / T)`.

    Differentiable in `hidden`, `weight` and `bias`. Positions whose target is `-100` are not computed at all: they give
    zeros and receive no gradient. Under autocast the matrix product takes factors of autocast's type, as a linear layer
    would.

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
