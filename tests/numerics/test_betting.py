import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.betting import detectable, log_capital, lower_bound, p_value, refuted, upper_bound

MARGIN = 0.03
LOSSES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=60).map(np.array)


def flips(rng, n, loss, rate=0.1):
    """Independent losses in {−1, 0, 1} with this mean, of which `rate` are not 0."""
    return rng.choice([1.0, -1.0, 0.0], size=n, p=[(rate + loss) / 2, (rate - loss) / 2, 1 - rate])


def plain_capital(values, mean):
    """One product per stake, value by value, and their average after each."""
    stakes = [share * 0.5 / (1 - mean) for share in (1, 0.5, 0.25, 0.125)]
    products, found = [1.0] * 4, []
    for value in values:
        products = [p * (1 + stake * (mean - value)) for p, stake in zip(products, stakes)]
        found.append(sum(products) / 4)
    return found


@given(LOSSES, st.floats(-0.9, 0.9))
def test_capital_is_the_average_of_the_products(values, mean):
    assert np.exp(log_capital(values, mean)) == pytest.approx(plain_capital(values, mean), rel=1e-9)


@given(LOSSES, st.floats(-0.9, 0.9), st.floats(0, 0.09))
def test_capital_rises_with_the_mean_that_is_bet_against(values, mean, more):
    assert (log_capital(values, mean + more) >= log_capital(values, mean) - 1e-9).all()


@pytest.mark.parametrize("mean", [-0.5, 0.0, MARGIN, 0.4])
def test_a_bet_is_fair_at_the_mean_itself(mean):
    # The worst case of a given mean sits at the ends of the range: E[1 + stake (mean − D)] is exactly 1.
    high = (1 + mean) / 2
    expected = high * math.exp(log_capital(np.ones(1), mean)[0])
    expected += (1 - high) * math.exp(log_capital(-np.ones(1), mean)[0])
    assert expected == pytest.approx(1.0, rel=1e-12)


@given(LOSSES, st.sampled_from([0.05, 0.01]), st.floats(-0.5, 0.5))
def test_the_bound_is_within_the_margin_just_if_the_margin_is_refuted(values, alpha, margin):
    upper = upper_bound(values, alpha, margin)
    assert (upper <= margin) == refuted(values, margin, alpha)
    assert -1 <= values.mean() <= upper + 1e-6 and upper <= 1
    lower = lower_bound(values, alpha, margin)
    assert lower == -upper_bound(-values, alpha, -margin)
    assert lower <= values.mean() + 1e-6


def test_bounds_close_in_on_the_mean():
    rng = np.random.default_rng(0)
    values = flips(rng, 5000, 0.02)
    lower, upper = lower_bound(values, 0.05, MARGIN), upper_bound(values, 0.05, MARGIN)
    assert lower < values.mean() < upper
    assert upper - lower < 0.05
    assert upper_bound(values[:100], 0.05, MARGIN) > upper_bound(values[:2000], 0.05, MARGIN) > upper
    assert upper_bound(values, 0.01, MARGIN) > upper


def test_without_any_flip_three_points_need_about_three_hundred_clusters():
    # ¼ (1 + 0.5 · 0.03 / 0.97)^n alone reaches 20 at n = 286; the smaller stakes save a few.
    first = next(n for n in range(1, 1000) if refuted(np.zeros(n), MARGIN, 0.05))
    assert 200 < first < 286


@pytest.mark.parametrize(
    ("values", "margin", "alpha"), [([1.5], 0.0, 0.05), ([math.nan], 0, 0.05), ([0], 1.0, 0.05), ([0], 0, 0)]
)
def test_what_has_no_bound_is_refused(values, margin, alpha):
    with pytest.raises(ValueError):
        upper_bound(np.array(values, dtype=float), alpha, margin)


@pytest.mark.parametrize("rate", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("loss", [MARGIN])
def test_false_passes_at_the_margin_stay_within_alpha_whenever_one_looks(rate, loss):
    rng = np.random.default_rng(round(rate * 100))
    runs = 2000
    passes = sum(refuted(flips(rng, 1500, loss, rate), MARGIN, 0.05) for _ in range(runs))
    fails = sum(refuted(-flips(rng, 1500, loss, rate), -MARGIN, 0.05) for _ in range(runs))
    limit = 0.05 * runs + 3 * math.sqrt(runs * 0.05 * 0.95)  # three standard errors
    assert passes <= limit and fails <= limit
    assert passes > 0  # the level is spent, not merely kept: a test that never rejects would pass the above


def test_power_at_the_advertised_sizes():
    rng = np.random.default_rng(1)
    runs = 400
    passes = sum(refuted(flips(rng, 2000, 0.0), MARGIN, 0.05) for _ in range(runs))
    assert passes / runs > 0.9  # 96 % measured; three points at 10 % flips need about 1,300 for 80 %
    fails = sum(refuted(-flips(rng, 2000, 0.06), -MARGIN, 0.05) for _ in range(runs))
    assert fails / runs > 0.9


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.2])
def test_the_planned_power_is_reached_and_not_by_far(rate):
    sd = math.sqrt(rate)
    n = next(n for n in range(50, 20_000, 50) if detectable(n, sd, 0.05, MARGIN) <= MARGIN)
    rng = np.random.default_rng(2)
    passed = [refuted(flips(rng, n, 0.0, rate), MARGIN, 0.05) for _ in range(400)]
    assert np.mean(passed) > 0.8
    fewer = [refuted(flips(rng, n // 2, 0.0, rate), MARGIN, 0.05) for _ in range(400)]
    assert np.mean(fewer) < 0.8


def test_detectable_shrinks_with_samples_and_is_infinite_where_nothing_can_be_refuted():
    found = [detectable(n, 0.3, 0.05, MARGIN) for n in (5, 50, 500, 5000, 50_000)]
    assert found == sorted(found, reverse=True)
    assert math.isinf(detectable(2, 0.3, 0.05, MARGIN)) and found[-1] < 0.01
    assert detectable(500, 0.3, 0.01, MARGIN) > found[2]
    with pytest.raises(ValueError, match="n=0"):
        detectable(0, 0.3, 0.05, MARGIN)


@pytest.mark.parametrize("kind", ["graded", "rare falls", "skewed"])
def test_real_valued_losses_at_the_margin_pass_at_most_one_time_in_twenty(kind):
    """Differences of graded answers are no flips; the margin is their true mean, and every look of 600 counts."""
    rng = np.random.default_rng(1)
    draws = {
        # In four of five pairs nothing changes, in the others any score turns into any other.
        "graded": (lambda n: np.where(rng.random(n) < 0.8, 0, rng.beta(0.5, 0.5, n) - rng.beta(0.5, 0.5, n)), 0.0),
        "rare falls": (lambda n: np.where(rng.random(n) < MARGIN, 1.0, 0.0), MARGIN),
        "skewed": (lambda n: rng.exponential(0.1, n).clip(0, 1), 0.1 * (1 - math.exp(-10))),
    }
    draw, mean = draws[kind]
    runs = 1000
    passed = sum(refuted(draw(600), mean, 0.05) for _ in range(runs))
    assert passed / runs <= 0.05 + 2.33 * math.sqrt(0.05 * 0.95 / runs)  # one-sided 99 % of the binomial


@given(LOSSES, st.floats(-0.9, 0.9), st.floats(0.001, 0.999))
def test_a_p_value_is_small_just_where_the_mean_is_refuted_at_that_level(values, mean, alpha):
    p = p_value(values, mean)
    assert 0 < p <= 1
    if abs(p - alpha) > 1e-9:
        assert (p < alpha) == refuted(-values, -mean, alpha)


def test_p_values_are_those_of_the_plain_bets():
    values = np.array([1.0, 0.0, 1.0, 1.0, -1.0, 0.0])
    assert p_value(values, 0.0) == pytest.approx(1 / max(plain_capital(-values, 0.0)))
    assert p_value(-np.ones(9), 0.0) == 1.0 == p_value(np.array([]), 0.0)
    with pytest.raises(ValueError, match="outside"):
        p_value(np.array([1.5]), 0.0)


def test_no_regression_is_called_one_at_most_one_time_in_twenty_whenever_one_looks():
    rng = np.random.default_rng(0)
    found = [p_value(flips(rng, 400, 0.0), 0.0) for _ in range(1000)]
    assert 0 < sum(p <= 0.05 for p in found) <= 50
    assert sum(p_value(flips(rng, 400, 0.06), 0.0) <= 0.05 for _ in range(200)) > 160


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
@pytest.mark.parametrize("margin", [-1.0, 1.0])
def test_margins_and_levels_at_the_edge_are_refused(alpha, margin):
    values = np.zeros(3)
    for m, a in ((margin, 0.05), (0.03, alpha)):
        with pytest.raises(ValueError, match="expected -1 < margin < 1 and 0 < alpha < 1"):
            upper_bound(values, a, m)
    for power in (0.0, 1.0):
        with pytest.raises(ValueError, match="0 < power < 1"):
            detectable(100, 0.3, 0.05, 0.03, power)


def test_the_advertised_distance_is_that_of_the_formula():
    """Slow plain version: the smallest distance on a grid at which some stake's growth suffices."""
    for n, sd, alpha, margin in ((1000, 0.3, 0.05, 0.03), (300, 0.2, 0.0125, 0.1), (60, 0.5, 0.05, 0.4)):
        need, found = math.log(4 / alpha), math.inf
        for d in np.arange(0, 1 + margin, 1e-4):
            for stake in (share * 0.5 / (1 - margin) for share in (1, 0.5, 0.25, 0.125)):
                growth = stake * d - stake**2 * (sd**2 + d**2) / 2
                if n * growth - 0.8416212 * stake * sd * math.sqrt(n) >= need:
                    found = min(found, d)
        assert detectable(n, sd, alpha, margin) == pytest.approx(found, abs=1.1e-4)
    assert detectable(3, 0.3, 0.05, 0.03) == detectable(1, 0.3, 0.05, 0.03) == math.inf
    assert 0.5 < detectable(10, 0.1, 0.05, 0.5) < 1.5  # gains count: losses go down to -1
