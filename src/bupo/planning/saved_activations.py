"""What a forward pass keeps for its backward pass, counted on the meta device: the family's own code, and no formula for it.

Attention is the exception: which kernel runs depends on the device, so its inputs, its output and a number a row and head are
kept, as flash attention does, whatever the length.
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

ATTENTION_NAME = "bupo_planned"  # the name of the attention
EXPERT_WEIGHT_DIMS = 3  # dimensions of a parameter that holds the matrices of several


@dataclass(frozen=True)
class AttentionShape:
    """An attention call's heads: its products take `2 heads (key + value)` FLOPs a pair of tokens."""

    heads: int
    key: int
    value: int
    kv_heads: int
    window: int | None = None


@dataclass
class SavedActivations:
    """Bytes that one forward pass of a decoder keeps.

    Attributes:
        before, after (`int`): outside the blocks: in front of the first, and behind the last (the final norm).
        blocks (`list[int]`): by each block.
        stream (`int`): of the states between two blocks.
        largest (`int`): of the largest tensor that a block keeps.
        heads (`list[Head]`): of the attention calls, in order.
    """

    before_blocks: int = 0
    after_blocks: int = 0
    blocks: list[int] = field(default_factory=list)
    residual_stream: int = 0
    largest_tensor: int = 0
    attention_shapes: list[AttentionShape] = field(default_factory=list)


class _FlashAttentionStub(torch.autograd.Function):
    """Keeps what flash attention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = query.new_empty((*query.shape[:-1], value.size(-1)))
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *upstream):
        raise NotImplementedError("what is kept is counted, and nothing is differentiated")


def _make_attention(heads: list[AttentionShape], dtype: torch.dtype | None) -> Callable:
    """An attention function of transformers that notes its heads; `dtype` is autocast's.

    With a mask it is a CPU's: heads that share keys get copies of them.
    """

    def attend(module: nn.Module, query, key, value, attention_mask, **kwargs):
        heads.append(
            AttentionShape(query.size(1), query.size(3), value.size(3), key.size(1), kwargs.get("sliding_window"))
        )
        if dtype:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = None
        if attention_mask is not None:
            mask = query.new_empty(attention_mask.shape)  # as numbers that are added
            copies = query.size(1) // key.size(1)
            key, value = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (key, value))
        return _FlashAttentionStub.apply(query, key, value, mask).transpose(1, 2), None

    return attend


AttentionInterface.register(ATTENTION_NAME, _make_attention([], None))
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


@contextmanager
def _in_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Inside, the model's weights are of this precision, or its linear layers compute as autocast lets them."""
    half = torch.bfloat16
    with ExitStack() as stack:
        if precision == "bfloat16":
            model.to(half)
            stack.callback(model.to, torch.float32)
        elif precision == "autocast":
            head = unwrap_causal_lm(
                model
            ).get_output_embeddings()  # it may be the embedding, too, and nothing runs it here
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
    """Run a decoder on the meta device.

    Args:
        model (`nn.Module`): on the meta device, its attention [`ATTENTION_NAME`].
        blocks (`Sequence[nn.Module]`): the decoder's.
        rows ([`~bupo.models.packing.PackedLayout`] or `tuple[int, int]`): as segments of a packed row, or so many rows of a length.
        precision (`str`): `float32` or `bfloat16` weights, or fp32 weights under bf16 `autocast`.
    """
    experts = any(p.dim() == EXPERT_WEIGHT_DIMS for block in blocks for p in block.parameters())
    if experts and precision == "float32":  # grouped products on the meta device are of 16-bit numbers
        return _double(count_saved_activations(model, blocks, rows, "bfloat16"))
    with _in_precision(model, precision):
        return _run_forward(model, blocks, rows, torch.bfloat16 if precision == "autocast" else None)


def _run_forward(
    model: nn.Module, blocks: Sequence[nn.Module], rows: PackedLayout | tuple[int, int], dtype
) -> SavedActivations:
    inner: Any = unwrap_causal_lm(model)
    found = SavedActivations()
    weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, torch.Tensor] = {}
    spent = [0] * (len(blocks) + 2)
    place = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in weights and key not in kept:
            kept[key] = tensor
            spent[place] += storage.nbytes()
            if 0 < place <= len(blocks):
                found.largest_tensor = max(found.largest_tensor, storage.nbytes())
        return tensor

    def enter(number: int, states: torch.Tensor) -> None:
        nonlocal place
        place, found.residual_stream = number, states.numel() * states.element_size()

    AttentionInterface.register(ATTENTION_NAME, _make_attention(found.attention_shapes, dtype))
    with ExitStack() as stack:
        for number, block in enumerate(blocks, 1):
            add_input_hook(block, partial(enter, number), stack)
        add_output_hook(blocks[-1], partial(enter, len(blocks) + 1), stack)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        if isinstance(rows, PackedLayout):
            with PackedDecoder(inner).use_layout(rows):
                inner.base_model(**rows.inputs, use_cache=False)
        else:
            ids = torch.zeros(rows, dtype=torch.long, device="meta")
            inner.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    found.before_blocks, *found.blocks, found.after_blocks = spent
    return found


def _double(kept: SavedActivations) -> SavedActivations:
    """In fp32 what was counted in bf16."""
    sizes = {name: 2 * getattr(kept, name) for name in ("before", "after", "stream", "largest")}
    return replace(kept, blocks=[2 * size for size in kept.blocks], **sizes)
