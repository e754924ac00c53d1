"""Rows of a scoring pass as one packed row: no padding, and a prompt that several rows share is computed once.

A micro-batch of B rows, prompts padded on the left and answers on the right, becomes one row of N tokens: each distinct prompt,
then the answers to it. Every token keeps the position it has in its own row, and sees what it sees there: its prompt, and
its own answer up to itself. Only attention mixes tokens, so only attention is told, through transformers' interfaces for
attention functions and masks; the family's own code runs as it is, under gradient checkpointing and adapters too.

What a token may see (all of the past, a sliding window, a chunk) is the family's rule, asked by positions. On a GPU it becomes
a block mask for FlexAttention; elsewhere segments of like length go through the model's own attention function together.
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

PACKED_ATTENTION = "bupo_packed"  # the name of the attention
MAX_LENGTH_RATIO = 1.5  # segments go together if the longest has at most so many times the tokens of the shortest
PACKING_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
}  # of the proof; rounding in 16 bits reaches some hundredths
MAX_QUERY_KEY_PAIRS = 1 << 26  # of queries and keys, that go together at most: a mask has an entry for each
PADDING_POSITION = 1 << 40  # a position after all others, of keys that only fill up

logger = logging.get_logger(__name__)


class Segment(NamedTuple):
    """Tokens of the packed row that follow each other in a sequence, and the prompt before them."""

    prefix: range
    span: range


class Bucket(NamedTuple):
    """Segments of like length: places in the packed row, filled up on the right with each segment's last ones."""

    query_indices: torch.Tensor  # (S, C)
    key_indices: torch.Tensor  # (S, K)
    key_positions: torch.Tensor  # (S, K), BEYOND where a key only fills up


@dataclass
class PackedLayout:
    """Where the tokens of rows stand in the packed row.

    Attributes:
        ids, positions (`torch.Tensor` of shape `(N,)`): of the packed tokens.
        places (`torch.Tensor` of shape `(B, T)`): where each token of the rows stands; 0 for padding.
        segments (`list[Segment]`): the prompts, and the answers with their prompts before them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    token_indices: torch.Tensor
    segments: list[Segment]

    @classmethod
    def from_rows(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> "PackedLayout | None":
        """Of rows `(B, T)` whose first `width` columns hold the prompts; rows with equal ones share them.

        None if a row has no prompt: nothing would stand before its answer.
        """
        tokens: list[int] = []
        positions: list[int] = []
        places: list[list[int]] = []
        segments: list[Segment] = []
        prompts: dict[tuple[int, ...], range] = {}

        def put(segment: Sequence[int], prefix: range) -> range:
            own = range(len(tokens), len(tokens) + len(segment))
            tokens.extend(segment)
            positions.extend(range(len(prefix), len(prefix) + len(own)))
            if own:
                segments.append(Segment(prefix, own))
            return own

        for row, there in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = tuple(token for token, real in zip(row[:width], there[:width], strict=True) if real)
            if not prompt:
                return None
            if prompt not in prompts:
                prompts[prompt] = put(prompt, range(0))
            answer = [token for token, real in zip(row[width:], there[width:], strict=True) if real]
            place = iter((*prompts[prompt], *put(answer, prompts[prompt])))
            places.append([next(place) if real else 0 for real in there])
        packed, at, where = (torch.tensor(values, device=input_ids.device) for values in (tokens, positions, places))
        return cls(packed, at, where, segments)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Of the packed tokens' `(N, D)` each row's, `(B, T, D)`; those of padding mean nothing."""
        return nn.functional.embedding(self.token_indices, states)

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of a decoder: the packed row."""
        row = self.ids[None]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": self.positions[None]}

    @cached_property
    def buckets(self) -> list[Bucket]:
        """All segments, those of like length together."""
        groups: list[list[Segment]] = []
        for segment in sorted(self.segments, key=lambda s: (len(s.span), len(s.prefix))):
            pairs = (
                (len(groups[-1]) + 1) * len(segment.span) * (len(segment.prefix) + len(segment.span)) if groups else 0
            )
            if (
                groups
                and len(segment.span) <= MAX_LENGTH_RATIO * len(groups[-1][0].span)
                and pairs <= MAX_QUERY_KEY_PAIRS
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
        places = pad_with_last(keys).to(device)
        beyond = torch.arange(places.size(1), device=device) >= lengths[:, None]
        return Bucket(queries, places, self.positions[places].masked_fill(beyond, PADDING_POSITION))

    @cached_property
    def inverse_indices(self) -> torch.Tensor:
        """`(N,)`: where each packed token stands among the buckets' queries, one after another."""
        queries = torch.cat([bucket.query_indices.flatten() for bucket in self.buckets])
        back = torch.empty_like(self.ids)
        back[queries] = torch.arange(len(queries), device=back.device)  # of those that fill up, any one will do
        return back

    def segment_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N,)` each: the index of a token's segment, and of its prefix (its own, if it has none)."""
        number = {segment.span: index for index, segment in enumerate(self.segments)}
        lengths = torch.tensor([len(s.span) for s in self.segments])
        earlier = torch.tensor([number.get(s.prefix, number[s.span]) for s in self.segments])
        own = torch.arange(len(lengths)).repeat_interleave(lengths)
        return own.to(self.ids.device), earlier.repeat_interleave(lengths).to(self.ids.device)


def pad_with_last(rows: list[list[int]]) -> torch.Tensor:
    """`(len(rows), longest)`: each row, then its last entry again and again."""
    longest = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])


class PackedMask:
    """What stands for an attention mask: who sees whom, by the family's rule `sees(batch, head, query, key)` of positions.

    Args:
        layout ([`PackedLayout`]), sees (`Callable`): the packed row, and the rule.
        plain (`str`, *optional*): the attention that segments go through; None: FlexAttention takes the row by blocks.
    """

    def __init__(self, layout: PackedLayout, sees: Callable, plain: str | None):
        self.layout, self.mask_function, self.attn_implementation = layout, sees, plain
        self.cached_masks: dict[int, torch.Tensor] = {}

    def get_bucket_mask(self, bucket: Bucket) -> torch.Tensor:
        """`(S, 1, C, K)`: whether a query sees a key. Small ones are kept for the next layer."""
        if id(bucket) in self.cached_masks:
            return self.cached_masks[id(bucket)]
        positions = self.layout.positions[bucket.query_indices]
        seen = self.mask_function(0, 0, positions[:, None, :, None], bucket.key_positions[:, None, None, :])
        if seen.numel() <= MAX_QUERY_KEY_PAIRS // 4:
            self.cached_masks[id(bucket)] = seen
        return seen

    @cached_property
    def block_mask(self):
        """FlexAttention's block mask."""
        positions, (own, earlier) = self.layout.positions, self.layout.segment_ids()

        def sees(batch, head, query, key):
            together = (own[key] == own[query]) | (own[key] == earlier[query])
            return together & self.mask_function(batch, head, positions[query], positions[key])

        count = len(positions)
        return flex_attention_mask(1, count, count, mask_function=sees, device=positions.device)


def packed_attention_forward(module: nn.Module, query, key, value, attention_mask: PackedMask, **kwargs):
    """An attention function of transformers, of one packed row: `(1, heads, N, d)` each, to `(1, N, heads, d)`."""
    mask, layout = attention_mask, attention_mask.layout
    if mask.attn_implementation is None:
        return flex_attention_forward(module, query, key, value, mask.block_mask, **kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    plain: Any = (
        eager
        if mask.attn_implementation == "eager"
        else AttentionInterface().get_interface(mask.attn_implementation, eager)
    )
    found = []
    for bucket in layout.buckets:
        seen = mask.get_bucket_mask(bucket)
        if mask.attn_implementation == "eager":
            seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
        parts = [
            gather_tokens(query, bucket.query_indices),
            gather_tokens(key, bucket.key_indices),
            gather_tokens(value, bucket.key_indices),
        ]
        found.append(plain(module, *parts, seen, **kwargs)[0].flatten(0, 1))  # (S C, heads, d)
    states = torch.cat(found)
    return nn.functional.embedding(layout.inverse_indices, states.flatten(1)).view(1, -1, *states.shape[1:]), None


def gather_tokens(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of `(1, heads, N, d)` those at places `(S, C)`: `(S, heads, C, d)`."""
    heads, size = states.size(1), states.size(3)
    table = states[0].transpose(0, 1).reshape(-1, heads * size)
    # as an embedding: its gradient is summed by rows, that of an index by entries
    return nn.functional.embedding(places, table).unflatten(-1, (heads, size)).transpose(1, 2)


_current_layout: ContextVar[tuple[PackedLayout, str | None]] = ContextVar("packed row")


def make_packed_mask(*args, mask_function: Callable = causal_mask_function, **kwargs) -> PackedMask:
    """A mask function of transformers: the family's rule, kept as it is."""
    return PackedMask(_current_layout.get()[0], mask_function, _current_layout.get()[1])


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, make_packed_mask)


class PackedDecoder:
    """A model's decoder over packed rows.

    Args:
        model (`PreTrainedModel`): whose attention goes through transformers' interfaces.
        blocks (`bool`): whether it is FlexAttention's, over a block mask, or the model's own, over segments.
    """

    def __init__(self, model: PreTrainedModel, blocks: bool = False):
        self.model, self.use_block_mask, self.attn_implementation = model, blocks, model.config._attn_implementation
        self.backward_stack: ExitStack | None = None

    @contextmanager
    def keep_for_backward(self) -> Iterator[None]:
        """Inside, attention stays as a differentiable run left it: a backward pass may compute its blocks again."""
        try:
            with ExitStack() as self.backward_stack:
                yield
        finally:
            self.backward_stack = None

    @contextmanager
    def use_layout(self, layout: PackedLayout) -> Iterator[None]:
        """Inside, a run of the decoder on `layout.inputs` is one of its rows."""
        token = _current_layout.set((layout, None if self.use_block_mask else self.attn_implementation))
        try:
            with ExitStack() as own:
                stack = self.backward_stack if self.backward_stack and torch.is_grad_enabled() else own
                if self.model.config._attn_implementation != PACKED_ATTENTION:
                    self.model.set_attn_implementation(PACKED_ATTENTION)
                    stack.callback(self.model.set_attn_implementation, self.attn_implementation)
                yield
        finally:
            _current_layout.reset(token)


def build_packed_decoder(model: PreTrainedModel) -> PackedDecoder | None:
    """A model's packing, proven on a few tokens; None for a model whose tokens meet elsewhere than in attention, or whose
    attention is not transformers' to exchange. FlexAttention, on a GPU, must prove itself, too.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return None
    for blocks in (True, False) if model.device.type == "cuda" else (False,):
        packing = PackedDecoder(model, blocks)
        try:
            apart = measure_packing_error(packing)
        except Exception as failure:  # whatever a family's code makes of a mask that is none
            logger.info(f"{get_model_label(model)}: rows are not packed: {type(failure).__name__}: {failure}")
            continue
        if apart <= PACKING_TOLERANCE.get(model.dtype, 0.1):
            return packing
        logger.info(
            f"{get_model_label(model)}: rows are not packed: their states would differ by {apart:.2g} of their size"
        )
    return None


def build_packed_decoder_like(packing: PackedDecoder, model: PreTrainedModel) -> PackedDecoder | None:
    """Another model's of the same architecture, for which the proof holds; None if it attends otherwise."""
    same = model.config._attn_implementation == packing.attn_implementation
    return PackedDecoder(model, packing.use_block_mask) if same else None


def measure_packing_error(packing: PackedDecoder) -> float:
    """Of states and of a gradient, packed, from those of each row alone: the larger, as a share of their size."""
    model = packing.model
    ids, real, width = make_probe_batch(model)
    layout = PackedLayout.from_rows(ids, real, width)
    assert layout is not None, "these rows have prompts"
    some = [parameter for parameter in model.parameters() if parameter.requires_grad][:1]

    def made(states: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
        gradient = torch.autograd.grad((states.float() * weights).sum(), some, allow_unused=True) if some else ()
        return [states.detach(), *(x for x in gradient if x is not None)]

    with eval_mode(model), torch.enable_grad():
        with packing.use_layout(layout):
            packed = model.base_model(**layout.inputs, use_cache=False).last_hidden_state[0]
            mine = made(torch.cat([packed[p[r]] for p, r in zip(layout.token_indices, real.bool(), strict=True)]))
        rows = [row[there][None] for row, there in zip(ids, real.bool(), strict=True)]
        theirs = made(
            torch.cat([model.base_model(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])
        )
    pairs = [(a.double(), b.double()) for a, b in zip(mine, theirs, strict=True)]
    return max((((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs), key=lambda x: (x != x, x))


def make_probe_batch(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask `(3, 9)`, and the width of the prompts: two answers to one, another to a longer one."""
    embedding = model.get_input_embeddings().weight
    ids = torch.linspace(0, embedding.size(0) - 1, 27, device=embedding.device).long().view(3, 9)
    ids[1, :5] = ids[0, :5]
    real = torch.ones_like(ids)
    real[:2, :2] = 0
    real[1:, 7:] = 0
    return ids, real, 5
