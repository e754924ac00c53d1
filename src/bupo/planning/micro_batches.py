"""The micro-batches of a rollout batch as a run would cut and pack them: how many prompts stand in each, and which pairs of
tokens meet in attention.
"""

from dataclasses import dataclass

import torch

from bupo.models.packing import PackedLayout
from bupo.planning.options import PlanOptions
from bupo.training.config import BuPOConfig
from bupo.training.objective.micro_batches import arrange_micro_batches, can_reorder_rows


@dataclass(frozen=True)
class SequenceLengths:
    """Tokens of a prompt and of an answer."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        rows, prompts (`int`): answers, and the distinct prompts among them.
        lengths ([`SequenceLengths`]): of each prompt and answer.
        packed, blocks (`bool`): whether rows stand in one row; whether attention leaves out what no token sees
            (FlexAttention's block mask) or computes whole rectangles (segments).
    """

    rows: int
    prompts: int
    lengths: SequenceLengths
    is_packed: bool
    uses_block_mask: bool

    @property
    def num_tokens(self) -> int:
        """That the layers compute."""
        if not self.is_packed:
            return self.rows * self.lengths.total
        return self.prompts * self.lengths.prompt + self.rows * self.lengths.completion

    @property
    def completion_tokens(self) -> int:
        """That meet the unembedding."""
        return self.rows * self.lengths.completion

    def count_attention_pairs(self, window: int | None = None) -> float:
        """Of a query and a key that attention multiplies; `window`: how far back a token sees."""
        prompt, answer = self.lengths.prompt, self.lengths.completion
        if not self.is_packed:
            return float(self.rows * self.lengths.total**2)
        if not self.uses_block_mask:
            return float(self.prompts * prompt**2 + self.rows * answer * (prompt + answer))
        whole = _count_causal_pairs(prompt, window)
        return self.prompts * whole + self.rows * (_count_causal_pairs(prompt + answer, window) - whole)

    def build_layout(self) -> PackedLayout | tuple[int, int]:
        """On the meta device: the segments of a packed row on a CPU, one row under a block mask, or rows."""
        if not self.is_packed:
            return self.rows, self.lengths.total
        if self.uses_block_mask:
            return 1, self.num_tokens
        ids = torch.ones(self.rows, self.lengths.total, dtype=torch.long)
        for row in range(self.rows):  # answers of one prompt one after another, some more of the first ones
            ids[row, 0] = 2 + row % self.prompts
        real = PackedLayout.from_rows(ids, torch.ones_like(ids), self.lengths.prompt)
        assert real is not None, "these rows have prompts"
        return PackedLayout(
            real.ids.to("meta"), real.positions.to("meta"), real.token_indices.to("meta"), real.segments
        )


def _count_causal_pairs(length: int, window: int | None) -> float:
    """Pairs in a causal row."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


def can_pack_rows(config: BuPOConfig, attention: str | None) -> bool:
    """Whether a run packs rows, as far as its options tell."""
    return not (config.torch_compile or config.neftune_noise_alpha) and attention in (None, "sdpa", "eager")


def build_micro_batches(
    config: BuPOConfig, lengths: SequenceLengths, on: PlanOptions, packed: bool, seed: int = 0
) -> list[MicroBatch]:
    """Those of one device and rollout batch, shuffled, cut and arranged as a run does it."""
    group, size, count = config.num_generations, config.per_device_train_batch_size, config.steps_per_generation
    prompts = torch.arange(size * count) // group
    prompts = prompts[torch.randperm(size * count, generator=torch.Generator().manual_seed(seed))]
    pieces = [
        {
            "prompt_ids": part[:, None],
            "prompt_mask": torch.ones_like(part)[:, None],
            "completion_mask": torch.full_like(part, lengths.completion)[:, None],  # its sum is what is looked at
        }
        for part in prompts.split(size)
    ]
    if packed and can_reorder_rows(config, balances_experts=False):
        pieces = arrange_micro_batches(pieces, config.gradient_accumulation_steps)
    distinct = [len(piece["prompt_ids"].unique()) for piece in pieces]
    return [MicroBatch(size, found, lengths, packed, not on.is_cpu) for found in distinct]


def find_largest_micro_batch(config: BuPOConfig, longest: SequenceLengths, on: PlanOptions, packed: bool) -> MicroBatch:
    """The micro-batch that takes the most memory: of the longest answers, to as many prompts as there may be."""
    found = build_micro_batches(config, longest, on, packed)
    return max(found, key=lambda batch: batch.prompts)


def build_scoring_batches(
    config: BuPOConfig, lengths: SequenceLengths, on: PlanOptions, packed: bool
) -> list[MicroBatch]:
    """The passes that score a rollout batch before its updates: rows as they were sampled, answers of a prompt together."""
    size, count, group = config.per_device_train_batch_size, config.steps_per_generation, config.num_generations
    starts = range(0, size * count, size)
    prompts = [-(-(start + size) // group) - start // group for start in starts]
    return [MicroBatch(size, found, lengths, packed, not on.is_cpu) for found in prompts]
