"""Advantage estimators of the paper's table 1. TRL computes GRPO's advantages.

An estimator is a function from [`AdvantageInputs`] to [`Advantages`], listed in `ESTIMATORS`. Suffixes give shapes:
`_B` for the completions of this process, `_C` for completion tokens, `_N` for the completions of all processes, grouped
by prompt.

Ungraded completions count as absent: their tokens are masked and their reward is NaN, and estimators leave both out of
their means. An ungraded completion has an advantage of 0 and does not change others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bupo.training.objective.rollout_batch import RETURNS_KEY, VALUES_KEY, RolloutBatch

EPSILON = 1e-8


@dataclass(frozen=True)
class AdvantageInputs:
    """Inputs of an estimator, for one rollout batch.

    Attributes:
        rewards_N (`torch.Tensor`): weighted sums of the reward functions; NaN for ungraded completions.
        process_slice (`slice`): rows of this process in `rewards_N`.
        mask_BC (`torch.Tensor`): tokens of graded completions that the policy chose.
        num_generations (`int`): completions a prompt.
        sum_over_processes (`Callable`): sums a tensor over processes.
        values_BC (`torch.Tensor`, *optional*): the critic's, for estimators in `CRITIC_ESTIMATORS`.
        gamma, lam (`float`): discount and lambda of GAE.
    """

    rewards_N: torch.Tensor
    process_slice: slice
    mask_BC: torch.Tensor
    num_generations: int
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor]
    values_BC: torch.Tensor | None = None
    gamma: float = 1.0
    lam: float = 1.0


class Advantages(NamedTuple):
    """Advantages `(B,)` or `(B, C)`, and with a critic its targets, the returns `(B, C)`."""

    advantages: torch.Tensor
    returns_BC: torch.Tensor | None = None


def rloo(inputs: AdvantageInputs) -> Advantages:
    """Subtract from each reward the mean of the prompt's other completions."""
    return Advantages(compute_leave_one_out(inputs.rewards_N, inputs.num_generations)[inputs.process_slice])


def reinforce_plus_plus(inputs: AdvantageInputs) -> Advantages:
    """Give each token its completion's reward, and whiten over the batch."""
    rewards_BC = inputs.rewards_N[inputs.process_slice].nan_to_num(nan=0.0)[:, None] * inputs.mask_BC
    return Advantages(masked_whiten(rewards_BC, inputs.mask_BC, inputs.sum_over_processes))


def ppo(inputs: AdvantageInputs) -> Advantages:
    """Compute GAE from a critic's values and the reward on the last token, and whiten over the batch."""
    assert inputs.values_BC is not None, "ppo needs a critic's values"
    rewards_BC = put_on_last_token(inputs.rewards_N[inputs.process_slice], inputs.mask_BC)
    advantages, returns = gae(rewards_BC, inputs.values_BC, inputs.mask_BC, inputs.gamma, inputs.lam)
    return Advantages(masked_whiten(advantages, inputs.mask_BC, inputs.sum_over_processes), returns)


# by the value of `advantage_estimator`; None for TRL's GRPO
ESTIMATORS: dict[str, Callable[[AdvantageInputs], Advantages] | None] = {
    "grpo": None,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "ppo": ppo,
}
CRITIC_ESTIMATORS = ("ppo",)
GROUP_ESTIMATORS = ("grpo", "rloo")  # compare completions of one prompt: equal rewards give no gradient


def set_advantages(
    name: str,
    batch: RolloutBatch,
    num_generations: int,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    values_BC: torch.Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> bool:
    """Store an estimator's advantages, and a critic's values and returns, in a rollout batch.

    Args:
        name (`str`): key of `ESTIMATORS`.
        batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): with its rewards.
        num_generations, sum_over_processes, values_BC, gamma, lam: as in [`AdvantageInputs`].

    Returns:
        `bool`: False for GRPO, whose advantages TRL has stored.
    """
    estimator = ESTIMATORS[name]
    if estimator is None:
        return False
    is_graded_N = batch.rewards.isfinite()
    rewards_N = batch.rewards.masked_fill(~is_graded_N, torch.nan)
    mask_BC = batch.loss_mask * is_graded_N[batch.process_slice, None]
    inputs = AdvantageInputs(
        rewards_N, batch.process_slice, mask_BC, num_generations, sum_over_processes, values_BC, gamma, lam
    )
    batch.tensors["advantages"], returns = estimator(inputs)
    if returns is not None:
        batch.tensors |= {VALUES_KEY: values_BC, RETURNS_KEY: returns}
    return True


def compute_leave_one_out(rewards_N: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Compute RLOO (arXiv 2402.14740): each reward minus the mean reward of the prompt's other completions.

    Args:
        rewards_N (`torch.Tensor` of shape `(prompts * num_generations,)`): NaN for an ungraded completion, which is
            left out of the means and gets 0.
        num_generations (`int`): completions a prompt.
    """
    rewards = rewards_N.view(-1, num_generations)
    others = (~rewards.isnan()).sum(1, keepdim=True) - 1
    mean_of_others = (rewards.nansum(1, keepdim=True) - rewards) / others.clamp(min=1)
    return torch.where(others > 0, rewards - mean_of_others, 0.0).nan_to_num(nan=0.0).view(-1)


def put_on_last_token(rewards_B: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
    """Return `(B, C)` with each reward on the last token of its completion, 0 elsewhere; NaN rewards give 0."""
    positions = torch.arange(mask_BC.size(1), device=mask_BC.device)
    last = (positions * mask_BC).argmax(1)
    is_last = (positions == last[:, None]) & mask_BC.bool()
    return torch.where(is_last, rewards_B.nan_to_num(nan=0.0)[:, None], 0.0)


def gae(
    rewards_BC: torch.Tensor, values_BC: torch.Tensor, mask_BC: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute generalized advantage estimation (arXiv 1506.02438, eq. 16), and the returns that a critic learns.

    `delta_t = r_t + gamma V_(t+1) - V_t`, `A_t = delta_t + gamma lam A_(t+1)`, with V = 0 after the last token; a
    return is `A_t + V_t`. Tokens that are masked within a completion (a tool's) are skipped.

    Returns:
        `tuple`: advantages and returns, `(B, C)` each, 0 on padding.
    """
    advantages = torch.zeros_like(values_BC)
    next_value = next_advantage = torch.zeros_like(values_BC[:, 0])
    for t in range(values_BC.size(1) - 1, -1, -1):
        is_token = mask_BC[:, t].bool()
        delta = rewards_BC[:, t] + gamma * next_value - values_BC[:, t]
        advantages[:, t] = torch.where(is_token, delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(is_token, values_BC[:, t], next_value)
        next_advantage = torch.where(is_token, advantages[:, t], next_advantage)
    return advantages, (advantages + values_BC) * mask_BC


def masked_whiten(
    values_BC: torch.Tensor,
    mask_BC: torch.Tensor,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> torch.Tensor:
    """Scale values to zero mean and unit deviation over all tokens of the batch, with 0 on padding.

    Applied to rewards on all tokens, this is REINFORCE++ (arXiv 2501.03262: one mean and one deviation a batch, no
    groups). PPO normalises GAE in the same way.

    Args:
        values_BC, mask_BC (`torch.Tensor`): values, and the tokens that count.
        sum_over_processes (`Callable`, *optional*): sums a tensor over processes.
    """
    mask = mask_BC.to(values_BC.dtype)
    count, total = sum_over_processes(torch.stack([mask.sum(), (values_BC * mask).sum()]))
    centred = (values_BC - total / count.clamp(min=1)) * mask
    variance = sum_over_processes(centred.square().sum()[None])[0] / (count - 1).clamp(min=1)
    return centred / (variance + EPSILON).sqrt()
