"""Means, confidence intervals and tests over seeds, and for the difference of two methods, paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class SeedStatistics:
    """Mean, standard deviation and confidence interval of a number over seeds.

    Attributes:
        mean, sd (`float`): mean and sample standard deviation (n - 1); the deviation of one seed is NaN.
        low, high (`float`): Student's 95 % interval of the mean; NaN for one seed.
        n (`int`): number of seeds.
    """

    mean: float
    sd: float
    low: float
    high: float
    n: int


def compute_student_interval(values: np.ndarray) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of two or more values."""
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf(0.5 + CONFIDENCE_LEVEL / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def compute_seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Return the statistics of a number that was measured once for each seed.

    Raises:
        ValueError: if there are no seeds.
    """
    array = np.asarray(values, dtype=float)
    if not array.size:
        raise ValueError("there are no seeds")
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return SeedStatistics(mean, math.nan, math.nan, math.nan, 1)
    return SeedStatistics(mean, float(array.std(ddof=1)), *compute_student_interval(array), n)


def compute_paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> SeedStatistics:
    """Return the statistics of `second - first` over their common seeds.

    Pairing removes the variance that a seed causes in both.

    Args:
        first, second (`dict[int, float]`): values by seed.

    Raises:
        ValueError: if they have no common seed.
    """
    return compute_seed_statistics([second[seed] - first[seed] for seed in first if seed in second])


def compute_paired_p_value(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Return the two-sided p value of Student's paired test for equal means, over two or more common seeds.

    If all differences are equal, the p value is 1 for a difference of 0, and 0 otherwise.

    Args:
        first, second (`dict[int, float]`): values by seed.
    """
    differences = np.array([second[seed] - first[seed] for seed in first if seed in second])
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's step-down method.

    If the hypotheses with an adjusted p value below 0.05 are rejected, the chance of any false rejection is at most 5 %.
    """
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running_max
    return adjusted
