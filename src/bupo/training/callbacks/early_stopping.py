"""Early stopping of the first phase: it ends a stage that harms the model (paper, table 2: too long a phase destroys it).

A rollout batch measures the weights that sampled it: their mean reward, with a standard error over prompts. The monitor
keeps the weights of the best window of `WINDOW` batches, and ends the stage on one of these conditions:

- Reward: the last window lies below the best by more than `MAX_REWARD_DROP` standard errors of their difference.
- Length: the share of cut answers in the last window exceeds the first batch's by more than `MAX_CLIPPED_INCREASE`.
- Perplexity: the language model policy's on the probe set exceeds its minimum of the stage by more than a factor of
  `MAX_PERPLEXITY_RATIO`, and the reward is past its best.
- KL: the mean KL of the layer's policy to the later layers' exceeds its minimum of the stage by more than a factor of
  `MAX_KL_RATIO`, and the reward is past its best.

The last two do not count while the reward is at its best: an improving policy moves away from its first answers too.
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
    """Measurements of one stage of the first phase.

    Attributes:
        rewards (`list[tuple[float, float]]`): mean and standard error by rollout batch; NaN if no answer was graded.
        clipped_ratios (`list[float]`): share of answers cut at `max_completion_length`, by rollout batch.
        perplexities, kls (`list[float]`): by probe; KLs in nats.
        best_batch (`int`): index in `rewards` of the batch that the kept weights sampled, -1 at first.
    """

    rewards: list[tuple[float, float]] = field(default_factory=list)
    clipped_ratios: list[float] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    best_batch: int = -1

    def record_rollouts(self, reward: float, error: float, clipped_ratio: float) -> bool:
        """Record a rollout batch and return whether the weights that sampled it are the best so far.

        Args:
            reward, error (`float`): mean reward and its standard error over prompts.
            clipped_ratio (`float`): share of cut answers.
        """
        self.rewards.append((reward, error))
        self.clipped_ratios.append(clipped_ratio)
        best, last = self._average_window(self.best_batch)[0], self._average_window(-1)[0]
        if self.best_batch < 0 or (not math.isnan(reward) and (math.isnan(best) or last >= best)):
            self.best_batch = len(self.rewards) - 1
            return True
        return False

    def record_probe(self, perplexity: float, kl: float) -> None:
        """Record a probe.

        Args:
            perplexity (`float`): of the probe set.
            kl (`float`): mean KL of the layer's policy to the later layers', in nats.
        """
        self.perplexities.append(perplexity)
        self.kls.append(kl)

    def _average_window(self, last: int) -> tuple[float, float]:
        """Return the mean reward and its standard error over the graded ones of the `WINDOW` batches up to `last`."""
        last = last % len(self.rewards)
        rows = [row for row in self.rewards[max(0, last - WINDOW + 1) : last + 1] if not math.isnan(row[0])]
        if not rows:
            return math.nan, math.inf
        return sum(r for r, _ in rows) / len(rows), math.sqrt(sum(e * e for _, e in rows)) / len(rows)

    def get_stop_reason(self) -> str | None:
        """Return why the stage must end, or None."""
        if len(self.rewards) <= WINDOW:
            return None
        (best, best_error), (last, error) = self._average_window(self.best_batch), self._average_window(-1)
        if best - last > MAX_REWARD_DROP * math.hypot(best_error, error):
            return f"the reward fell from {best:.3f} to {last:.3f} (means of {WINDOW} rollout batches)"
        first_clipped, clipped = self.clipped_ratios[0], sum(self.clipped_ratios[-WINDOW:]) / WINDOW
        if clipped > first_clipped + MAX_CLIPPED_INCREASE:
            return (
                f"{100 * clipped:.0f} % of the answers are cut at max_completion_length, at first "
                f"{100 * first_clipped:.0f} %"
            )
        if self.best_batch < len(self.rewards) - 1:
            for measure, values, factor in (
                ("perplexity", self.perplexities, MAX_PERPLEXITY_RATIO),
                ("KL to later layers", self.kls, MAX_KL_RATIO),
            ):
                if values and values[-1] > factor * min(values):
                    rise = f"rose from {min(values):.3g} to {values[-1]:.3g}"
                    return f"the {measure} of the probes {rise}, and the reward is past its best"
        return None


def snapshot_weights(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Return copies on the CPU, of sharded parameters of this process' shards."""
    return [get_local_shard(parameter.detach()).to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def restore_weights(
    parameters: Iterable[nn.Parameter], weights: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Restore a snapshot and reset the optimizer's momentum of its parameters, which points to the discarded weights.

    Second moments stay: without them the length of Adam's first steps would be the learning rate, whatever the gradient.

    Args:
        parameters (`list[nn.Parameter]`): of the model.
        weights (`list[torch.Tensor]`): result of [`snapshot_weights`].
        optimizer (`torch.optim.Optimizer`): torch's, without accelerate's wrapper.
    """
    for parameter, values in zip(parameters, weights, strict=True):
        get_local_shard(parameter).copy_(values)
        reset_momentum(optimizer.state.get(parameter, {}))


def reset_momentum(state: Mapping[str, Any]) -> None:
    """Set the momentum in the optimizer state of a parameter to zero, if there is any."""
    for name in ("exp_avg", "momentum_buffer"):
        momentum = state.get(name)
        if momentum is not None:
            momentum.zero_()
