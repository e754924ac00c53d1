"""Keys and values of answers that are being written: in buffers of their own, and a prompt's once for all its answers.

Both stand behind transformers' own interfaces, so a family's modelling code runs as it is: [`KVCacheLayer`] is a layer of its `Cache`,
and [`share_prompt_cache`] takes the place of its `sdpa` attention, where the keys are of such a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

MIN_BUFFER_GROWTH = 64  # tokens that the buffers grow by, at least


class PromptGroups:
    """Which prompt each answer belongs to, as a rectangle of prompts by places: `(prompts, size)`.

    Args:
        own (`torch.Tensor` of shape `(rows,)`): each row's prompt.

    Attributes:
        rows (`torch.Tensor` of shape `(prompts * size,)`): the row at each place; row 0 where there is none.
        places (`torch.Tensor` of shape `(rows,)`): each row's place.
    """

    def __init__(self, own: torch.Tensor):
        counts, order = own.bincount(), own.argsort(stable=True)
        rank = torch.empty_like(own)
        rank[order] = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own[order]]
        self.prompt_indices, self.num_prompts, self.group_size = own, len(counts), int(counts.max())
        self.slot_indices = own * self.group_size + rank
        self.row_indices = own.new_zeros(self.num_prompts * self.group_size).scatter_(
            0, self.slot_indices, torch.arange(len(own)).to(own)
        )

    def group_rows(self, by_row: torch.Tensor) -> torch.Tensor:
        """`(rows, heads, R, D)` as `(prompts, heads, size * R, D)`."""
        _, heads, count, dim = by_row.shape
        by_place = by_row[self.row_indices].view(self.num_prompts, self.group_size, heads, count, dim)
        return by_place.transpose(1, 2).reshape(self.num_prompts, heads, self.group_size * count, dim)

    def ungroup_rows(self, by_prompt: torch.Tensor) -> torch.Tensor:
        """`(prompts, heads, size * R, D)` as `(rows, heads, R, D)`."""
        _, heads, count, dim = by_prompt.shape
        by_place = by_prompt.view(self.num_prompts, heads, self.group_size, count // self.group_size, dim)
        return by_place.transpose(1, 2).flatten(0, 1)[self.slot_indices]


class KVCacheLayer(CacheLayerMixin):
    """Keys and values `(rows, heads, room, dim)` of a layer, filled in place.

    Attributes:
        length (`int`): tokens seen, prompts included.
        before (`int`): tokens of prompts that are shared; the buffers hold what comes after them.
        prompt (`tuple`, *optional*): keys and values of these, `(prompts, heads, before, dim)`.
        groups ([`PromptGroups`]): the rows of each prompt.
    """

    is_sliding = False  # a window is the mask's

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seq_length = self.shared_length = 0
        self.prompt_key_values: tuple[torch.Tensor, torch.Tensor] | None = None
        self.prompt_groups: PromptGroups | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.seq_length = self.seq_length - self.shared_length, self.seq_length + key_states.size(-2)
        end = self.seq_length - self.shared_length
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        if end > self.keys.size(-2):
            self._reallocate(None, start, start)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        keys = self.keys[:, :, :end]
        if self.prompt_key_values is not None:
            vars(keys)["slots"] = self  # what `shared_prompts` looks for
        return keys, self.values[:, :, :end]

    def expand_prompts(self, groups: PromptGroups, share: bool) -> None:
        """From prompts `(prompts, ...)` to their answers: `(rows, ...)`, or the prompts aside and nothing yet."""
        if not share:
            return self._reallocate(groups.prompt_indices, self.seq_length)
        self.prompt_key_values, self.prompt_groups = (self.keys.contiguous(), self.values.contiguous()), groups
        self.shared_length = self.seq_length
        self._reallocate(groups.prompt_indices, 0)

    def select_rows(self, rows: torch.Tensor, prompts: torch.Tensor, groups: PromptGroups) -> None:
        """Go on with these rows only, which are of these prompts, and with the new groups."""
        if self.prompt_key_values is not None:
            if len(prompts) < len(self.prompt_key_values[0]):
                self.prompt_key_values = self.prompt_key_values[0][prompts], self.prompt_key_values[1][prompts]
            self.prompt_groups = groups
        self._reallocate(rows, self.seq_length - self.shared_length)

    def _reallocate(self, rows: torch.Tensor | None, filled: int, more: int = MIN_BUFFER_GROWTH) -> None:
        """These rows (all for None), with `more` slots, at least `ROOM`, behind the filled ones."""

        def moved(buffer: torch.Tensor) -> torch.Tensor:
            count, heads, _, dim = buffer.shape
            made = buffer.new_empty(
                count if rows is None else len(rows), heads, filled + max(more, MIN_BUFFER_GROWTH), dim
            )
            made[:, :, :filled] = buffer[:, :, :filled] if rows is None else buffer[rows, :, :filled]
            return made

        self.keys, self.values = moved(self.keys), moved(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seq_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.seq_length

    def get_max_length(self) -> int:
        return -1


def shared_prompt_attention_forward(
    slots: KVCacheLayer, query, key, value, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention of one token a row, `(rows, heads, 1, dim)`, to the prompt and the answer: `(rows, 1, heads, dim)`."""
    assert slots.prompt is not None and slots.groups is not None
    (keys, values), groups, (rows, heads, _, dim) = slots.prompt, slots.groups, query.shape
    shared, length = key.size(1), keys.size(-2)  # heads of keys and values: those of queries take turns
    asked = (query * (dim**-0.5 if scaling is None else scaling)).reshape(rows, shared, heads // shared, dim)
    to_prompt = groups.apart(groups.together(asked) @ keys.transpose(-1, -2))
    scores = torch.cat([to_prompt, asked @ key.transpose(-1, -2)], -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    from_prompt = groups.apart(groups.together(weights[..., :length]) @ values)
    return (from_prompt + weights[..., length:] @ value).reshape(rows, 1, heads, -1)


@contextmanager
def share_prompt_cache() -> Iterator[None]:
    """Inside, `sdpa` attention to keys of [`KVCacheLayer`] that share their prompts is [`shared_prompt_attention_forward`]; all other is as it was."""
    plain = AttentionInterface()["sdpa"]

    def attention(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        slots = getattr(key, "slots", None)
        if slots is None:
            return plain(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
        return shared_prompt_attention_forward(slots, query, key, value, attention_mask, scaling), None

    AttentionInterface.register("sdpa", attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", plain)
