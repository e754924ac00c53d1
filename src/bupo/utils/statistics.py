"""What several numbers say together: a mean's interval; over seeds, and for the difference of two methods, paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class SeedStatistics:
    """A number over seeds.

    Attributes:
        mean, sd (`float`): over the seeds; the deviation is the sample's (n - 1), NaN for one seed.
        low, high (`float`): Student's 95 % interval of the mean; NaN for one seed, which says nothing about others.
        n (`int`): seeds.
    """

    mean: float
    sd: float
    low: float
    high: float
    n: int


def compute_student_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean of two or more values."""
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf(0.5 + CONFIDENCE_LEVEL / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def compute_seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Mean, deviation and interval of one number a seed.

    Raises:
        ValueError: if there is none.
    """
    array = np.asarray(values, dtype=float)
    if not array.size:
        raise ValueError("there are no seeds")
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return SeedStatistics(mean, math.nan, math.nan, math.nan, 1)
    return SeedStatistics(mean, float(array.std(ddof=1)), *compute_student_interval(array), n)


def compute_paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> SeedStatistics:
    """The second less the first, over the seeds that both have. Pairing takes out what a seed does to both.

    Raises:
        ValueError: if they have no seed in common.
    """
    return compute_seed_statistics([second[seed] - first[seed] for seed in first if seed in second])


def compute_paired_p_value(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Two-sided p value of Student's paired test that second and first do not differ, over two or more seeds that both have.

    Seeds that all differ by the same amount give 0, by nothing 1.
    """
    apart = np.array([second[seed] - first[seed] for seed in first if seed in second])
    if np.ptp(apart) == 0:
        return float(apart[0] == 0)
    return float(stats.ttest_1samp(apart, 0).pvalue)


def adjust_holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down method: below 0.05, all of them are, with at most that chance of one by luck."""
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = least
    return adjusted
