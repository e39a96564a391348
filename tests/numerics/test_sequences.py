import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.sequences import detectable, mixture_variance, width

ALPHAS = st.floats(1e-6, 0.5)
COUNTS = st.integers(1, 100_000)


def plain_width(n, sd, alpha, rho2):
    """The published formula, term by term."""
    under_log = 1 + (n * rho2 + 1) ** 0.5 / (2 * alpha)
    return sd * ((2 * (n * rho2 + 1)) / (n**2 * rho2) * math.log(under_log)) ** 0.5


@given(COUNTS, st.floats(0, 1e6), ALPHAS, st.floats(1e-6, 10))
def test_width_is_the_published_formula(n, sd, alpha, rho2):
    assert width(n, sd, alpha, rho2) == pytest.approx(plain_width(n, sd, alpha, rho2), rel=1e-12)


@given(COUNTS, st.floats(0, 1e6), ALPHAS, st.floats(1e-6, 10), st.floats(-9, 9))
def test_width_grows_with_the_skewness_that_makes_it_too_small(n, sd, alpha, rho2, skewness):
    z = plain_width(n, 1.0, alpha, rho2) * n**0.5
    grown = z + (skewness * (2 * z**2 + 1) / (6 * n**0.5) if skewness > 0 else 0)
    assert width(n, sd, alpha, rho2, skewness) == pytest.approx(sd * grown / n**0.5, rel=1e-12)


def test_width_of_a_worked_example():
    # by hand: rho2 = (5.99146 + ln 5.99146 + 1) / 200 = 0.0439086; n rho2 + 1 = 3.19543 at n = 50
    assert mixture_variance(0.05, 200) == pytest.approx(0.0439086, rel=1e-5)
    # sqrt(6.39086 / 109.7715 * ln(1 + 1.787577 / 0.1)) = sqrt(0.0582197 * 2.937879)
    assert width(50, 1.0, 0.05, 0.0439086) == pytest.approx(0.413573, rel=1e-5)


@given(st.integers(2, 10_000), ALPHAS, st.integers(1, 10_000))
def test_width_shrinks_with_examples_and_grows_with_confidence(n, alpha, planned):
    rho2 = mixture_variance(alpha, planned)
    assert width(n, 1, alpha, rho2) < width(n - 1, 1, alpha, rho2)
    assert width(n, 1, alpha / 2, rho2) > width(n, 1, alpha, rho2)
    assert width(n, 3, alpha, rho2) == pytest.approx(3 * width(n, 1, alpha, rho2))
    assert width(n, 0, alpha, rho2) == 0


@given(COUNTS, st.floats(1e-6, 0.5), st.integers(1, 10_000))
def test_width_exceeds_the_bound_of_a_single_look(n, alpha, planned):
    fixed = NormalDist().inv_cdf(1 - alpha) / math.sqrt(n)
    assert width(n, 1.0, alpha, mixture_variance(alpha, planned)) > fixed


@pytest.mark.parametrize("alpha", [0.05, 0.01])
@pytest.mark.parametrize("planned", [50, 200, 2000])
def test_the_bound_is_nearly_tightest_at_the_planned_size(alpha, planned):
    best = min(width(planned, 1, alpha, rho2) for rho2 in np.geomspace(1e-6, 10, 4000))
    assert width(planned, 1, alpha, mixture_variance(alpha, planned)) < 1.01 * best


def test_planning_for_200_costs_18_percent_at_10000():
    ratio = width(10_000, 1, 0.05, mixture_variance(0.05, 200)) / width(10_000, 1, 0.05, mixture_variance(0.05, 10_000))
    assert ratio == pytest.approx(1.18, abs=0.01)


@pytest.mark.parametrize("n", [64, 200, 1000])
def test_detectable_is_the_distance_cleared_with_80_percent_power(n):
    # exact by construction for normal data: the chance that mean + width <= 0 at a distance of `detectable`
    rng = np.random.default_rng(n)
    rho2 = mixture_variance(0.05, n)
    distance = detectable(n, 2.0, 0.05, rho2)
    means = rng.normal(-distance, 2.0 / math.sqrt(n), 200_000)
    assert np.mean(means + width(n, 2.0, 0.05, rho2) <= 0) == pytest.approx(0.8, abs=0.004)  # 4 s.e.


def test_detectable_at_other_powers():
    rho2 = mixture_variance(0.05, 100)
    assert detectable(100, 1, 0.05, rho2, power=0.5) == pytest.approx(width(100, 1, 0.05, rho2))
    assert detectable(100, 1, 0.05, rho2, power=0.9) > detectable(100, 1, 0.05, rho2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mixture_variance(0.0, 10),
        lambda: mixture_variance(0.6, 10),
        lambda: mixture_variance(math.nan, 10),
        lambda: mixture_variance(0.05, 0),
        lambda: width(0, 1, 0.05, 1),
        lambda: width(1, 1, 0.05, 0),
        lambda: width(1, 1, 0.05, math.nan),
        lambda: width(1, 1, 0.0, 1),
        lambda: detectable(10, 1, 0.05, 1, power=1.0),
        lambda: detectable(10, 1, 0.05, 1, power=0.0),
    ],
)
def test_senseless_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_the_edges_of_the_domain_are_accepted():
    assert mixture_variance(0.5, 1) > 0
    assert width(1, 1.0, 0.5, 1e-9) > 0


def test_nan_spread_gives_a_nan_bound():
    assert math.isnan(width(10, math.nan, 0.05, 1.0))
    assert math.isnan(width(10, math.nan, 0.05, 1.0, skewness=1.0))
