"""Callback that skips updates with a gradient that is not finite, and stops the run after several in a row."""

from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from bupo.training.distributed.deepspeed import has_skipped_step
from bupo.utils.errors import UserError

logger = get_logger(__name__)

MAX_CONSECUTIVE_SKIPS = 3  # updates


class SkipNonFiniteUpdatesCallback(TrainerCallback):
    """Callback that skips updates with a gradient that is not finite.

    Args:
        describe_position (`Callable`): returns the rollout batch, for messages.
    """

    def __init__(self, describe_position: Callable[[], str]) -> None:
        self.describe_position, self.consecutive_skips = describe_position, 0

    def state(self) -> dict:
        """Return the count for a checkpoint."""
        return {"consecutive_skips": self.consecutive_skips}

    def load(self, state: dict, rollout_batch: int) -> None:
        """Restore the result of `state`."""
        self.consecutive_skips = state["consecutive_skips"]

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # a sum reads a gradient once, isfinite of each element takes several passes; a DTensor's sum is over all processes
        sums = [p.grad.sum(dtype=torch.float32) for p in model.parameters() if p.grad is not None]
        if all(bool(torch.isfinite(total)) for total in sums) and not has_skipped_step(optimizer):
            self.consecutive_skips = 0
            return
        self.consecutive_skips += 1
        position = self.describe_position()
        if self.consecutive_skips == MAX_CONSECUTIVE_SKIPS:
            raise UserError(
                f"the gradient is not finite in {self.consecutive_skips} updates in a row, the last in {position}: lower "
                "learning_rate or max_grad_norm, or check what the reward function returns"
            )
        logger.warning(f"an update of {position} is skipped: its gradient is not finite")
        model.zero_grad()
