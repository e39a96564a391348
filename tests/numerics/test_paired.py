"""Exact McNemar tests, Newcombe's intervals, the cluster bootstrap and Holm's correction, against figures and scipy."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compress.numerics.paired import cluster_bootstrap, holm, mcnemar, newcombe, wilson

COUNTS = st.integers(0, 60)


@pytest.mark.parametrize(
    ("worse", "better", "p"),
    [(12, 2, 0.0129), (1, 7, 0.0703), (6, 16, 0.0525)],  # Armitage and Berry 1994; Fagerland et al. 2013 (two)
)
def test_exact_p_values_are_the_published_ones(worse, better, p):
    assert mcnemar(worse, better) == pytest.approx(p, abs=5e-5) == mcnemar(better, worse)


@given(COUNTS, COUNTS)
def test_exact_p_values_are_those_of_the_sign_test(worse, better):
    expected = stats.binomtest(worse, worse + better, 0.5).pvalue if worse + better else 1.0
    assert mcnemar(worse, better) == pytest.approx(expected, rel=1e-9)


def test_newcombe_is_the_published_interval():
    # complete responses before and after therapy: R package contingencytables 3.1.0, tests/testthat, four digits
    assert newcombe(59, 6, 16, 80) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_is_that_of_scipy(successes, more):
    n = successes + more - 1 or 1
    interval = stats.binomtest(min(successes, n), n).proportion_ci(method="wilson")
    assert wilson(min(successes, n), n) == pytest.approx((interval.low, interval.high), abs=1e-9)


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 60))
def test_newcombe_holds_the_difference_and_mirrors(both, first, second, neither):
    low, high = newcombe(both, first, second, neither)
    difference = (first - second) / (both + first + second + neither)
    assert -1 <= low <= difference <= high <= 1
    assert newcombe(both, second, first, neither) == pytest.approx((-high, -low))
    wide = newcombe(both, first, second, neither, confidence=0.99)
    assert wide[0] <= low and high <= wide[1]


def plain_newcombe(both, first_only, second_only, neither):
    """Method 10 step by step, with scipy's intervals of each rate."""
    n = both + first_only + second_only + neither
    rates, ends = [], []
    for hits in (both + first_only, both + second_only):
        interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
        rates.append(hits / n)
        ends.append((interval.low, interval.high))
    product = both * neither - first_only * second_only
    if product > n / 2:
        product -= n / 2
    elif product >= 0:
        product = 0
    margins = math.prod((both + first_only, second_only + neither, both + second_only, first_only + neither))
    phi = product / math.sqrt(margins) if margins else 0
    (p, q), ((l1, u1), (l2, u2)) = rates, ends
    below = (p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2
    above = (q - l2) ** 2 - 2 * phi * (q - l2) * (u1 - p) + (u1 - p) ** 2
    return p - q - math.sqrt(below), p - q + math.sqrt(above)


@pytest.mark.parametrize(
    "counts",
    [(4, 2, 2, 3), (3, 2, 2, 3), (2, 9, 8, 1), (1, 9, 2, 1), (0, 7, 0, 5), (12, 0, 0, 0), (0, 0, 0, 1), (30, 4, 9, 57)],
)
def test_newcombe_is_that_of_its_steps(counts):
    """Answers that go together, too little to tell, that go apart, one-sided, and a single one."""
    assert newcombe(*counts) == pytest.approx(plain_newcombe(*counts), abs=1e-12)


def test_newcombe_covers_what_it_promises():
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        counts = [0, 0, 0, 0]
        for cell in rng.choices(range(4), weights=[0.6, 0.08, 0.05, 0.27], k=200):
            counts[cell] += 1
        low, high = newcombe(*counts)
        covered += low <= 0.03 <= high
    assert 930 <= covered <= 970  # three standard deviations of 1,000 draws around 95 %


def test_nothing_to_compare_is_refused():
    for counts in ((0, 0, 0, 0), (5, -1, 2, 3)):
        with pytest.raises(ValueError, match="counts of pairs"):
            newcombe(*counts)


def test_the_cluster_bootstrap_is_scipys_but_for_its_draws():
    changes = np.random.default_rng(1).choice([-0.5, 0.0, 0.5, 1.0], 300, p=[0.05, 0.8, 0.1, 0.05])
    for confidence in (0.8, 0.95):
        found = cluster_bootstrap(changes, confidence, rounds=20_000)
        options = {"confidence_level": confidence, "n_resamples": 20_000, "method": "percentile"}
        wanted = stats.bootstrap((changes,), np.mean, rng=np.random.default_rng(2), **options).confidence_interval
        # of 20,000 draws an end has a standard error of 3 % of the mean's
        assert found == pytest.approx((wanted.low, wanted.high), abs=0.15 * changes.std() / math.sqrt(300))
    assert cluster_bootstrap(changes) == cluster_bootstrap(changes)


def test_the_cluster_bootstrap_covers_what_it_promises_where_single_answers_do_not():
    """Four answers of a passage that stand and fall together say as much as one."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        changes = rng.choice([-1.0, 0.0, 1.0], 150, p=[0.08, 0.8, 0.12])
        low, high = cluster_bootstrap(changes, rounds=300)
        covered += low <= 0.04 <= high
        low, high = cluster_bootstrap(np.repeat(changes, 4), rounds=300)
        naive += low <= 0.04 <= high
    assert 367 <= covered <= 393  # three standard deviations of 400 draws around 95 %
    assert naive < 320


def test_the_bootstrap_of_one_cluster_has_no_width_and_of_none_no_meaning():
    assert cluster_bootstrap(np.array([0.25])) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no cluster"):
        cluster_bootstrap(np.array([]))


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_the_closed_bonferroni_tests_reject(p_values):
    found = holm(p_values)
    for i, adjusted in enumerate(found):
        # closure: every set of nulls with i among them must be rejected by Bonferroni
        sets = [
            s for k in range(1, len(p_values) + 1) for s in itertools.combinations(range(len(p_values)), k) if i in s
        ]
        slow = max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets)
        assert adjusted == pytest.approx(slow)
