"""Advantage estimators. GRPO's is TRL's own; these are the others of the paper's table 1.

Suffixes give shapes: `_G` is one value an answer of all processes, groups of a prompt one after another; `_BT` is one value
a token of this process' answers, padding masked.
"""

from collections.abc import Callable

import torch

EPSILON = 1e-8


def leave_one_out(rewards_G: torch.Tensor, group: int) -> torch.Tensor:
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


def last_token(rewards_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """`(B, T)`: an answer's reward on its last token, 0 elsewhere; NaN rewards give 0."""
    places = torch.arange(mask_BT.size(1), device=mask_BT.device)
    last = (places * mask_BT).argmax(1)
    here = (places == last[:, None]) & mask_BT.bool()
    return torch.where(here, rewards_B.nan_to_num(nan=0.0)[:, None], 0.0)


def generalized(
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


def whitened(
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
