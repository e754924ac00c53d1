"""Packing of the rows of a scoring pass into one row, without padding and with each distinct prompt once.

A micro-batch of B rows, with prompts padded on the left and completions on the right, becomes one row of N tokens: each
distinct prompt, followed by its completions. Every token keeps its position, and attends to its prompt and to the earlier
tokens of its completion. Only attention mixes tokens, so only the attention function and mask are replaced, through
transformers' interfaces. The family's modelling code runs unchanged, also with gradient checkpointing and adapters.

The family's mask function (causal, sliding window or chunked) is evaluated at the tokens' positions. On a GPU it becomes a
block mask for FlexAttention. Elsewhere, segments of similar length go through the model's own attention function together.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import causal_mask_function, flex_attention_mask
from transformers.utils import logging

from bupo.models.residual_stream import eval_mode
from bupo.models.verification import get_model_label

PACKED_ATTENTION = "bupo_packed"  # name in transformers' registries of attention functions and masks
MAX_LENGTH_RATIO = 1.5  # of the longest and the shortest segment of a bucket
PACKING_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # rounding in 16 bits causes errors of some hundredths
MAX_QUERY_KEY_PAIRS = 1 << 26  # of a bucket, whose mask has an entry for each pair
PADDING_POSITION = 1 << 40  # position of padding keys, after all others

logger = logging.get_logger(__name__)


class Segment(NamedTuple):
    """A prompt or completion as a range of the packed row, and the range of its prompt (empty for a prompt)."""

    prefix: range
    span: range


class Bucket(NamedTuple):
    """S segments of similar length as indices of the packed row, padded on the right with their last index."""

    query_indices: torch.Tensor  # (S, Q)
    key_indices: torch.Tensor  # (S, K)
    key_positions: torch.Tensor  # (S, K), PADDING_POSITION for padding


@dataclass
class PackedLayout:
    """The packed row, and the index of each token in it.

    Attributes:
        ids, positions (`torch.Tensor` of shape `(N,)`): ids and positions of the packed tokens.
        token_indices (`torch.Tensor` of shape `(B, T)`): index of each token in the packed row; 0 for padding.
        segments (`list[Segment]`): the prompts and completions.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    token_indices: torch.Tensor
    segments: list[Segment]

    @classmethod
    def from_rows(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> "PackedLayout | None":
        """Pack rows `(B, T)` whose first `width` columns hold the prompts. Rows with equal prompts share them.

        Returns:
            `PackedLayout`, *optional*: the layout, or None if a row has an empty prompt.
        """
        ids: list[int] = []
        positions: list[int] = []
        token_indices: list[list[int]] = []
        segments: list[Segment] = []
        prompt_spans: dict[tuple[int, ...], range] = {}

        def append(tokens: Sequence[int], prefix: range) -> range:
            span = range(len(ids), len(ids) + len(tokens))
            ids.extend(tokens)
            positions.extend(range(len(prefix), len(prefix) + len(span)))
            if span:
                segments.append(Segment(prefix, span))
            return span

        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = tuple(token for token, real in zip(row[:width], mask[:width], strict=True) if real)
            if not prompt:
                return None
            if prompt not in prompt_spans:
                prompt_spans[prompt] = append(prompt, range(0))
            completion = [token for token, real in zip(row[width:], mask[width:], strict=True) if real]
            indices = iter((*prompt_spans[prompt], *append(completion, prompt_spans[prompt])))
            token_indices.append([next(indices) if real else 0 for real in mask])
        device = input_ids.device
        return cls(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(token_indices, device=device),
            segments,
        )

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states of the rows, `(B, T, D)`, from those of the packed row, `(N, D)`. Padding gets arbitrary states."""
        return nn.functional.embedding(self.token_indices, states)

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The decoder's arguments for the packed row."""
        row = self.ids[None]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": self.positions[None]}

    @cached_property
    def buckets(self) -> list[Bucket]:
        """All segments, grouped by similar length."""
        groups: list[list[Segment]] = []
        for segment in sorted(self.segments, key=lambda s: (len(s.span), len(s.prefix))):
            queries, keys = len(segment.span), len(segment.prefix) + len(segment.span)
            if (
                groups
                and queries <= MAX_LENGTH_RATIO * len(groups[-1][0].span)
                and (len(groups[-1]) + 1) * queries * keys <= MAX_QUERY_KEY_PAIRS
            ):
                groups[-1].append(segment)
            else:
                groups.append([segment])
        return [self._make_bucket(group) for group in groups]

    def _make_bucket(self, group: list[Segment]) -> Bucket:
        device = self.ids.device
        queries = pad_with_last([list(s.span) for s in group]).to(device)
        keys = [[*s.prefix, *s.span] for s in group]
        lengths = torch.tensor([len(row) for row in keys], device=device)
        key_indices = pad_with_last(keys).to(device)
        is_padding = torch.arange(key_indices.size(1), device=device) >= lengths[:, None]
        return Bucket(queries, key_indices, self.positions[key_indices].masked_fill(is_padding, PADDING_POSITION))

    @cached_property
    def inverse_indices(self) -> torch.Tensor:
        """The index of each packed token in the concatenated queries of the buckets, `(N,)`."""
        queries = torch.cat([bucket.query_indices.flatten() for bucket in self.buckets])
        indices = torch.empty_like(self.ids)
        # padding repeats a segment's last token, and any of the repetitions will do
        indices[queries] = torch.arange(len(queries), device=indices.device)
        return indices

    def segment_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of each token's segment and of the segment's prompt (itself for a prompt), `(N,)` each."""
        index_by_span = {segment.span: index for index, segment in enumerate(self.segments)}
        lengths = torch.tensor([len(s.span) for s in self.segments])
        prompts = torch.tensor([index_by_span.get(s.prefix, index_by_span[s.span]) for s in self.segments])
        segments = torch.arange(len(lengths)).repeat_interleave(lengths)
        return segments.to(self.ids.device), prompts.repeat_interleave(lengths).to(self.ids.device)


def pad_with_last(rows: list[list[int]]) -> torch.Tensor:
    """Return the rows as a tensor, padded on the right with their last entry."""
    longest = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])


class PackedMask:
    """The attention mask of a packed row. It takes the place of transformers' mask tensor.

    Args:
        layout ([`PackedLayout`]): the packed row.
        mask_function (`Callable`): the family's mask, `mask_function(batch, head, query, key)` of positions.
        attn_implementation (`str`, *optional*): the attention function for segments. None for FlexAttention over the full row.
    """

    def __init__(self, layout: PackedLayout, mask_function: Callable, attn_implementation: str | None):
        self.layout, self.mask_function, self.attn_implementation = layout, mask_function, attn_implementation
        self.cached_masks: dict[int, torch.Tensor] = {}

    def get_bucket_mask(self, bucket: Bucket) -> torch.Tensor:
        """Return the boolean mask of a bucket, `(S, 1, Q, K)`. Small masks are cached for the next layer."""
        if id(bucket) in self.cached_masks:
            return self.cached_masks[id(bucket)]
        positions = self.layout.positions[bucket.query_indices]
        mask = self.mask_function(0, 0, positions[:, None, :, None], bucket.key_positions[:, None, None, :])
        if mask.numel() <= MAX_QUERY_KEY_PAIRS // 4:
            self.cached_masks[id(bucket)] = mask
        return mask

    @cached_property
    def block_mask(self):
        """FlexAttention's block mask."""
        positions, (segments, prompts) = self.layout.positions, self.layout.segment_ids()

        def mask_function(batch, head, query, key):
            same_sequence = (segments[key] == segments[query]) | (segments[key] == prompts[query])
            return same_sequence & self.mask_function(batch, head, positions[query], positions[key])

        count = len(positions)
        return flex_attention_mask(1, count, count, mask_function=mask_function, device=positions.device)


def packed_attention_forward(module: nn.Module, query, key, value, attention_mask: PackedMask, **kwargs):
    """Compute the attention of one packed row, with the signature of transformers' attention functions.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, heads, N, head_dim)`): states of the packed row.
        attention_mask ([`PackedMask`]): its mask.

    Returns:
        `torch.Tensor` of shape `(1, N, heads, head_dim)`, and None for the attention weights.
    """
    packed_mask, layout = attention_mask, attention_mask.layout
    if packed_mask.attn_implementation is None:
        return flex_attention_forward(module, query, key, value, packed_mask.block_mask, **kwargs)
    is_eager = packed_mask.attn_implementation == "eager"
    attention: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if not is_eager:
        attention = AttentionInterface().get_interface(packed_mask.attn_implementation, attention)
    outputs = []
    for bucket in layout.buckets:
        mask = packed_mask.get_bucket_mask(bucket)
        if is_eager:  # takes additive masks
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        inputs = [
            gather_tokens(query, bucket.query_indices),
            gather_tokens(key, bucket.key_indices),
            gather_tokens(value, bucket.key_indices),
        ]
        outputs.append(attention(module, *inputs, mask, **kwargs)[0].flatten(0, 1))  # (S * Q, heads, head_dim)
    states = torch.cat(outputs)
    return nn.functional.embedding(layout.inverse_indices, states.flatten(1)).view(1, -1, *states.shape[1:]), None


def gather_tokens(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather the tokens at indices `(S, Q)` of states `(1, heads, N, head_dim)`: `(S, heads, Q, head_dim)`."""
    heads, size = states.size(1), states.size(3)
    table = states[0].transpose(0, 1).reshape(-1, heads * size)
    # the gradient of an embedding is summed by rows, which is faster than that of an index
    return nn.functional.embedding(indices, table).unflatten(-1, (heads, size)).transpose(1, 2)


_current_layout: ContextVar[tuple[PackedLayout, str | None]] = ContextVar("packed row")


def make_packed_mask(*args, mask_function: Callable = causal_mask_function, **kwargs) -> PackedMask:
    """Create the mask of the current packed row from the family's mask function, as transformers' mask interface requires."""
    layout, attn_implementation = _current_layout.get()
    return PackedMask(layout, mask_function, attn_implementation)


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, make_packed_mask)


class PackedDecoder:
    """A model's decoder over packed rows.

    Args:
        model (`PreTrainedModel`): a model whose attention uses transformers' interfaces.
        use_block_mask (`bool`): use FlexAttention with a block mask instead of the model's own attention over segments.
    """

    def __init__(self, model: PreTrainedModel, use_block_mask: bool = False):
        self.model, self.use_block_mask = model, use_block_mask
        self.attn_implementation = model.config._attn_implementation
        self.backward_stack: ExitStack | None = None

    @contextmanager
    def keep_for_backward(self) -> Iterator[None]:
        """Keep the packed attention set after a differentiable forward, for gradient checkpointing in the backward pass."""
        try:
            with ExitStack() as self.backward_stack:
                yield
        finally:
            self.backward_stack = None

    @contextmanager
    def use_layout(self, layout: PackedLayout) -> Iterator[None]:
        """Interpret `layout.inputs` as a packed row in the decoder's forward."""
        token = _current_layout.set((layout, None if self.use_block_mask else self.attn_implementation))
        try:
            with ExitStack() as forward_stack:
                stack = self.backward_stack if self.backward_stack and torch.is_grad_enabled() else forward_stack
                if self.model.config._attn_implementation != PACKED_ATTENTION:
                    self.model.set_attn_implementation(PACKED_ATTENTION)
                    stack.callback(self.model.set_attn_implementation, self.attn_implementation)
                yield
        finally:
            _current_layout.reset(token)


def build_packed_decoder(model: PreTrainedModel) -> PackedDecoder | None:
    """Return a packed decoder whose states and gradients were verified on a few tokens, or None.

    Packing does not work for models that mix tokens outside attention, or whose attention cannot be replaced through
    transformers' interfaces. On a GPU, FlexAttention is tried first.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return None
    for use_block_mask in (True, False) if model.device.type == "cuda" else (False,):
        packing = PackedDecoder(model, use_block_mask)
        try:
            error = measure_packing_error(packing)
        except Exception as failure:  # a family's code may fail in any way on a mask that is not a tensor
            logger.info(f"{get_model_label(model)}: rows are not packed: {type(failure).__name__}: {failure}")
            continue
        if error <= PACKING_TOLERANCE.get(model.dtype, 0.1):
            return packing
        logger.info(
            f"{get_model_label(model)}: rows are not packed: their states would differ by {error:.2g} of their size"
        )
    return None


def build_packed_decoder_like(packing: PackedDecoder, model: PreTrainedModel) -> PackedDecoder | None:
    """Return the packed decoder of another model with the same architecture, or None if its attention function differs."""
    same = model.config._attn_implementation == packing.attn_implementation
    return PackedDecoder(model, packing.use_block_mask) if same else None


def measure_packing_error(packing: PackedDecoder) -> float:
    """Return the larger relative error of states and of a gradient of a packed row, against those of separate rows."""
    model = packing.model
    ids, mask, width = make_probe_batch(model)
    layout = PackedLayout.from_rows(ids, mask, width)
    assert layout is not None, "these rows have prompts"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad][:1]

    def with_gradient(states: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
        loss = (states.float() * weights).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
        return [states.detach(), *(x for x in gradients if x is not None)]

    with eval_mode(model), torch.enable_grad():
        with packing.use_layout(layout):
            states = model.base_model(**layout.inputs, use_cache=False).last_hidden_state[0]
            rows = zip(layout.token_indices, mask.bool(), strict=True)
            actual = with_gradient(torch.cat([states[indices[real]] for indices, real in rows]))
        inputs = [row[real][None] for row, real in zip(ids, mask.bool(), strict=True)]
        separate = [model.base_model(input_ids=row, use_cache=False).last_hidden_state[0] for row in inputs]
        expected = with_gradient(torch.cat(separate))
    pairs = [(a.double(), b.double()) for a, b in zip(actual, expected, strict=True)]
    errors = (((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)
    return max(errors, key=lambda error: (error != error, error))  # NaN is the largest


def make_probe_batch(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return ids and mask `(3, 9)` of two completions to one prompt and one to another, and the width of the prompts."""
    embedding = model.get_input_embeddings().weight
    ids = torch.linspace(0, embedding.size(0) - 1, 27, device=embedding.device).long().view(3, 9)
    ids[1, :5] = ids[0, :5]
    mask = torch.ones_like(ids)
    mask[:2, :2] = 0
    mask[1:, 7:] = 0
    return ids, mask, 5
