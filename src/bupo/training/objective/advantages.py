"""Advantage estimators: from rewards to advantages. GRPO's is TRL's own; here are the others of the paper's table 1.

A method is a function from [`AdvantageInputs`] to [`Advantages`] in the table `ESTIMATORS`. Suffixes give shapes: `_G` is one value an
answer of all processes, groups of a prompt one after another; `_B` is one an answer of this process, `_BT` one a token, padding
masked.

Ungraded answers count as absent: `estimate` masks all of their tokens and gives them no reward, and each estimator leaves
masked tokens and rewards of NaN out of its means, so that an ungraded answer has an advantage of 0 and changes no other's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bupo.training.objective.rollout_batch import RETURNS_KEY, VALUES_KEY, RolloutBatch

EPSILON = 1e-8


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may read of a rollout batch.

    Attributes:
        rewards_G (`torch.Tensor`): weighted sums of the reward functions; NaN for ungraded answers.
        own (`slice`): this process' answers among them.
        mask_BT (`torch.Tensor`): the tokens that the policy chose, of graded answers.
        group (`int`): answers a prompt.
        total (`Callable`): sums a tensor over processes.
        values_BT (`torch.Tensor`, *optional*): a critic's, for the methods of `WITH_CRITIC`.
        gamma, lam (`float`): of GAE.
    """

    rewards_G: torch.Tensor
    process_slice: slice
    mask_BC: torch.Tensor
    num_generations: int
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor]
    values_BC: torch.Tensor | None = None
    gamma: float = 1.0
    lam: float = 1.0


class Advantages(NamedTuple):
    """What an estimator gives: `(B,)` or `(B, T)`, and with a critic the returns `(B, T)` that it learns."""

    advantages: torch.Tensor
    returns_BC: torch.Tensor | None = None


def rloo(given: AdvantageInputs) -> Advantages:
    """An answer's reward against the mean of the others to its prompt."""
    return Advantages(compute_leave_one_out(given.rewards_G, given.num_generations)[given.process_slice])


def reinforce_plus_plus(given: AdvantageInputs) -> Advantages:
    """An answer's reward on each of its tokens, whitened over the batch."""
    on_all_BT = given.rewards_G[given.process_slice].nan_to_num(nan=0.0)[:, None] * given.mask_BC
    return Advantages(masked_whiten(on_all_BT, given.mask_BC, given.sum_over_processes))


def ppo(given: AdvantageInputs) -> Advantages:
    """GAE of a critic's values and the reward on the last token, whitened over the batch."""
    assert given.values_BC is not None, "ppo needs a critic's values"
    rewards_BT = put_on_last_token(given.rewards_G[given.process_slice], given.mask_BC)
    estimates, returns = gae(rewards_BT, given.values_BC, given.mask_BC, given.gamma, given.lam)
    return Advantages(masked_whiten(estimates, given.mask_BC, given.sum_over_processes), returns)


# by the name that `advantage_estimator` takes; None: what TRL has computed stays
ESTIMATORS: dict[str, Callable[[AdvantageInputs], Advantages] | None] = {
    "grpo": None,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "ppo": ppo,
}
CRITIC_ESTIMATORS = ("ppo",)
GROUP_ESTIMATORS = ("grpo", "rloo")  # compare the answers to one prompt: equal ones teach nothing


def set_advantages(
    name: str,
    batch: RolloutBatch,
    group: int,
    total: Callable[[torch.Tensor], torch.Tensor],
    values_BT: torch.Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> bool:
    """Put an estimator's advantages, and what a critic learns, into a rollout batch. False where GRPO's stay.

    Args:
        name (`str`): of `ESTIMATORS`.
        batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): with its rewards.
        group, total, values_BT, gamma, lam: as of [`AdvantageInputs`].
    """
    estimator = ESTIMATORS[name]
    if estimator is None:
        return False
    graded_G = batch.rewards.isfinite()
    rewards_G = batch.rewards.masked_fill(~graded_G, torch.nan)
    mask_BT = batch.loss_mask * graded_G[batch.process_slice, None]
    given = AdvantageInputs(rewards_G, batch.process_slice, mask_BT, group, total, values_BT, gamma, lam)
    batch.tensors["advantages"], returns = estimator(given)
    if returns is not None:
        batch.tensors |= {VALUES_KEY: values_BT, RETURNS_KEY: returns}
    return True


def compute_leave_one_out(rewards_G: torch.Tensor, group: int) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): each reward minus the mean of the other answers' to the same prompt.

    Args:
        rewards_G (`torch.Tensor` of shape `(prompts * group,)`): NaN where nothing graded the answer; such an answer counts for
            nobody and gets 0.
        group (`int`): answers a prompt.
    """
    rewards = rewards_G.view(-1, group)
    others = (~rewards.isnan()).sum(1, keepdim=True) - 1
    mean_of_others = (rewards.nansum(1, keepdim=True) - rewards) / others.clamp(min=1)
    return torch.where(others > 0, rewards - mean_of_others, 0.0).nan_to_num(nan=0.0).view(-1)


def put_on_last_token(rewards_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """`(B, T)`: an answer's reward on its last token, 0 elsewhere; NaN rewards give 0."""
    places = torch.arange(mask_BT.size(1), device=mask_BT.device)
    last = (places * mask_BT).argmax(1)
    here = (places == last[:, None]) & mask_BT.bool()
    return torch.where(here, rewards_B.nan_to_num(nan=0.0)[:, None], 0.0)


def gae(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16) and the returns that a critic learns.

    `delta_t = r_t + gamma V_(t+1) - V_t`, `A_t = delta_t + gamma lam A_(t+1)`, with V = 0 after the last token; a return is
    `A_t + V_t`. Tokens that are masked inside an answer (a tool's) are passed over.

    Returns:
        `tuple`: advantages and returns, `(B, T)` each, 0 on padding.
    """
    advantages = torch.zeros_like(values_BT)
    next_value = next_advantage = torch.zeros_like(values_BT[:, 0])
    for t in range(values_BT.size(1) - 1, -1, -1):
        real = mask_BT[:, t].bool()
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        advantages[:, t] = torch.where(real, delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(real, values_BT[:, t], next_value)
        next_advantage = torch.where(real, advantages[:, t], next_advantage)
    return advantages, (advantages + values_BT) * mask_BT


def masked_whiten(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
) -> torch.Tensor:
    """Zero mean and unit deviation over all real tokens of the batch, 0 on padding.

    With the answers' rewards on all their tokens this is REINFORCE++ (arXiv 2501.03262: no group, one mean and one deviation
    a batch); PPO normalises GAE in the same way.

    Args:
        reduce (`Callable`, *optional*): sums a tensor over processes.
    """
    mask = mask_BT.to(values_BT.dtype)
    count, total = reduce(torch.stack([mask.sum(), (values_BT * mask).sum()]))
    centred = (values_BT - total / count.clamp(min=1)) * mask
    variance = reduce(centred.square().sum()[None])[0] / (count - 1).clamp(min=1)
    return centred / (variance + EPSILON).sqrt()
