"""Activations that a forward pass saves for its backward pass, counted by running the model's code on the meta device.

Attention is the exception, because its kernel depends on the device: it counts as flash attention, which saves its inputs, its
output and one number per row and head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from bupo.models.hooks import add_input_hook, add_output_hook
from bupo.models.packing import PackedDecoder, PackedLayout
from bupo.models.residual_stream import unwrap_causal_lm

ATTENTION_NAME = "bupo_planned"  # attention implementation registered with transformers
EXPERT_WEIGHT_DIMS = 3  # dimensions of a parameter that stacks the matrices of all experts


@dataclass(frozen=True)
class AttentionShape:
    """Heads of an attention call, which takes `2 heads (key + value)` FLOPs per pair of tokens."""

    heads: int
    key: int
    value: int
    kv_heads: int
    window: int | None = None


@dataclass
class SavedActivations:
    """Bytes that one forward pass of a decoder saves.

    Attributes:
        before_blocks, after_blocks (`int`): before the first block, and after the last one (the final norm).
        blocks (`list[int]`): by block.
        residual_stream (`int`): of the states between two blocks.
        largest_tensor (`int`): of the largest tensor that a block saves.
        attention_shapes (`list[AttentionShape]`): attention calls in order.
    """

    before_blocks: int = 0
    after_blocks: int = 0
    blocks: list[int] = field(default_factory=list)
    residual_stream: int = 0
    largest_tensor: int = 0
    attention_shapes: list[AttentionShape] = field(default_factory=list)


class _FlashAttentionStub(torch.autograd.Function):
    """Stub that saves the same tensors as flash attention and computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = query.new_empty((*query.shape[:-1], value.size(-1)))
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *upstream):
        raise NotImplementedError("this stub has no backward pass")


def _make_attention(shapes: list[AttentionShape], dtype: torch.dtype | None) -> Callable:
    """Return an attention function for transformers that appends its shapes to a list; `dtype` is autocast's.

    With a mask it counts like attention on a CPU, which repeats shared keys and values for each head.
    """

    def attend(module: nn.Module, query, key, value, attention_mask, **kwargs):
        shapes.append(
            AttentionShape(query.size(1), query.size(3), value.size(3), key.size(1), kwargs.get("sliding_window"))
        )
        if dtype:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = None
        if attention_mask is not None:
            mask = query.new_empty(attention_mask.shape)  # an additive mask
            copies = query.size(1) // key.size(1)
            key, value = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (key, value))
        return _FlashAttentionStub.apply(query, key, value, mask).transpose(1, 2), None

    return attend


AttentionInterface.register(ATTENTION_NAME, _make_attention([], None))
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


@contextmanager
def _in_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Convert the model's weights to a precision within the context, or let its linear layers compute like autocast."""
    half = torch.bfloat16
    with ExitStack() as stack:
        if precision == "bfloat16":
            model.to(half)
            stack.callback(model.to, torch.float32)
        elif precision == "autocast":
            head = unwrap_causal_lm(model).get_output_embeddings()  # may be tied to the embedding, and is not run here
            for module in model.modules():
                if isinstance(module, nn.Linear | Conv1D) and module is not head:
                    module.to(half)
                    hook = module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(half), *inputs[1:]))
                    stack.callback(hook.remove)
            stack.callback(model.to, torch.float32)
        yield


def count_saved_activations(
    model: nn.Module, blocks: Sequence[nn.Module], rows: PackedLayout | tuple[int, int], precision: str
) -> SavedActivations:
    """Run a decoder on the meta device and count the bytes that it saves for the backward pass.

    Args:
        model (`nn.Module`): a model on the meta device with the attention [`ATTENTION_NAME`].
        blocks (`Sequence[nn.Module]`): the decoder's blocks.
        rows ([`~bupo.models.packing.PackedLayout`] or `tuple[int, int]`): segments of a packed row, or number and
            length of rows.
        precision (`str`): `float32` or `bfloat16` weights, or fp32 weights under bf16 `autocast`.
    """
    has_experts = any(p.dim() == EXPERT_WEIGHT_DIMS for block in blocks for p in block.parameters())
    if has_experts and precision == "float32":  # on the meta device, grouped products exist in 16 bits only
        return _double(count_saved_activations(model, blocks, rows, "bfloat16"))
    with _in_precision(model, precision):
        return _run_forward(model, blocks, rows, torch.bfloat16 if precision == "autocast" else None)


def _run_forward(
    model: nn.Module, blocks: Sequence[nn.Module], rows: PackedLayout | tuple[int, int], dtype
) -> SavedActivations:
    inner: Any = unwrap_causal_lm(model)
    result = SavedActivations()
    weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[StorageWeakRef, torch.Tensor] = {}
    bytes_by_position = [0] * (len(blocks) + 2)  # before the blocks, each block, after them
    position = 0

    def count_tensor(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in weights and key not in saved:
            saved[key] = tensor
            bytes_by_position[position] += storage.nbytes()
            if 0 < position <= len(blocks):
                result.largest_tensor = max(result.largest_tensor, storage.nbytes())
        return tensor

    def enter(number: int, states: torch.Tensor) -> None:
        nonlocal position
        position, result.residual_stream = number, states.numel() * states.element_size()

    AttentionInterface.register(ATTENTION_NAME, _make_attention(result.attention_shapes, dtype))
    with ExitStack() as stack:
        for number, block in enumerate(blocks, 1):
            add_input_hook(block, partial(enter, number), stack)
        add_output_hook(blocks[-1], partial(enter, len(blocks) + 1), stack)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(count_tensor, lambda tensor: tensor))
        if isinstance(rows, PackedLayout):
            with PackedDecoder(inner).use_layout(rows):
                inner.base_model(**rows.inputs, use_cache=False)
        else:
            ids = torch.zeros(rows, dtype=torch.long, device="meta")
            inner.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    result.before_blocks, *result.blocks, result.after_blocks = bytes_by_position
    return result


def _double(saved: SavedActivations) -> SavedActivations:
    """Convert bytes counted in bf16 to fp32."""
    names = ("before_blocks", "after_blocks", "residual_stream", "largest_tensor")
    return replace(
        saved, blocks=[2 * size for size in saved.blocks], **{name: 2 * getattr(saved, name) for name in names}
    )
