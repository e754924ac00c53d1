"""Updates that are not finite are skipped; a run of them ends."""

from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from bupo.training.distributed.deepspeed import has_skipped_step
from bupo.utils.errors import UserError

logger = get_logger(__name__)

MAX_CONSECUTIVE_SKIPS = 3  # updates


class SkipNonFiniteUpdatesCallback(TrainerCallback):
    """Skips an update whose gradient is not finite, and stops a run after several in a row.

    Args:
        where (`Callable`): tells what is being trained on, for the message.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self.describe_position, self.consecutive_skips = where, 0

    def state(self) -> dict:
        """What a checkpoint must hold."""
        return {"skipped": self.consecutive_skips}

    def load(self, state: dict, rollout_batch: int) -> None:
        """What `state` gave."""
        self.consecutive_skips = state["skipped"]

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # a sum reads a gradient once, where asking each number takes several passes; of a sharded one it is all processes'
        sums = [p.grad.sum(dtype=torch.float32) for p in model.parameters() if p.grad is not None]
        if all(bool(torch.isfinite(summed)) for summed in sums) and not has_skipped_step(optimizer):
            self.consecutive_skips = 0
            return
        self.consecutive_skips += 1
        if self.consecutive_skips == MAX_CONSECUTIVE_SKIPS:
            raise UserError(
                f"the gradient is not finite in {self.consecutive_skips} updates in a row, the last in {self.describe_position()}: lower "
                "learning_rate or max_grad_norm, or look at what the reward function returns"
            )
        logger.warning(f"an update of {self.describe_position()} is skipped: its gradient is not finite")
        model.zero_grad()
