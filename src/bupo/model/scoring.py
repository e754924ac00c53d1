"""Hidden states to per-token log-probability and entropy, without a (tokens x vocabulary) tensor.

Both numbers come from one pass over tiles of (positions x vocabulary entries). A running maximum `m` per position keeps

    s = sum_j exp(x_j - m)              log p(y) = (x_y - m) - log s
    u = sum_j exp(x_j - m) (x_j - m)    H(p)     = log s - u / s

so nothing is lost when logits are large, as they are when a raw residual stream (no final norm) meets the unembedding.
The backward pass computes each tile again. Everything between the matrix product and the result is fp32.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch

ROWS_PER_TILE = 1024
VOCABULARY_PER_TILE = 8192
IGNORED = -100  # label of a position that is not scored, as in transformers


class TokenScores(NamedTuple):
    """Per-position results, of the shape of the targets. Zero where the target is `-100`."""

    log_probs: torch.Tensor
    entropy: torch.Tensor  # nats


class _LogitRule(NamedTuple):
    """How a product `h @ w` becomes a logit: `softcap(scale * (h @ w + b)) / temperature`."""

    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype  # of the factors; the product is fp32

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(N, D), (V, D), (V) -> (N, V) in fp32 (fp64 for fp64 factors)."""
        x = _product(hidden.to(self.dtype), weight.to(self.dtype))
        if bias is not None:
            x += bias
        if self.scale != 1.0:
            x *= self.scale
        if self.softcap is not None:
            x = x.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            x /= self.temperature
        return x

    def chain(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the product from the gradient of the logits, in place."""
        if self.softcap is not None:
            grad *= 1 - (logits * (self.temperature / self.softcap)).square()
        return grad.mul_(self.scale / self.temperature)


def _product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden @ weight.T` with fp32 accumulation and an fp32 result, whatever the factors' type."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


def _tiles(rows: int, vocabulary: int):
    for row in range(0, rows, ROWS_PER_TILE):
        for entry in range(0, vocabulary, VOCABULARY_PER_TILE):
            yield slice(row, row + ROWS_PER_TILE), slice(entry, entry + VOCABULARY_PER_TILE)


def _hits(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target lies in these vocabulary entries, and its column there."""
    rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero(as_tuple=True)[0]
    return rows, targets[rows] - columns.start


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rule):
        n, kind = hidden.size(0), torch.float64 if rule.dtype == torch.float64 else torch.float32
        top = hidden.new_full((n,), -torch.inf, dtype=kind)
        total = hidden.new_zeros(n, dtype=kind)  # s
        moment = hidden.new_zeros(n, dtype=kind)  # u
        chosen = hidden.new_zeros(n, dtype=kind)  # x_y
        for rows, columns in _tiles(n, weight.size(0)):
            x = rule.logits(hidden[rows], weight[columns], None if bias is None else bias[columns])
            at, column = _hits(targets[rows], columns)
            chosen[rows][at] = x[at, column]
            new = torch.maximum(top[rows], x.amax(1))
            shift = torch.where(total[rows] > 0, top[rows] - new, 0.0)  # the first tile has no old maximum
            x -= new[:, None]
            weights = x.exp()
            moment[rows] = shift.exp() * (moment[rows] + shift * total[rows]) + torch.linalg.vecdot(weights, x)
            total[rows] = shift.exp() * total[rows] + weights.sum(1)
            top[rows] = new
        log_total = total.log()
        entropy = log_total - moment / total
        ctx.save_for_backward(hidden, weight, bias, targets, top, log_total, entropy)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        return chosen - top - log_total, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, bias, targets, top, log_total, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        kind = top.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=kind) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=kind) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=kind) if wants_bias else None
        for rows, columns in _tiles(hidden.size(0), weight.size(0)):
            x = ctx.rule.logits(hidden[rows], weight[columns], None if bias is None else bias[columns])
            log_p = x - top[rows, None] - log_total[rows, None]
            # d log p(y) / dx_j = [j = y] - p_j          dH / dx_j = -p_j (log p_j + H)
            grad = log_p.exp()
            slope = torch.zeros_like(log_p)
            if grad_log_probs is not None:
                slope -= grad_log_probs[rows, None]
            if grad_entropy is not None:
                slope -= grad_entropy[rows, None] * (log_p + entropy[rows, None])
            grad *= slope
            if grad_log_probs is not None:
                at, column = _hits(targets[rows], columns)
                grad[at, column] += grad_log_probs[rows][at]
            grad = ctx.rule.chain(grad, x)
            if grad_hidden is not None:
                grad_hidden[rows] += grad @ weight[columns].to(kind)
            if grad_weight is not None:
                grad_weight[columns] += grad.t() @ hidden[rows].to(kind)
            if grad_bias is not None:
                grad_bias[columns] += grad.sum(0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


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
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scored = targets != IGNORED
    wanted = targets[scored]
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < weight.size(0):
        raise ValueError(f"targets must be token ids below {weight.size(0)} or {IGNORED}")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    rule = _LogitRule(scale, softcap, temperature, torch.get_autocast_dtype(device) if autocast else hidden.dtype)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        log_probs, entropy = _ScoreTokens.apply(hidden[scored], weight, bias, wanted, rule)
    # masked_scatter keeps the result connected to the model when nothing is scored: a differentiable zero
    empty = log_probs.new_zeros(targets.shape)
    return TokenScores(empty.masked_scatter(scored, log_probs), empty.masked_scatter(scored, entropy))
