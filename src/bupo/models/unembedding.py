"""The unembedding, from hidden states to logits: `softcap(scale (h W^T + b)) / T`."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Unembedding:
    """The unembedding of the full vocabulary, or of a tile of it.

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
        """The dtype for states of large products. On a CPU it is at least fp32: products of 16-bit factors lose precision."""
        return self.weight.dtype if self.weight.is_cuda else torch.promote_types(self.weight.dtype, torch.float32)

    def slice_vocab(self, columns: slice, dtype: torch.dtype | None = None) -> "Unembedding":
        """Return the unembedding of a part of the vocabulary, optionally converted to `dtype`."""
        weight = self.weight[columns]
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, weight=weight if dtype is None else weight.to(dtype), bias=bias)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits `(..., V)` of states `(..., D)`, in fp32 (fp64 for fp64 states).

        The matrix product uses the dtype of the states. With `out`, `(n, V)`, the result is not differentiable.
        """
        x = _matmul_fp32(hidden, self.weight.to(hidden.dtype), out)
        if self.bias is not None:
            x += self.bias
        if self.scale != 1.0:
            x *= self.scale
        if self.softcap is not None:
            x = x.div_(self.softcap).tanh_()
            # autograd needs the output of tanh
            x = x * self.softcap if x.requires_grad else x.mul_(self.softcap)
        if self.temperature != 1.0:
            x /= self.temperature
        return x

    def compute_product_grad(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Convert the gradient of the logits to that of `h W^T + b`, in place."""
        if self.softcap is not None:
            grad *= 1 - (logits * (self.temperature / self.softcap)).square()
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


def _matmul_fp32(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Return `hidden @ weight.T`, accumulated in fp32 also for 16-bit factors."""
    if hidden.dtype in (torch.float32, torch.float64):
        return torch.matmul(hidden, weight.t(), out=out)
    if hidden.is_cuda:
        product = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        product = hidden.float() @ weight.float().t()
    return product if out is None else out.copy_(product)
