"""Micro-batches of a rollout batch, split and packed like a run's: prompts in each, and pairs of tokens in attention."""

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
        is_packed (`bool`): whether all rows are packed into one.
        uses_block_mask (`bool`): whether attention skips masked blocks (FlexAttention) or computes full rectangles (segments).
    """

    rows: int
    prompts: int
    lengths: SequenceLengths
    is_packed: bool
    uses_block_mask: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the layers."""
        if not self.is_packed:
            return self.rows * self.lengths.total
        return self.prompts * self.lengths.prompt + self.rows * self.lengths.completion

    @property
    def completion_tokens(self) -> int:
        """Tokens that pass through the unembedding."""
        return self.rows * self.lengths.completion

    def count_attention_pairs(self, window: int | None = None) -> float:
        """Return the pairs of query and key that attention multiplies; `window` is the length of a sliding window."""
        prompt, answer = self.lengths.prompt, self.lengths.completion
        if not self.is_packed:
            return float(self.rows * self.lengths.total**2)
        if not self.uses_block_mask:
            return float(self.prompts * prompt**2 + self.rows * answer * (prompt + answer))
        prompt_pairs = _count_causal_pairs(prompt, window)
        return self.prompts * prompt_pairs + self.rows * (_count_causal_pairs(prompt + answer, window) - prompt_pairs)

    def build_layout(self) -> PackedLayout | tuple[int, int]:
        """Return the segments of a packed row (CPU) on the meta device, or the shape of the rows."""
        if not self.is_packed:
            return self.rows, self.lengths.total
        if self.uses_block_mask:
            return 1, self.num_tokens
        ids = torch.ones(self.rows, self.lengths.total, dtype=torch.long)
        for row in range(self.rows):  # spread the answers over the prompts, the remainder over the first ones
            ids[row, 0] = 2 + row % self.prompts
        layout = PackedLayout.from_rows(ids, torch.ones_like(ids), self.lengths.prompt)
        assert layout is not None, "these rows have prompts"
        return PackedLayout(
            layout.ids.to("meta"), layout.positions.to("meta"), layout.token_indices.to("meta"), layout.segments
        )


def _count_causal_pairs(length: int, window: int | None) -> float:
    """Return the pairs of query and key in a causal row."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


def can_pack_rows(config: BuPOConfig, attention: str | None) -> bool:
    """Return whether a run with these options packs rows."""
    return not (config.torch_compile or config.neftune_noise_alpha) and attention in (None, "sdpa", "eager")


def build_micro_batches(
    config: BuPOConfig, lengths: SequenceLengths, hardware: PlanOptions, packed: bool, seed: int = 0
) -> list[MicroBatch]:
    """Return the micro-batches of one device and rollout batch, shuffled, split and arranged like in a run."""
    group_size, size, num_batches = (
        config.num_generations,
        config.per_device_train_batch_size,
        config.steps_per_generation,
    )
    prompts = torch.arange(size * num_batches) // group_size
    prompts = prompts[torch.randperm(size * num_batches, generator=torch.Generator().manual_seed(seed))]
    micro_batches = [
        {
            "prompt_ids": part[:, None],
            "prompt_mask": torch.ones_like(part)[:, None],
            "completion_mask": torch.full_like(part, lengths.completion)[:, None],  # only its sum is used
        }
        for part in prompts.split(size)
    ]
    if packed and can_reorder_rows(config, balances_experts=False):
        micro_batches = arrange_micro_batches(micro_batches, config.gradient_accumulation_steps)
    num_prompts = [len(batch["prompt_ids"].unique()) for batch in micro_batches]
    return [MicroBatch(size, count, lengths, packed, not hardware.is_cpu) for count in num_prompts]


def find_largest_micro_batch(
    config: BuPOConfig, longest: SequenceLengths, hardware: PlanOptions, packed: bool
) -> MicroBatch:
    """Return the micro-batch that needs the most memory: the longest answers, to the largest number of prompts."""
    return max(build_micro_batches(config, longest, hardware, packed), key=lambda batch: batch.prompts)


def build_scoring_batches(
    config: BuPOConfig, lengths: SequenceLengths, hardware: PlanOptions, packed: bool
) -> list[MicroBatch]:
    """Return the passes that score a rollout batch before its updates: rows in sampling order, grouped by prompt."""
    size, num_batches, group_size = (
        config.per_device_train_batch_size,
        config.steps_per_generation,
        config.num_generations,
    )
    starts = range(0, size * num_batches, size)
    num_prompts = [-(-(start + size) // group_size) - start // group_size for start in starts]
    return [MicroBatch(size, count, lengths, packed, not hardware.is_cpu) for count in num_prompts]
