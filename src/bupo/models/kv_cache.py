"""The keys and values of completions during generation: written in place, and stored once per prompt.

Both parts use transformers' own interfaces, so a family's modelling code runs unchanged. [`KVCacheLayer`] is a layer of a
transformers `Cache`, and [`share_prompt_cache`] replaces the `sdpa` attention for keys of such a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

MIN_BUFFER_GROWTH = 64  # tokens that the buffers grow by, at least


class PromptGroups:
    """The rows of each prompt, arranged as a rectangle of slots, `(prompts, group_size)`.

    Args:
        prompt_indices (`torch.Tensor` of shape `(B,)`): the prompt of each row.

    Attributes:
        row_indices (`torch.Tensor` of shape `(prompts * group_size,)`): the row in each slot; row 0 in empty slots.
        slot_indices (`torch.Tensor` of shape `(B,)`): the slot of each row.
    """

    def __init__(self, prompt_indices: torch.Tensor):
        counts, order = prompt_indices.bincount(), prompt_indices.argsort(stable=True)
        rank = torch.empty_like(prompt_indices)
        starts = (counts.cumsum(0) - counts)[prompt_indices[order]]
        rank[order] = torch.arange(len(prompt_indices), device=prompt_indices.device) - starts
        self.prompt_indices, self.num_prompts, self.group_size = prompt_indices, len(counts), int(counts.max())
        self.slot_indices = prompt_indices * self.group_size + rank
        self.row_indices = prompt_indices.new_zeros(self.num_prompts * self.group_size).scatter_(
            0, self.slot_indices, torch.arange(len(prompt_indices)).to(prompt_indices)
        )

    def group_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rearrange `(B, heads, n, head_dim)` to `(prompts, heads, group_size * n, head_dim)`."""
        _, heads, count, dim = rows.shape
        slots = rows[self.row_indices].view(self.num_prompts, self.group_size, heads, count, dim)
        return slots.transpose(1, 2).reshape(self.num_prompts, heads, self.group_size * count, dim)

    def ungroup_rows(self, groups: torch.Tensor) -> torch.Tensor:
        """Rearrange `(prompts, heads, group_size * n, head_dim)` to `(B, heads, n, head_dim)`."""
        _, heads, count, dim = groups.shape
        slots = groups.view(self.num_prompts, heads, self.group_size, count // self.group_size, dim)
        return slots.transpose(1, 2).flatten(0, 1)[self.slot_indices]


class KVCacheLayer(CacheLayerMixin):
    """The keys and values of one layer, `(B, heads, capacity, head_dim)`, filled in place.

    Attributes:
        seq_length (`int`): number of cached tokens, including the prompt.
        shared_length (`int`): number of prompt tokens that are shared; the buffers hold the tokens after them.
        prompt_key_values (`tuple`, *optional*): keys and values of the shared tokens, of shape
            `(prompts, heads, shared_length, head_dim)`.
        prompt_groups ([`PromptGroups`], *optional*): the rows of each prompt.
    """

    is_sliding = False  # the mask applies a sliding window

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
            vars(keys)["kv_cache_layer"] = self  # read by `share_prompt_cache`
        return keys, self.values[:, :, :end]

    def expand_prompts(self, groups: PromptGroups, share: bool) -> None:
        """Expand the cached prompts `(prompts, ...)` to their completions `(B, ...)`.

        Args:
            groups ([`PromptGroups`]): the rows of each prompt.
            share (`bool`): whether to store a prompt once for its rows. Otherwise each row gets a copy.
        """
        if not share:
            return self._reallocate(groups.prompt_indices, self.seq_length)
        self.prompt_key_values, self.prompt_groups = (self.keys.contiguous(), self.values.contiguous()), groups
        self.shared_length = self.seq_length
        self._reallocate(groups.prompt_indices, 0)

    def select_rows(self, rows: torch.Tensor, prompts: torch.Tensor, groups: PromptGroups) -> None:
        """Drop all rows except `rows`, and all shared prompts except `prompts`; `groups` arranges the remaining rows."""
        if self.prompt_key_values is not None:
            if len(prompts) < len(self.prompt_key_values[0]):
                self.prompt_key_values = self.prompt_key_values[0][prompts], self.prompt_key_values[1][prompts]
            self.prompt_groups = groups
        self._reallocate(rows, self.seq_length - self.shared_length)

    def _reallocate(self, rows: torch.Tensor | None, filled: int, growth: int = MIN_BUFFER_GROWTH) -> None:
        """Copy the filled part of some rows (None for all) to buffers with free space behind it."""

        def reallocated(buffer: torch.Tensor) -> torch.Tensor:
            count, heads, _, dim = buffer.shape
            capacity = filled + max(growth, MIN_BUFFER_GROWTH)
            larger = buffer.new_empty(count if rows is None else len(rows), heads, capacity, dim)
            larger[:, :, :filled] = buffer[:, :, :filled] if rows is None else buffer[rows, :, :filled]
            return larger

        self.keys, self.values = reallocated(self.keys), reallocated(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seq_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.seq_length

    def get_max_length(self) -> int:
        return -1


def shared_prompt_attention_forward(
    layer: KVCacheLayer, query, key, value, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attend from one token a row to the shared prompt and to the row's completion.

    Args:
        layer ([`KVCacheLayer`]): the cached prompts.
        query (`torch.Tensor` of shape `(B, heads, 1, head_dim)`): queries of the new tokens.
        key, value (`torch.Tensor` of shape `(B, kv_heads, C, head_dim)`): keys and values of the completions.
        mask (`torch.Tensor`, *optional*): boolean or additive mask over the prompt and the completion.
        scaling (`float`, *optional*): factor of the scores, by default `head_dim**-0.5`.

    Returns:
        `torch.Tensor` of shape `(B, 1, heads, head_dim)`.
    """
    assert layer.prompt_key_values is not None and layer.prompt_groups is not None
    (prompt_keys, prompt_values), groups = layer.prompt_key_values, layer.prompt_groups
    rows, heads, _, dim = query.shape
    kv_heads, prompt_length = key.size(1), prompt_keys.size(-2)
    scaled = query * (dim**-0.5 if scaling is None else scaling)
    queries = scaled.reshape(rows, kv_heads, heads // kv_heads, dim)  # the query heads of each key head
    prompt_scores = groups.ungroup_rows(groups.group_rows(queries) @ prompt_keys.transpose(-1, -2))
    scores = torch.cat([prompt_scores, queries @ key.transpose(-1, -2)], -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    from_prompt = groups.ungroup_rows(groups.group_rows(weights[..., :prompt_length]) @ prompt_values)
    return (from_prompt + weights[..., prompt_length:] @ value).reshape(rows, 1, heads, -1)


@contextmanager
def share_prompt_cache() -> Iterator[None]:
    """Use [`shared_prompt_attention_forward`] for keys of a [`KVCacheLayer`] with shared prompts, else plain `sdpa`."""
    sdpa = AttentionInterface()["sdpa"]

    def attention(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        layer = getattr(key, "kv_cache_layer", None)
        if layer is None:
            return sdpa(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
        return shared_prompt_attention_forward(layer, query, key, value, attention_mask, scaling), None

    AttentionInterface.register("sdpa", attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa)
