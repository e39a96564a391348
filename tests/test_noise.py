"""The noise floor: identical weights, asked otherwise."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from compress.gate import CheckResult, Gate
from compress.interfaces import Score
from compress.model import Model
from compress.noise import (
    DOCUMENTS,
    Alone,
    Noise,
    _Pair,
    above_decoding,
    applies,
    measure,
    otherwise,
    refusal,
    settings,
)
from compress.scoring import Memo
from evaluators.accuracy import Accuracy
from evaluators.divergence import Divergence
from evaluators.footprint import Footprint
from evaluators.generation import Generation
from evaluators.latency import Latency
from evaluators.perplexity import Perplexity
from tests.gates import DIVERGENCE, PERPLEXITY, Store
from tests.tiny import documents, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exact():
    return tiny_model()


@pytest.fixture(scope="module")
def coarse(exact):
    """The same weights with bfloat16 products."""
    return Model(exact.module, exact.tokenizer, "bfloat16")


def noise_of(check, model, data=None) -> Noise:
    ((found,),) = measure([check], model, [data or documents(60)])
    return found


def test_float32_leaves_less_than_float32_resolves(exact):
    for check in (PERPLEXITY, DIVERGENCE):
        found = noise_of(check, exact)
        assert found.examples == DOCUMENTS and abs(found.loss) < 1e-6
        assert not refusal(check, found)


def test_bfloat16_products_show_and_a_margin_below_them_is_refused(coarse):
    found = noise_of(DIVERGENCE, coarse)
    assert found.lower > 0 and found.floor == found.loss > 1e-5
    below, above = (Divergence(max_mean=factor * found.loss) for factor in (0.9, 1.1))
    assert "is not above the noise" in refusal(below, found) and not refusal(above, found)
    assert "noise" in refusal(Divergence(max_mean=found.loss), found)  # at the floor nothing is proven either


def test_the_floor_is_what_the_very_gate_would_let_pass(exact, coarse):
    """The refusal matters: without it such a gate passes or fails on rounding alone."""
    data, floor = documents(160), noise_of(DIVERGENCE, coarse).floor
    found = Gate((Divergence(max_mean=floor / 2),)).evaluate(coarse, exact, [data])
    assert found.verdict == "FAIL"


@dataclass(frozen=True)
class Padded:
    """A runtime whose padding reaches the scores: what stands in one batch with others is predicted worse."""

    inner: Any
    harm: float

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def logits(self, windows):
        for rows in self.inner.logits(windows):
            yield rows * (1 + self.harm * (len(windows) > 1))


def test_batches_that_change_scores_are_found(exact):
    found = noise_of(PERPLEXITY, Padded(exact, 0.2))
    assert found.floor > 1e-3 and not found.lower <= 0 <= found.upper
    assert noise_of(PERPLEXITY, Padded(exact, 0.0)).floor < 1e-6


@pytest.mark.parametrize(
    ("loss", "lower", "upper", "floor"),
    [
        (0.03, -0.01, 0.07, 0.0),  # chance explains it
        (0.03, 0.0, 0.06, 0.0),
        (0.03, 0.01, 0.05, 0.03),
        (-0.03, -0.05, -0.01, 0.03),
        (-0.03, -0.06, 0.0, 0.0),
        (0.03, -math.inf, math.inf, 0.0),
    ],
)
def test_the_floor_counts_what_chance_does_not_explain(loss, lower, upper, floor):
    found = Noise(metric="m", unit="u", source="s", loss=loss, lower=lower, upper=upper, examples=32)
    assert found.floor == floor


@pytest.mark.parametrize("check", [PERPLEXITY, Accuracy(tasks=("minimal_pairs",), max_drop=3.0)], ids=["mean", "bets"])
def test_the_interval_is_that_of_a_ratio_over_clusters(check):
    losses, weights = [0.2, 0.1, -0.3, 0.6], [2.0, 1.0, 4.0, 3.0]
    scores = [Score(str(i), 0.0, weight) for i, weight in enumerate(weights)]
    found = _Pair(check, documents(1), losses, scores, ["a", "a", "b", "c"]).noise()
    pairs = [(0.2 + 0.1, 3.0), (-0.3, 4.0), (0.6, 3.0)]
    if check is not PERPLEXITY:  # clusters count alike
        pairs = [(loss / weight, 1.0) for loss, weight in pairs]
    loss, total = (sum(column) for column in zip(*pairs))
    loss /= total
    half = 1.959964 * statistics.stdev(x - loss * w for x, w in pairs) / (total / 3 * math.sqrt(3))
    assert (found.loss, found.lower, found.upper) == pytest.approx((loss, loss - half, loss + half))
    assert found.examples == 4


def test_a_single_cluster_explains_nothing():
    found = _Pair(PERPLEXITY, documents(1), [0.2], [Score("0", 0.0, 3.0)], ["a"]).noise()
    assert (found.lower, found.upper, found.floor) == (-math.inf, math.inf, 0.0)
    assert _Pair(PERPLEXITY, documents(1)).noise() is None


def test_each_window_is_asked_alone_on_another_number_of_threads(exact):
    seen = []
    handle = exact.module.base_model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        for usual in (1, 2, 3):
            torch.set_num_threads(usual)
            assert [len(rows) for rows in Alone(exact).logits([(1, 2), (3, 4, 5)])] == [2, 3]
            assert torch.get_num_threads() == usual
    finally:
        torch.set_num_threads(1)
        handle.remove()
    assert seen == [2, 2, 1, 1, 1, 1]


def test_scores_that_are_not_finite_refuse_every_margin(exact):
    found = noise_of(PERPLEXITY, Padded(exact, math.nan))
    assert refusal(PERPLEXITY, found)
    assert refusal(PERPLEXITY, Noise.model_validate(found.model_dump(mode="json")))  # as the store returns it


def test_answers_are_counted_by_cluster(exact):
    check = Accuracy(tasks=("minimal_pairs",), max_drop=3.0)
    found = noise_of(check, exact)
    assert found.source == "minimal_pairs" and found.loss == 0 and not refusal(check, found)


def test_text_checks_share_a_pass_and_scores_come_from_the_cache(exact):
    def passes(checks, cache=None):
        seen = []
        handle = exact.module.base_model.register_forward_hook(lambda *_: seen.append(1))
        measure(checks, exact, [documents(60)], cache=cache)
        handle.remove()
        return len(seen)

    cache = Store()
    assert passes([PERPLEXITY, DIVERGENCE]) == passes([DIVERGENCE])
    first, again = passes([PERPLEXITY], cache), passes([PERPLEXITY], cache)
    assert again < first and len(cache) > 0


class Writing(Perplexity):
    """Lets the model write."""

    @property
    def written(self):
        return 5


def test_what_rounding_cannot_move_is_left_out(exact):
    left_out = [
        Footprint(max_mb=1),
        Latency(max_ratio=0.5),
        Generation(max_collapsed=0.1),
        Writing(max_increase="5%"),
    ]
    assert not any(map(applies, left_out)) and applies(PERPLEXITY)
    assert measure(left_out, exact, [documents(60)]) == [[], [], [], []]


def test_settings_leave_the_margin_out():
    assert settings(PERPLEXITY) == settings(Perplexity(max_increase="1%", confidence=0.9))
    assert settings(PERPLEXITY) != settings(DIVERGENCE)


def test_nothing_is_recalled_and_float32_is_asked(coarse):
    other = otherwise(coarse)
    assert other.dtype == "float32" and other.recalled is None and other.digest == coarse.digest
    other = otherwise(Memo(coarse))  # no model in torch: asked alone, as it is
    assert other.dtype == "bfloat16"


def result(metric, margin, verdict="PASS", loss=0.001) -> CheckResult:
    return CheckResult(
        metric=metric,
        unit="nats per token",
        source="wiki",
        against="baseline",
        reference=0.0,
        value=loss,
        loss=loss,
        lower=loss,
        upper=loss,
        margin=margin,
        confidence=0.95,
        examples=100,
        tokens=100,
        verdict=verdict,
        definition="d",
    )


def test_a_runtime_that_differs_from_itself_proves_no_smaller_divergence():
    decoded = [result("decode", 0.01, loss=0.004)]
    gate = (DIVERGENCE, PERPLEXITY)
    fine, low, other = (result("divergence", 0.08), result("divergence", 0.004), result("perplexity", 0.001))
    judged = above_decoding([fine, low, other], gate, decoded)
    assert [r.verdict for r in judged] == ["PASS", "INVALID", "PASS"]
    assert "differs from itself" in judged[1].definition and judged[0] == fine and judged[2] == other
    invalid = result("divergence", 0.001, "INVALID")
    assert above_decoding([invalid], gate, decoded) == [invalid]
