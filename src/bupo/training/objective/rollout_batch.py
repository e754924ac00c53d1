"""Rollout batches and micro-batches: a typed view of the dict that TRL passes from sampling to the loss.

Shapes: `B` completions of this process; prompts are padded on the left to `P` tokens, completions on the right to `C`.
TRL shuffles and splits all entries of the dict, including those that bupo adds.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch

ENTROPIES_KEY, VALUES_KEY, RETURNS_KEY = "language_model_entropies", "values", "returns"  # entries that bupo adds
OLD_LOG_PROBS, REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS = (
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
)  # TRL's
TOOL_MASK = "tool_mask"  # TRL's: 0 on tokens that the policy did not choose, or that are not trained on
INTERNAL_PREFIX = "internal_"  # before TRL's names: of the auxiliary internal policy
MAX_REWARD = 1e18  # TRL's variances of larger rewards exceed fp32, so these count as infinite


class CompletionScores(NamedTuple):
    """A policy's log-probs and entropies (nats) of completions, `(B, C)` each."""

    log_probs: torch.Tensor
    entropies: torch.Tensor


class SampledRollouts(NamedTuple):
    """A rollout batch as TRL samples it.

    Attributes:
        tensors (`dict`): for the loss.
        rewards (`torch.Tensor` of shape `(all completions, functions)`): of all processes; NaN where a function
            returned none, and for all functions of an ungraded completion.
        scores ([`CompletionScores`], *optional*): the sampling policy's, if TRL scored the completions.
    """

    tensors: dict[str, Any]
    rewards: torch.Tensor
    scores: CompletionScores | None


class RolloutBatch:
    """View of a rollout batch or micro-batch.

    Args:
        tensors (`dict`): TRL's.
        rewards (`torch.Tensor` of shape `(all completions,)`, *optional*): of all processes, grouped by prompt; NaN for
            ungraded completions. Only known for a rollout batch that is being sampled.
        process_index (`int`): of this process.
    """

    def __init__(self, tensors: dict[str, Any], rewards: torch.Tensor | None = None, process_index: int = 0):
        self.tensors, self._rewards, self.process_index = tensors, rewards, process_index

    def __len__(self) -> int:
        return self.tensors["completion_ids"].size(0)

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """Prompts and completions, `(B, P + C)`."""
        return torch.cat([self.tensors["prompt_ids"], self.tensors["completion_ids"]], dim=1)

    @cached_property
    def attention_mask(self) -> torch.Tensor:
        """Mask of the tokens that are not padding, `(B, P + C)`."""
        return torch.cat([self.tensors["prompt_mask"], self.tensors["completion_mask"]], dim=1)

    @property
    def completion_length(self) -> int:
        """C, in tokens."""
        return self.tensors["completion_ids"].size(1)

    @cached_property
    def loss_mask(self) -> torch.Tensor:
        """Mask of the tokens that are trained on, `(B, C)`: without padding, tools' tokens and ungraded completions."""
        return self.tensors["completion_mask"] * self.tensors.get(TOOL_MASK, 1)

    @property
    def rewards(self) -> torch.Tensor:
        """Rewards of all processes' completions."""
        assert self._rewards is not None, "only a rollout batch that is being sampled has rewards"
        return self._rewards

    @property
    def process_slice(self) -> slice:
        """Rows of this process among those of all processes."""
        return slice(self.process_index * len(self), (self.process_index + 1) * len(self))

    def get_prompt_completion_ids(self, num_generations: int) -> list[tuple[list[int], list[int]]]:
        """Return token ids of this process' prompts and completions: the first completion of each prompt, then the
        second ...

        Masked completions, such as truncated ones, are left out.

        Args:
            num_generations (`int`): completions a prompt.
        """
        start = self.input_ids.size(1) - self.completion_length
        pairs = [
            (ids[:start][mask[:start]].tolist(), ids[start:][mask[start:]].tolist())
            for ids, mask in zip(self.input_ids, self.attention_mask.bool(), strict=True)
        ]
        pairs = [pair for first in range(num_generations) for pair in pairs[first::num_generations]]
        return [(prompt, completion) for prompt, completion in pairs if completion]

    def mean_per_completion(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `(B, C)` values over each completion's tokens, `(B,)`; values `(B,)` are returned unchanged."""
        return values if values.dim() == 1 else (values * self.loss_mask).sum(1) / self.loss_mask.sum(1).clamp(min=1)

    def get_tokens_per_update(self, share: float, processes: int) -> torch.Tensor:
        """Return the mean number of completion tokens of an update on a process.

        Args:
            share (`float`): of the rollout batch, that an update takes.
            processes (`int`): over which TRL counts the tokens of the rollout batch.
        """
        return self.tensors["num_items_in_batch"].clamp(min=1.0) / processes * share

    def mean_over_tokens(
        self, values: torch.Tensor, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]
    ) -> float:
        """Return the mean of `(B, C)` values over the tokens of all processes that are trained on."""
        sums = torch.stack([(values * self.loss_mask).sum(), self.loss_mask.sum().float()])
        total, count = sum_over_processes(sums)
        return (total / count.clamp(min=1.0)).item()


def sum_weighted_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the reward of each completion, and NaN for ungraded completions, which count as absent.

    A function that returns None or NaN has not graded the completion, and the other functions decide. An infinite
    reward, or one beyond `MAX_REWARD`, makes the sum meaningless, so the completion is ungraded. Functions of weight 0
    are logged and grade no completion; if all weights are 0, every function grades.

    Args:
        rewards (`torch.Tensor` of shape `(all completions, functions)`): NaN where a function returned none.
        weights (`torch.Tensor` of shape `(functions,)`): of the functions.

    Returns:
        `torch.Tensor` of shape `(all completions,)`: weighted sums.
    """
    weights = weights.to(rewards)
    if (weights != 0).any():
        rewards, weights = rewards[:, weights != 0], weights[weights != 0]
    sums = (rewards * weights).nansum(1)
    is_graded = ~rewards.isnan().all(1) & ~(rewards.abs() > MAX_REWARD).any(1) & (sums.abs() <= MAX_REWARD)
    return sums.masked_fill(~is_graded, torch.nan)


def mask_ungraded_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the rewards with NaN for ungraded completions, and for infinite rewards of functions of weight 0.

    The other rewards are finite. TRL leaves NaN out of its means.

    Args:
        rewards, weights: as in [`sum_weighted_rewards`].
    """
    ungraded = sum_weighted_rewards(rewards, weights).isnan()
    return rewards.masked_fill(ungraded[:, None] | (rewards.abs() > MAX_REWARD), torch.nan)


def mask_ungraded_completions(tensors: dict[str, Any], is_graded_B: torch.Tensor) -> torch.Tensor:
    """Mask ungraded completions out of the loss: TRL's token counts, KL, entropy and ratios, and a critic's values and
    returns.

    The mask is `tool_mask`, TRL's mask for tokens that the policy did not choose. The attention mask stays, so that log
    ratios of masked tokens stay within fp32.

    Args:
        tensors (`dict`): for the loss.
        is_graded_B (`torch.Tensor` of shape `(B,)`): of this process' completions.

    Returns:
        `torch.Tensor`: number of this process' tokens that the loss counts.
    """
    completion_mask = tensors["completion_mask"]
    tool_mask = tensors.get(TOOL_MASK, torch.ones_like(completion_mask))
    tensors[TOOL_MASK] = tool_mask * is_graded_B.to(completion_mask)[:, None]
    return (completion_mask * tensors[TOOL_MASK]).sum()


def get_equal_reward_ratio(rewards: torch.Tensor, group_size: int) -> float:
    """Return the share of groups whose graded completions have equal rewards; NaN if no group has a graded completion.

    Args:
        rewards (`torch.Tensor` of shape `(all completions,)`): NaN for ungraded completions.
        group_size (`int`): completions of a group.
    """
    groups = rewards.view(-1, group_size)
    groups = groups[~groups.isnan().all(1)]
    spread = groups.nan_to_num(nan=-torch.inf).amax(1) - groups.nan_to_num(nan=torch.inf).amin(1)
    return (spread <= 1e-8).float().mean().item()
