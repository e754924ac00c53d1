"""A rollout batch, or a micro-batch of one: a typed view of the dict that TRL hands from sampling to the loss.

`B` answers of this process, prompts padded on the left to `P` tokens and answers on the right to `C`. What is put into the dict
reaches the loss, cut and shuffled with the rest by TRL.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch

ENTROPIES_KEY, VALUES_KEY, RETURNS_KEY = "language_model_entropies", "values", "returns"  # bupo's own entries
OLD_LOG_PROBS, REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS = (
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
)  # TRL's
TOOL_MASK = "tool_mask"  # TRL's: 0 on tokens that the policy did not choose, or that are not to be trained on
INTERNAL_PREFIX = "internal_"  # before a name of TRL's: of the internal policy, where both are optimised
MAX_REWARD = 1e18  # beyond it TRL's variances leave fp32: such a reward is taken for an infinite one


class CompletionScores(NamedTuple):
    """What a policy says of a rollout's answers: `(B, C)` each; entropies in nats."""

    log_probs: torch.Tensor
    entropies: torch.Tensor


class SampledRollouts(NamedTuple):
    """TRL's rollouts.

    Attributes:
        tensors (`dict`): what the loss will read.
        rewards (`torch.Tensor` of shape `(G, functions)`): of all processes' answers; NaN where a function gave none, and for
            all functions where the answer is ungraded.
        scores ([`CompletionScores`], *optional*): the sampling policy's, where TRL scored the answers.
    """

    tensors: dict[str, Any]
    rewards: torch.Tensor
    scores: CompletionScores | None


class RolloutBatch:
    """See the module's head.

    Args:
        tensors (`dict`): TRL's.
        rewards (`torch.Tensor` of shape `(G,)`, *optional*): of the answers of all processes, groups of a prompt one after
            another; NaN where the answer is ungraded. Known while a batch is sampled.
        process (`int`): index of this process.
    """

    def __init__(self, tensors: dict[str, Any], rewards: torch.Tensor | None = None, process: int = 0):
        self.tensors, self._rewards, self.process_index = tensors, rewards, process

    def __len__(self) -> int:
        return self.tensors["completion_ids"].size(0)

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """`(B, P + C)`: prompts and answers."""
        return torch.cat([self.tensors["prompt_ids"], self.tensors["completion_ids"]], dim=1)

    @cached_property
    def attention_mask(self) -> torch.Tensor:
        """`(B, P + C)`: what is no padding."""
        return torch.cat([self.tensors["prompt_mask"], self.tensors["completion_mask"]], dim=1)

    @property
    def completion_length(self) -> int:
        """C."""
        return self.tensors["completion_ids"].size(1)

    @cached_property
    def loss_mask(self) -> torch.Tensor:
        """`(B, C)`: the tokens that are trained on: no padding, no tool's, none of an ungraded answer."""
        return self.tensors["completion_mask"] * self.tensors.get(TOOL_MASK, 1)

    @property
    def rewards(self) -> torch.Tensor:
        """`(G,)`: of all processes."""
        assert self._rewards is not None, "rewards are known while a batch is sampled"
        return self._rewards

    @property
    def process_slice(self) -> slice:
        """This process' answers among those of all."""
        return slice(self.process_index * len(self), (self.process_index + 1) * len(self))

    def get_prompt_completion_ids(self, group: int) -> list[tuple[list[int], list[int]]]:
        """Token ids of this process' prompts and answers, one answer of each prompt first, then the second of each …

        Answers that are masked, as truncated ones may be, are left out.

        Args:
            group (`int`): answers a prompt.
        """
        ids, kept = self.input_ids, self.attention_mask.bool()
        start = ids.size(1) - self.completion_length
        pairs = [
            (row[:start][real[:start]].tolist(), row[start:][real[start:]].tolist())
            for row, real in zip(ids, kept, strict=True)
        ]
        pairs = [pair for first in range(group) for pair in pairs[first::group]]
        return [(prompt, answer) for prompt, answer in pairs if answer]

    def mean_per_completion(self, values: torch.Tensor) -> torch.Tensor:
        """`(B,)`: of values `(B, C)` the mean over an answer's tokens; those of shape `(B,)` as they are."""
        return values if values.dim() == 1 else (values * self.loss_mask).sum(1) / self.loss_mask.sum(1).clamp(min=1)

    def get_tokens_per_update(self, share: float, processes: int) -> torch.Tensor:
        """Answer tokens of an update, a process: of a rollout batch's, which TRL counts over all processes, this share."""
        return self.tensors["num_items_in_batch"].clamp(min=1.0) / processes * share

    def mean_over_tokens(self, per_token: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Mean of `(B, C)` values over the answers' tokens of all processes; `total` sums a tensor over these."""
        summed, count = total(torch.stack([(per_token * self.loss_mask).sum(), self.loss_mask.sum().float()]))
        return (summed / count.clamp(min=1.0)).item()


def sum_weighted_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the reward of each answer, and NaN for ungraded answers, which count as absent. All code asks here.

    A function that gives None or NaN has not graded the answer, and the others decide. An infinite reward, or one beyond
    `LARGEST_REWARD`, leaves the sum without a meaning: then the answer is ungraded, whatever the others say. Functions of
    weight 0 are looked at for their means only, and grade no answer; if all weights are 0, every function grades.

    Args:
        rewards (`torch.Tensor` of shape `(G, functions)`): of each function, NaN where it gave none.
        weights (`torch.Tensor` of shape `(functions,)`): of the functions.

    Returns:
        `torch.Tensor` of shape `(G,)`: weighted sums.
    """
    weights = weights.to(rewards)
    if (weights != 0).any():
        rewards, weights = rewards[:, weights != 0], weights[weights != 0]
    sums = (rewards * weights).nansum(1)
    graded = ~rewards.isnan().all(1) & ~(rewards.abs() > MAX_REWARD).any(1) & (sums.abs() <= MAX_REWARD)
    return sums.masked_fill(~graded, torch.nan)


def mask_ungraded_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return `(G, functions)` rewards with NaN for every function where the answer is ungraded, and for infinite rewards of
    functions of weight 0. All that are left are finite; TRL leaves NaN out of its means.

    Args:
        rewards, weights: as of [`sum_weighted_rewards`].
    """
    ungraded = sum_weighted_rewards(rewards, weights).isnan()
    return rewards.masked_fill(ungraded[:, None] | (rewards.abs() > MAX_REWARD), torch.nan)


def mask_ungraded_completions(tensors: dict[str, Any], graded_B: torch.Tensor) -> torch.Tensor:
    """Mask ungraded answers out of the loss: TRL's token counts, KL, entropy and ratios, and a critic's values and returns.

    The mask is TRL's for tokens that the policy did not choose, `tool_mask`. Attention is as it was when the answers were
    scored, so that no log ratio of a masked token leaves fp32.

    Args:
        tensors (`dict`): what the loss will read.
        graded_B (`torch.Tensor` of shape `(B,)`): which of this process' answers are graded.

    Returns:
        `torch.Tensor`: tokens of this process that the loss counts.
    """
    answers = tensors["completion_mask"]
    tensors[TOOL_MASK] = tensors.get(TOOL_MASK, torch.ones_like(answers)) * graded_B.to(answers)[:, None]
    return (answers * tensors[TOOL_MASK]).sum()


def get_equal_reward_ratio(rewards_G: torch.Tensor, group: int) -> float:
    """Return the share of groups whose graded answers have one reward, among groups with a graded answer; NaN without any.

    Args:
        rewards_G (`torch.Tensor` of shape `(G,)`): NaN for ungraded answers.
        group (`int`): answers of a group.
    """
    groups = rewards_G.view(-1, group)
    groups = groups[~groups.isnan().all(1)]
    spread = groups.nan_to_num(nan=-torch.inf).amax(1) - groups.nan_to_num(nan=torch.inf).amin(1)
    return (spread <= 1e-8).float().mean().item()
