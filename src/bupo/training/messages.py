"""What a run says when something fails or nothing can be learned."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate.logging import get_logger

from bupo.errors import UserError
from bupo.training.config import BuPOConfig
from bupo.training.estimators import BY_GROUP

logger = get_logger(__name__)


@contextmanager
def sampling(where: str) -> Iterator[None]:
    """Inside, probabilities that are not finite are the user's to mend."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"the model's probabilities are not finite in {where}: its weights have diverged; lower "
            "learning_rate, or go on from an earlier checkpoint"
        ) from error


@contextmanager
def grading(names: Sequence[str], rollout_batch: int) -> Iterator[None]:
    """Inside, reward functions run: whatever they raise is named."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"reward function {', '.join(names)} failed in rollout batch {rollout_batch}: {type(error).__name__}: {error}"
        ) from error


def warn_if_nothing_to_learn(metrics: Mapping[str, Sequence[float]], rollout_batch: int, args: BuPOConfig) -> None:
    """Say aloud what would otherwise be a flat curve.

    Args:
        metrics (`dict`): of the rollout batch, last values last.
        rollout_batch (`int`): which.
        args ([`~bupo.BuPOConfig`]): its estimator compares answers within a prompt or all with all.
    """
    last = {name: values[-1] for name, values in metrics.items() if values}
    reasons = []
    by_group = args.advantage_estimator in BY_GROUP
    if by_group and last["frac_reward_zero_std"] == 1.0:
        reasons.append(f"all answers to each prompt have one reward (mean {last['reward']:.3g})")
    elif not by_group and last["reward_std"] == 0.0:
        reasons.append(f"all answers have one reward ({last['reward']:.3g})")
    if last.get("completions/clipped_ratio") == 1.0:
        reasons.append(f"every answer was cut at max_completion_length={args.max_completion_length}")
    if reasons:
        logger.warning(f"rollout batch {rollout_batch} teaches nothing: {' and '.join(reasons)}")
