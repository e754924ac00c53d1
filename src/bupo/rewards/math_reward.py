"""The reward function for mathematical problems, with the signature that TRL expects."""

import atexit
import functools

from bupo.rewards.grader import MathGrader, Verdict
from bupo.utils.errors import UserError


@functools.cache
def _get_grader() -> MathGrader:
    grader = MathGrader()
    atexit.register(grader.close)
    return grader


def get_completion_text(completion: str | list[dict]) -> str:
    """Return the text of a plain completion, or of the last message of a conversational one (empty for a tool call)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def math_reward(completions, answer=None, scored_by=None, log_metric=None, **kwargs) -> list[float | None]:
    """Return 1.0 for each completion whose final answer equals the gold answer and is worked out (strict verdict), else 0.0.

    The reward is None for an empty gold answer; TRL leaves it out.

    Args:
        completions (`list`): texts, or lists of messages.
        answer (`list[str]`): the dataset's `answer` column.
        scored_by (`list[str | None]`, *optional*): the dataset's `scored_by` column, with references of reasoning_gym problems
            whose task has a scorer, which then decides.
        log_metric (`Callable`, *optional*): TRL's logger, for the shares of unevaluated, unparsable and timed-out answers.

    Raises:
        UserError: if the dataset has no column `answer`.
    """
    if answer is None:
        raise UserError("math_reward needs the gold answers: the dataset has no column 'answer'")
    golds = ["" if gold is None else str(gold) for gold in answer]
    verdicts = _get_grader().grade([get_completion_text(completion) for completion in completions], golds, scored_by)
    if log_metric is not None:
        for verdict in (Verdict.UNEVALUATED, Verdict.UNPARSABLE, Verdict.TIMEOUT, Verdict.NO_GOLD):
            log_metric(f"grading/{verdict}", verdicts.count(verdict) / max(1, len(verdicts)))
    return [None if verdict == Verdict.NO_GOLD else float(verdict == Verdict.CORRECT) for verdict in verdicts]
