"""Metrics of graded answers: avg@k, pass@k and majority@k with intervals over problems, and paired differences of two runs.

Arrays `correct_PN` hold whether answer n to problem p is correct; every problem has the same number of answers.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bupo.utils.statistics import CONFIDENCE_LEVEL, compute_student_interval

_GOLD_CLASS = -1  # class of the answers equal to the gold answer


def avg_at_k(correct_PN: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the mean over problems of the share of correct answers, with a 95 % interval over problems.

    The interval is Student's over the problems' shares. If the shares do not vary or there is one answer per problem, it is
    Wilson's score interval with one trial per problem.

    Raises:
        ValueError: if there are no answers.
    """
    correct_PN = np.asarray(correct_PN, dtype=float)
    if not correct_PN.size:
        raise ValueError("there are no answers")
    shares = correct_PN.mean(1)
    mean, n = float(shares.mean()), len(shares)
    if correct_PN.shape[1] == 1 or n == 1 or np.ptp(shares) == 0:
        return mean, wilson_interval(mean, n)
    low, high = compute_student_interval(shares)
    return mean, (max(0.0, low), min(1.0, high))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share of n independent trials."""
    z = float(stats.norm.ppf(0.5 + CONFIDENCE_LEVEL / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n answers with `correct` correct ones (arXiv 2107.03374, eq. 1).

    `1 - C(n - c, k) / C(n, k)` is computed as a product over n - c + 1 .. n, which neither overflows nor cancels.

    Raises:
        ValueError: if k exceeds n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} needs {k} or more answers, and 0 to n correct ones: n={n}, correct={correct}")
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def pass_at_k_curve(correct_PN: np.ndarray) -> dict[int, float]:
    """Return pass@K for K = 1, 2, 4 … and n, averaged over problems."""
    correct_PN = np.asarray(correct_PN, dtype=bool)
    n = correct_PN.shape[1]
    ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    return {k: float(np.mean([pass_at_k(n, int(c), k) for c in correct_PN.sum(1)])) for k in ks}


def majority_at_k(classes: Sequence[Sequence[int | None]], correct_PN: np.ndarray) -> float:
    """Return the share of problems whose most frequent answer is correct; ties count as fractions.

    Args:
        classes (`list[list[int | None]]`): class of equal answers, by problem and answer; None for no answer, which has no
            vote. A problem without a vote is wrong.
        correct_PN (`np.ndarray`): by problem and answer. Correct answers form one class, independent of `classes`.
    """
    shares = []
    for numbers, correct in zip(classes, np.asarray(correct_PN, dtype=bool), strict=True):
        votes = Counter(
            _GOLD_CLASS if is_correct else number for number, is_correct in zip(numbers, correct, strict=True)
        )
        votes.pop(None, None)
        most = max(votes.values(), default=0)
        leaders = [number for number, count in votes.items() if count == most]
        shares.append((_GOLD_CLASS in leaders) / len(leaders) if leaders else 0.0)
    return float(np.mean(shares))


def paired_difference(first_PN: np.ndarray, second_PN: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return avg@k of the second run minus the first, on the same problems, with Student's 95 % interval over problems.

    Raises:
        ValueError: if the numbers of problems differ.
    """
    first, second = (np.asarray(x, dtype=float).mean(1) for x in (first_PN, second_PN))
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same problems: {len(first)} and {len(second)}")
    gains = second - first
    mean, n = float(gains.mean()), len(gains)
    if n == 1:
        return mean, (-1.0, 1.0)
    return mean, compute_student_interval(gains)
