"""Decisions over arrays of losses, and their error rates under sequential looks."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from compress.decisions import (
    Rule,
    combine,
    compare,
    decide,
    decide_by_betting,
    decide_by_census,
    interval,
    minimum_detectable,
    skewness,
)
from compress.numerics.sequences import detectable, mixture_variance, width
from evaluators.footprint import Footprint
from evaluators.long_context import LongContext
from evaluators.perplexity import Perplexity

MARGIN = math.log(1.05)
RULE = Rule(margin=MARGIN, alpha_pass=0.05, alpha_fail=0.05, planned=200, minimum=50)


# --- decisions over arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"),
    [
        (0.0, 0.05, "PASS"),  # exactly at the margin is within it
        (0.0, 0.0500001, "INCONCLUSIVE"),
        (0.05, 0.06, "INCONCLUSIVE"),  # exactly at the margin is not beyond it
        (0.0500001, 0.06, "FAIL"),
        (-0.2, -0.1, "PASS"),
        (math.nan, 0.01, "INVALID"),
        (0.0, math.nan, "INVALID"),
        (math.nan, math.nan, "INVALID"),
        (-math.inf, 0.0, "INVALID"),
        (0.1, math.inf, "INVALID"),
    ],
)
def test_compare(lower, upper, verdict):
    assert compare(lower, upper, 0.05) == verdict


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_a_margin_that_is_not_finite_passes_nothing(margin):
    assert compare(0.0, 0.0, margin) == "INVALID"


def test_combine():
    assert combine(["PASS"]) == combine(["PASS", "PASS"]) == "PASS"
    assert combine([]) == "INVALID"
    assert combine(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert combine(["INCONCLUSIVE", "INVALID", "PASS"]) == "INVALID"
    assert combine(["INVALID", "PASS", "FAIL", "INCONCLUSIVE"]) == "FAIL"
    for odd in ("UNGATED", "pass", "", None):  # what is no verdict proves nothing, wherever it came from
        assert combine([odd]) == combine(["PASS", odd]) == "INVALID"


def sample(n, loss, seed=0, spread=0.05):
    rng = np.random.default_rng(seed)
    weights = np.round(np.clip(rng.lognormal(np.log(97), 0.6, n), 2, 511))
    return weights * (loss + spread * rng.standard_normal(n)), weights


@pytest.mark.parametrize("side", [1, -1])
def test_interval_is_the_sequence_over_losses_less_their_margin(side):
    losses, weights = sample(120, 0.02)
    losses = losses + side * weights * np.random.default_rng(1).exponential(0.05, 120)
    rule = replace(RULE, alpha_pass=0.05, alpha_fail=0.0125)
    z = [a - MARGIN * w for a, w in zip(losses, weights)]
    mean = sum(z) / 120
    sd = (sum((x - mean) ** 2 for x in z) / 119) ** 0.5
    skew = stats.skew(z)
    assert side * skew > 0.3  # few losses are much larger, or much smaller, than the others
    down = width(120, sd, 0.0125, mixture_variance(0.0125, 200), -skew)
    up = width(120, sd, 0.05, mixture_variance(0.05, 200), skew)
    mean_weight = sum(weights) / 120
    loss, lower, upper = interval(losses, weights, rule)
    assert loss == pytest.approx(sum(losses) / sum(weights), rel=1e-12)
    assert upper == pytest.approx(MARGIN + (mean + up) / mean_weight, rel=1e-9)
    assert lower == pytest.approx(MARGIN + (mean - down) / mean_weight, rel=1e-9)


def test_fail_needs_the_stricter_level():
    losses, weights = sample(120, 0.02)
    both = np.concatenate([losses, 2 * MARGIN * weights - losses])  # without skew
    loss, lower, upper = interval(both, np.concatenate([weights, weights]), replace(RULE, alpha_fail=0.0125))
    assert loss == pytest.approx(MARGIN) and loss - lower > 1.05 * (upper - loss)


@given(arrays.arrays(np.float64, st.integers(2, 30), elements=st.floats(-5, 5)))
def test_skewness_is_scipys(values):
    assume(np.std(values) > 1e-3)
    assert skewness(values) == pytest.approx(stats.skew(values), abs=1e-9)
    assert skewness(-values) == pytest.approx(-skewness(values), abs=1e-9)
    assert skewness(np.full(5, values[0])) == 0


@pytest.mark.parametrize(("loss", "verdict"), [(0.0, "PASS"), (MARGIN, "INCONCLUSIVE"), (0.12, "FAIL")])
def test_decisions_on_clear_data(loss, verdict):
    found = decide(*sample(120, loss), RULE, identical=False)
    assert found.verdict == verdict
    assert found.lower < found.loss < found.upper


def test_nothing_is_decided_before_the_minimum():
    losses, weights = sample(50, 0.0)
    assert decide(losses[:49], weights[:49], RULE, identical=False).verdict == "INCONCLUSIVE"
    assert decide(losses, weights, RULE, identical=False).verdict == "PASS"
    early = decide(losses[:49], weights[:49], RULE, identical=True)
    assert early.verdict == "INCONCLUSIVE" and math.isnan(early.upper)
    assert decide(losses[:0], weights[:0], RULE, identical=False).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 60])
def test_losses_and_weights_that_are_not_finite_are_invalid(bad, n):
    losses, weights = sample(n, 0.0)
    spoilt = losses.copy()
    spoilt[0] = bad
    assert decide(spoilt, weights, RULE, identical=False).verdict == "INVALID"
    assert decide(spoilt, weights, RULE, identical=True).verdict == "INVALID"
    spoilt = weights.copy()
    spoilt[0] = bad
    assert decide(losses, spoilt, RULE, identical=False).verdict == "INVALID"


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_an_example_without_positions_is_invalid(weight):
    losses, weights = sample(60, 0.0)
    weights[5] = weight
    assert decide(losses, weights, RULE, identical=False).verdict == "INVALID"


def test_equal_losses_are_invalid_unless_the_weights_are_identical():
    _, weights = sample(60, 0.0)
    zeros, constant = np.zeros(60), np.full(60, 0.5)
    assert decide(zeros, weights, RULE, identical=False).verdict == "INVALID"
    assert decide(constant, weights, RULE, identical=False).verdict == "INVALID"
    assert decide(constant, weights, RULE, identical=True).verdict == "INVALID"
    same = decide(zeros, weights, RULE, identical=True)
    assert (same.verdict, same.loss, same.lower, same.upper) == ("PASS", 0, 0, 0)
    # losses proportional to weights have no variance once the margin is taken off
    assert decide(MARGIN * weights, weights, RULE, identical=False).verdict == "INVALID"


def test_identical_weights_do_not_excuse_a_loss():
    losses, weights = sample(120, 0.12)
    assert decide(losses, weights, RULE, identical=True).verdict == "FAIL"


def test_losses_too_large_for_a_bound_are_invalid():
    losses, weights = sample(60, 0.0)
    with np.errstate(over="ignore"):
        assert decide(losses * 1e200, weights, RULE, identical=False).verdict == "INVALID"


@settings(max_examples=200, deadline=None)  # shared processors: time is no property
@given(
    arrays.arrays(np.float64, st.integers(50, 80), elements=st.floats(-5, 5)),
    st.integers(0, 1000),
    st.floats(0.001, 1),
)
def test_properties_of_a_decision(per_token, seed, margin):
    rng = np.random.default_rng(seed)
    weights = rng.integers(2, 500, len(per_token)).astype(float)
    losses, rule = per_token * weights, replace(RULE, margin=margin)
    assume(np.std(losses - margin * weights) > 1e-3)
    found = decide(losses, weights, rule, identical=False)
    assume(found.verdict != "INVALID")
    assert found.lower <= found.loss <= found.upper
    assert (found.verdict == "PASS") == (found.upper <= margin)
    assert (found.verdict == "FAIL") == (found.lower > margin)
    order = rng.permutation(len(losses))  # the order of the examples of one look does not matter
    assert decide(losses[order], weights[order], rule, False).upper == pytest.approx(found.upper, abs=1e-9)
    double = decide(2 * losses, weights, replace(rule, margin=2 * margin), False)  # nor does the unit of loss
    assert double.upper == pytest.approx(2 * found.upper, rel=1e-9, abs=1e-9)
    stricter = decide(losses, weights, replace(rule, alpha_pass=0.01, alpha_fail=0.01), False)
    assert stricter.upper > found.upper and stricter.lower < found.lower


@pytest.mark.parametrize(("loss", "verdict"), [(-0.1, "PASS"), (MARGIN, "PASS"), (MARGIN + 1e-9, "FAIL")])
def test_a_census_knows_its_loss(loss, verdict):
    weights = np.array([1.0, 3.0])
    rule = replace(RULE, minimum=2)
    found = decide_by_census(loss * weights, weights, rule, identical=False)
    assert found.verdict == verdict or loss == MARGIN  # which a sum of products may miss by a bit
    assert found.loss == found.lower == found.upper == pytest.approx(loss)
    part = decide_by_census(loss * weights[:1], weights[:1], rule, identical=False)
    assert part.verdict == "INCONCLUSIVE" and math.isnan(part.upper)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_census_of_numbers_that_are_not_finite_is_invalid(bad):
    ones, spoilt = np.ones(3), np.array([0.0, bad, 0.0])
    rule = replace(RULE, minimum=3)
    assert decide_by_census(spoilt, ones, rule, identical=True).verdict == "INVALID"
    assert decide_by_census(np.zeros(3), spoilt, rule, identical=True).verdict == "INVALID"
    assert decide_by_census(np.zeros(3), np.zeros(3), rule, identical=True).verdict == "INVALID"


# --- error rates under sequential looks --------------------------------------------------------------------

RUNS, DOCUMENTS = 4000, 400


def error_rates(loss, seed, tail):
    """Fractions (PASS, FAIL) and median n over runs of 400 documents with a look after every 16.

    Documents: log-normal lengths as in encyclopedia summaries (median 97 tokens); the loss per token varies
    between documents by a component of its own and one that averages out with length.
    """
    rng = np.random.default_rng(seed)
    weights = np.round(np.clip(rng.lognormal(np.log(97), 0.6, (RUNS, DOCUMENTS)), 2, 511))
    losses = weights * (loss + tail(rng, weights.shape) * (0.05 + 0.35 / np.sqrt(weights)))
    z = losses - MARGIN * weights
    passed, failed, stopped = np.zeros(RUNS, bool), np.zeros(RUNS, bool), np.full(RUNS, DOCUMENTS)
    rho2 = mixture_variance(RULE.alpha_pass, RULE.planned)
    for n in range(64, DOCUMENTS + 1, 16):  # the first multiple of 16 that is at least the minimum of 50
        mean, sd = z[:, :n].mean(1), z[:, :n].std(1, ddof=1)
        skew, plain = stats.skew(z[:, :n], axis=1), width(n, 1.0, RULE.alpha_pass, rho2)
        more = width(n, 1.0, RULE.alpha_pass, rho2, skewness=1.0) - plain
        up, down = (sd * (plain + more * np.maximum(0, side)) for side in (skew, -skew))
        open_ = ~(passed | failed)
        newly_passed, newly_failed = open_ & (mean + up <= 0), open_ & (mean - down > 0)
        passed, failed = passed | newly_passed, failed | newly_failed
        stopped[newly_passed | newly_failed] = n
    one = next(i for i in range(RUNS) if stopped[i] == 64) if (stopped == 64).any() else 0
    found = decide(losses[one, :64], weights[one, :64], RULE, identical=False).verdict
    assert (found == "PASS") == bool(passed[one] and stopped[one] == 64)  # simulated what the gate decides
    return passed.mean(), failed.mean(), np.median(stopped)


def heavy(rng, shape):
    """Student's t with 4 degrees of freedom (infinite kurtosis), unit variance."""
    return rng.standard_t(4, shape) / math.sqrt(2)


def skewed(rng, shape):
    """A log-normal with skewness 1.75, centred, unit variance: many small losses, few large ones."""
    x = rng.lognormal(0, 0.5, shape)
    return (x - math.exp(0.125)) / math.sqrt((math.exp(0.25) - 1) * math.exp(0.25))


def strongly_skewed(rng, shape):
    """A log-normal with skewness 3.7."""
    x = rng.lognormal(0, 0.8, shape)
    return (x - math.exp(0.32)) / math.sqrt((math.exp(0.64) - 1) * math.exp(0.64))


MONTE_CARLO = 3 * math.sqrt(0.05 * 0.95 / RUNS)  # three standard errors of a rate of 5 %


@pytest.mark.parametrize("tail", [heavy, skewed, strongly_skewed])
def test_at_most_5_percent_pass_at_a_true_loss_of_the_margin(tail):
    passed, _, _ = error_rates(MARGIN, seed=1, tail=tail)
    assert 0 < passed <= 0.05 + MONTE_CARLO


def test_at_most_5_percent_fail_at_a_true_loss_of_the_margin():
    _, failed, _ = error_rates(MARGIN, seed=2, tail=heavy)
    assert 0 < failed <= 0.05 + MONTE_CARLO
    _, failed, _ = error_rates(MARGIN, seed=3, tail=lambda rng, shape: -skewed(rng, shape))
    assert 0 < failed <= 0.05 + MONTE_CARLO


def test_a_lossless_model_passes_and_a_bad_one_fails_early():
    passed, failed, median = error_rates(0.0, seed=4, tail=heavy)
    assert passed > 0.99 and failed == 0 and median == 64
    passed, failed, median = error_rates(2 * MARGIN, seed=5, tail=heavy)
    assert failed > 0.99 and passed == 0 and median == 64


def test_minimum_detectable_is_in_the_units_of_the_gate():
    check = Perplexity(max_increase="5%")
    assert minimum_detectable(check, 200, 0.1) == detectable(200, 0.1, 0.05, mixture_variance(0.05, 200))
    assert minimum_detectable(check, 800, 0.1) == detectable(800, 0.1, 0.05, mixture_variance(0.05, 200))
    assert minimum_detectable(check, 200, 0.1, attempts=4) > minimum_detectable(check, 200, 0.1)
    assert minimum_detectable(check, 50, 0.1) < math.inf
    assert minimum_detectable(check, 49, 0.1) == math.inf
    assert minimum_detectable(Footprint(max_mb=80), 1, 0.1) == 0
    assert minimum_detectable(LongContext(max_increase="15%"), 1, 0.1) == 0


# --- betting -----------------------------------------------------------------------------------------------


def test_betting_decides_at_its_minimum_and_not_before():
    rule, lost = replace(RULE, margin=0.5), np.zeros(60)
    lost[::3] = -1.0
    before, at = (decide_by_betting(lost[:n], np.ones(n), rule, identical=False) for n in (49, 50))
    assert before.verdict == "INCONCLUSIVE" and math.isnan(before.upper) and before.loss < 0
    assert at.verdict == "PASS" and at.lower < at.loss < at.upper <= 0.5
    assert decide_by_betting(lost[:0], np.ones(0), rule, identical=False).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("beyond", [1.001, -1.001, 5.0])
def test_losses_on_which_no_bet_is_fair_are_invalid(beyond):
    rule, losses = replace(RULE, margin=0.5), np.full(60, -1.0)
    assert decide_by_betting(losses, np.ones(60), rule, identical=False).verdict == "PASS"
    for n in (60, 40):  # before the minimum, too
        spoilt = losses[:n].copy()
        spoilt[0] = beyond
        found = decide_by_betting(spoilt, np.ones(n), rule, identical=False)
        assert found.verdict == "INVALID" and found.reason == "1 losses lie outside [-1, 1]"
    for rounded in (math.nextafter(1.0, 2), 1 + 1e-9):  # a mean of metrics, and the most that it may miss 1 by
        spoilt[0] = rounded
        assert decide_by_betting(np.append(spoilt, losses[:20]), np.ones(60), rule, False).verdict == "PASS"


def test_identical_weights_excuse_answers_without_flips_alone():
    zeros, ones = np.zeros(60), np.ones(60)
    same = decide_by_betting(zeros, ones, RULE, identical=True)
    assert (same.verdict, same.lower, same.upper) == ("PASS", 0.0, 0.0)  # known, not estimated
    other = decide_by_betting(zeros, ones, RULE, identical=False)
    assert other.lower < 0 < other.upper  # no flip among 60 is evidence, and no more
    flipped = zeros.copy()
    flipped[0] = 1.0
    noisy = decide_by_betting(flipped, ones, RULE, identical=True)
    assert noisy.lower < noisy.loss < noisy.upper and noisy.loss == pytest.approx(1 / 60)
