"""The one place where hidden states become logits: `softcap(scale (h W^T + b)) / T`."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Unembedding:
    """What stands between states and logits, of the whole vocabulary or of a tile of it.

    Args:
        weight (`torch.Tensor` of shape `(V, D)`): the matrix.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): added to the product.
        scale (`float`, *optional*, defaults to `1.0`): factor of the logits, before the softcap.
        softcap (`float`, *optional*): `c` in `c tanh(x / c)`.
        temperature (`float`, *optional*, defaults to `1.0`): divides the logits last.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def state_dtype(self) -> torch.dtype:
        """What states should be where many meet the weights: a CPU sums no product of 16-bit factors in fp32."""
        return self.weight.dtype if self.weight.is_cuda else torch.promote_types(self.weight.dtype, torch.float32)

    def slice_vocab(self, columns: slice, dtype: torch.dtype | None = None) -> "Unembedding":
        """A part of the vocabulary; `dtype` converts it once for all states that are to meet it."""
        weight = self.weight[columns]
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, weight=weight if dtype is None else weight.to(dtype), bias=bias)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """States `(..., D)` to logits `(..., V)`, fp32 whatever the factors' type (fp64 for fp64 states).

        The factors of the product have the states' type. Differentiable, but where `out`, `(rows, V)`, is to hold the result.
        """
        x = _matmul_fp32(hidden, self.weight.to(hidden.dtype), out)
        if self.bias is not None:
            x += self.bias
        if self.scale != 1.0:
            x *= self.scale
        if self.softcap is not None:
            x = x.div_(self.softcap).tanh_()
            # autograd keeps what tanh gave
            x = x * self.softcap if x.requires_grad else x.mul_(self.softcap)
        if self.temperature != 1.0:
            x /= self.temperature
        return x

    def compute_product_grad(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of `h W^T + b` from that of the logits, in place."""
        if self.softcap is not None:
            grad *= 1 - (logits * (self.temperature / self.softcap)).square()
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


def _matmul_fp32(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """`hidden @ weight.T` with fp32 accumulation and an fp32 result, whatever the factors' type."""
    if hidden.dtype in (torch.float32, torch.float64):
        return torch.matmul(hidden, weight.t(), out=out)
    if hidden.is_cuda:
        found = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        found = hidden.float() @ weight.float().t()
    return found if out is None else out.copy_(found)
