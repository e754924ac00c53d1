"""Ends a stage of the first phase when it harms the model. Too long an alignment destroys it (paper, table 2).

A rollout batch tells how good the weights are that sampled it: its mean reward, with a standard error over prompts. The
guard keeps the weights of the best stretch of `WINDOW` batches, and ends the stage when one of these turns:

- reward: the last stretch lies below the best by more than `FALL` standard errors of their difference;
- answers running into the cap: their share in the last stretch exceeds the first batch's by more than `CAPPED`;
- perplexity: the language model policy's of the probe set exceeds its smallest of the stage by more than a factor of
  `PERPLEXITY`, while the reward is past its best;
- alignment: the mean KL of the layer's policy to the later layers' exceeds its smallest of the stage by more than a factor
  of `KL`, while the reward is past its best.

The last two do not count while the reward is at its best: a policy that improves leaves its first answers too.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bupo.training.distributed.fsdp2 import get_local_shard

WINDOW = 5  # rollout batches
MAX_REWARD_DROP = 3.0  # standard errors
MAX_CLIPPED_INCREASE = 0.25  # share of answers
MAX_PERPLEXITY_RATIO, MAX_KL_RATIO = 4.0, 1.5  # factors


@dataclass
class EarlyStoppingMonitor:
    """The record of one stage.

    Attributes:
        rewards (`list[tuple[float, float]]`): mean and standard error by rollout batch; NaN where no answer was graded.
        capped (`list[float]`): share of answers cut at the cap, by rollout batch.
        perplexities, kls (`list[float]`): by probe.
        best (`int`): place in `rewards` of the batch that the kept weights sampled.
    """

    rewards: list[tuple[float, float]] = field(default_factory=list)
    clipped_ratios: list[float] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    best_batch: int = -1

    def record_rollouts(self, reward: float, error: float, capped: float) -> bool:
        """Note a rollout batch. Returns whether the weights that sampled it are the best so far."""
        self.rewards.append((reward, error))
        self.clipped_ratios.append(capped)
        best, now = self._average_window(self.best_batch)[0], self._average_window(-1)[0]
        if self.best_batch < 0 or (not math.isnan(reward) and (math.isnan(best) or now >= best)):
            self.best_batch = len(self.rewards) - 1
            return True
        return False

    def record_probe(self, perplexity: float, kl: float) -> None:
        """Note a probe: the perplexity of the probe set, and the mean KL to the later layers' policies, in nats."""
        self.perplexities.append(perplexity)
        self.kls.append(kl)

    def _average_window(self, last: int) -> tuple[float, float]:
        """Mean reward and its standard error of the `WINDOW` batches that end with this one, without ungraded ones."""
        last = last % len(self.rewards)
        rows = [row for row in self.rewards[max(0, last - WINDOW + 1) : last + 1] if not math.isnan(row[0])]
        if not rows:
            return math.nan, math.inf
        return sum(r for r, _ in rows) / len(rows), math.sqrt(sum(e * e for _, e in rows)) / len(rows)

    def get_stop_reason(self) -> str | None:
        """Why the stage must end, or None."""
        if len(self.rewards) <= WINDOW:
            return None
        (best, best_error), (now, error) = self._average_window(self.best_batch), self._average_window(-1)
        if best - now > MAX_REWARD_DROP * math.hypot(best_error, error):
            return f"the reward fell from {best:.3f} to {now:.3f} (means of {WINDOW} rollout batches)"
        capped = sum(self.clipped_ratios[-WINDOW:]) / WINDOW
        if capped > self.clipped_ratios[0] + MAX_CLIPPED_INCREASE:
            return (
                f"{100 * capped:.0f} % of the answers run into the cap, at first {100 * self.clipped_ratios[0]:.0f} %"
            )
        if self.best_batch < len(self.rewards) - 1:
            for what, values, factor in (
                ("perplexity", self.perplexities, MAX_PERPLEXITY_RATIO),
                ("KL to later layers", self.kls, MAX_KL_RATIO),
            ):
                if values and values[-1] > factor * min(values):
                    rise = f"rose from {min(values):.3g} to {values[-1]:.3g}"
                    return f"the {what} of the probes {rise}, and the reward is past its best"
        return None


def snapshot_weights(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Copies on the CPU; of sharded parameters, of what this process holds."""
    return [get_local_shard(parameter.detach()).to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def restore_weights(
    parameters: Iterable[nn.Parameter], kept: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put a snapshot back, and stop the optimizer's momentum of these parameters, which leads where it went wrong.

    Second moments stay: without them Adam's first steps would be as long as the learning rate, whatever the gradient.
    """
    for parameter, values in zip(parameters, kept, strict=True):
        get_local_shard(parameter).copy_(values)
        reset_momentum(optimizer.state.get(parameter, {}))


def reset_momentum(state: Mapping[str, Any]) -> None:
    """Set the momentum in a parameter's state to zero, if there is any."""
    for name in ("exp_avg", "momentum_buffer"):
        momentum = state.get(name)
        if momentum is not None:
            momentum.zero_()
