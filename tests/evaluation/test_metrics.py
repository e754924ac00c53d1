"""avg@k, pass@k and majority@k against enumeration, exact rationals and hand-computed tables."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bupo.evaluation.metrics import (
    avg_at_k,
    majority_at_k,
    paired_difference,
    pass_at_k,
    pass_at_k_curve,
    wilson_interval,
)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_answer(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 2000), st.data())
def test_pass_at_k_is_exact_for_many_answers(n, data):
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - correct, k), math.comb(n, k))
    assert pass_at_k(n, correct, k) == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


def test_pass_at_k_by_hand():
    assert pass_at_k(300, 0, 256) == 0 and pass_at_k(300, 300, 1) == 1 and pass_at_k(300, 45, 256) == 1
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k_curve(np.array([[1, 0, 0, 0, 0, 0], [0] * 6])) == pytest.approx(
        {1: 1 / 12, 2: 1 / 6, 4: 1 / 3, 6: 0.5}
    )
    assert list(pass_at_k_curve(np.ones((1, 300)))) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(n, correct, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, correct, k)


def test_avg_at_k_by_hand():
    """Shares 1, 1/2 and 0: mean 1/2, deviation 1/2, t of 2 degrees of freedom 4.302653."""
    mean, (low, high) = avg_at_k(np.array([[1, 1], [1, 0], [0, 0]]))
    assert mean == 0.5 and (low, high) == (0.0, 1.0)  # 0.5 -+ 1.242, cut
    many = np.repeat([[1, 1], [1, 0], [0, 0]], 100, axis=0)
    mean, (low, high) = avg_at_k(many)
    half = 1.967930 * math.sqrt(50 / 299) / math.sqrt(300)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-6)


def test_avg_at_k_does_not_depend_on_how_many_answers_a_wrong_grouping_would_count():
    assert avg_at_k(np.array([[1, 0, 0, 0], [1, 1, 1, 1]]))[0] == pytest.approx(0.625)


def test_an_interval_where_nothing_varies():
    """Ten problems, all wrong: Wilson's upper end is z^2 / (n + z^2) = 0.2775."""
    assert avg_at_k(np.zeros((10, 4)))[1] == pytest.approx((0, 0.27753), abs=1e-4)
    assert avg_at_k(np.ones((10, 1)))[1] == pytest.approx((0.72247, 1), abs=1e-4)
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    with pytest.raises(ValueError, match="no answers"):
        avg_at_k(np.zeros((0, 4)))


def test_intervals_cover():
    """Of 400 simulated benchmarks of 60 problems of different difficulty, about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        shares = rng.beta(0.7, 1.0, size=60)
        low, high = avg_at_k(rng.random((60, 8)) < shares[:, None])[1]
        held += low <= 0.7 / 1.7 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_majority_by_hand():
    classes: list[list[int | None]] = [[4, 4, 5], [4, 5, 6], [None, None, 7], [None, None, None], [1, 1, 2], [0, 1, 2]]
    correct = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]])
    # right; a third (three share the lead, one is right); right; no vote; wrong; correct answers vote together
    assert majority_at_k(classes, correct) == pytest.approx((1 + 1 / 3 + 1 + 0 + 0 + 1) / 6)


@given(st.integers(2, 30), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_a_paired_difference_is_that_of_the_averages(problems, n, m, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random((problems, n)) < 0.5, rng.random((problems, m)) < 0.5
    mean, (low, high) = paired_difference(first, second)
    assert mean == pytest.approx(avg_at_k(second)[0] - avg_at_k(first)[0], abs=1e-12) and low <= mean <= high
    back, (b_low, b_high) = paired_difference(second, first)
    assert (back, b_low, b_high) == pytest.approx((-mean, -high, -low), abs=1e-12)


def test_pairing_is_narrower_than_two_runs_apart():
    """Problems differ much more than runs do."""
    rng = np.random.default_rng(1)
    shares = rng.beta(0.5, 0.5, size=100)
    first, second = (rng.random((100, 16)) < s[:, None] for s in (shares, np.minimum(1, shares + 0.05)))
    low, high = paired_difference(first, second)[1]
    apart = sum(np.ptp(avg_at_k(x)[1]) for x in (first, second))
    assert high - low < 0.5 * apart
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(first, second[:50])
