"""Shares of a global sparsity: the mean is exact, the order follows the worth, nothing leaves [0, 1)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.allocation import highest_within, outlier_share, spread_sparsity

WORTHS = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


@settings(deadline=None)
@given(WORTHS, st.integers(1, 99), st.integers(1, 49))
def test_the_mean_is_the_sparsity_and_worth_protects(worth, percent, spread):
    shares = spread_sparsity(worth, percent / 100, spread / 100)
    assert math.fsum(shares) / len(shares) == pytest.approx(percent / 100, abs=1e-8)  # rounded to 9 digits
    assert all(0 <= share < 1 for share in shares)
    assert max(shares) - min(shares) <= 2 * spread / 100 + 2e-9
    for a, share in zip(worth, shares):
        assert all(share >= other for b, other in zip(worth, shares) if b > a)


def test_equal_parts_get_equal_shares():
    assert spread_sparsity([3.0] * 4, 0.29, 0.08) == [0.29] * 4


def test_the_authors_own_arithmetic():
    """λ = 0.08, S = 0.5: D is scaled to [0, 2λ], and 1 − S_l = D − mean(D) + 1 − S (their code, lib/prune.py)."""
    D = [4.0, 1.0, 2.0, 1.5]
    scaled = [(d - min(D)) / (max(D) - min(D)) * 2 * 0.08 for d in D]
    expected = [1 - (d - sum(scaled) / 4 + 1 - 0.5) for d in scaled]
    assert spread_sparsity(D, 0.5, 0.08) == pytest.approx(expected, abs=1e-9)


def test_outliers_are_counted_over_all_scores_together():
    scores = [torch.ones(3, 4), torch.tensor([[100.0, 1.0]])]
    assert outlier_share(scores, 5.0) == 1 / 14  # the mean is 113 / 14, so that 100 alone exceeds five times it
    assert outlier_share(scores, 13.0) == 0.0


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(0, 40))
def test_the_highest_level_is_where_the_next_step_would_exceed_the_budget(steps, budget):
    """The total counts the steps passed: one more than the budget is the first step that must not be."""
    level = highest_within(lambda at: sum(step <= at for step in steps), budget, -1.0, 1.0)
    assert sum(step <= level for step in steps) <= budget
    if budget < len(steps):
        assert level == pytest.approx(sorted(steps)[budget], abs=1e-12)
    else:
        assert level == 1.0
