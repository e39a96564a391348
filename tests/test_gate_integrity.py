"""What nothing may be concluded from: too little, other tokens, other vocabularies, and numbers that are none."""

import math

import pytest

from compress.errors import GateInconclusive, RecipeError
from compress.gate import Gate
from compress.interfaces import Score
from compress.measure import evaluate, measure
from evaluators.perplexity import Perplexity
from tests.gates import DIVERGENCE, PERPLEXITY, baseline, near, other_tokens  # noqa: F401 (fixtures)
from tests.tiny import documents, perturbed, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Hasty(Perplexity):
    """A plug-in that asks for no examples at all before it decides, and finds a gain in each."""

    minimum_examples = 0

    def score(self, model, batch, reference=None):
        return [Score(e.id, float(model.digest == tiny_model().digest), 1.0) for e in batch]


class HastyBets(Hasty):
    statistic = "betting"


class HastyCensus(Hasty):
    statistic = "census"


@pytest.mark.parametrize(
    ("kind", "none", "one"),
    [(Hasty, "INVALID", "INVALID"), (HastyBets, "INVALID", "INCONCLUSIVE"), (HastyCensus, "INVALID", "PASS")],
)
def test_nothing_and_a_single_example_prove_no_more_than_they_can(baseline, near, kind, none, one):
    """The loss of one example has no variance; of a fixed set that is one example, all is known."""
    check = kind(max_increase=math.expm1(0.3), max_gain="1000%")
    for count, verdict, needed in ((0, none, "0 examples, and at least"), (1, one, "1 examples, and at least 2")):
        (found,) = Gate((check,)).evaluate(near, baseline, [documents(count)]).checks
        assert (found.verdict, found.examples) == (verdict, count)
        assert (needed in found.definition) == (verdict == "INVALID")


def test_vocabularies_of_other_sizes_are_invalid(baseline):
    """Rows that no token uses change no text's tokens, and still all probabilities."""
    wide = tiny_model(vocab_size=260)
    assert wide.encode("a margin") == baseline.encode("a margin")
    (found,) = Gate((DIVERGENCE,)).evaluate(wide, baseline, [documents(120)]).checks
    assert found.verdict == "INVALID" and "vocabularies of 260 and the reference's 256 tokens" in found.definition
    with pytest.raises(GateInconclusive, match="do not compare"):
        measure(DIVERGENCE, wide, documents(4), reference=baseline)


@pytest.mark.parametrize("windows", [None, 2])
def test_a_loss_between_models_that_read_other_tokens_is_not_reported(baseline, near, windows):
    def against(reference, source="pydoc"):
        options = {"source": source, "documents": 4, "length": 32, "windows": windows}
        return evaluate(near, ["perplexity"], against=reference, **options)

    (found,) = against(baseline)["metrics"]
    assert abs(found["against"]["loss"]) < 0.1
    other = other_tokens()
    other.tokenizer.add_tokens(["statement", "the", "is"])
    with pytest.raises(RecipeError, match="perplexity on pydoc: the two models read other tokens"):
        against(other)


@pytest.mark.parametrize("check", [PERPLEXITY, DIVERGENCE], ids=["perplexity", "divergence"])
def test_numbers_that_are_none_are_not_reported(baseline, near, check):
    data, broken = documents(4), perturbed(baseline, math.nan)
    assert math.isfinite(measure(check, near, data, reference=baseline).value)
    for model, reference in ((broken, baseline), (near, broken)):
        with pytest.raises(GateInconclusive, match="scores are not finite"):
            measure(check, model, data, reference=reference)


class Weightless(Perplexity):
    """Counts positions in a way that is no number."""

    def score(self, model, batch, reference=None):
        return [Score(e.id, 1.0, math.nan) for e in batch]


def test_positions_that_are_no_number_prove_and_report_nothing(baseline, near):
    check = Weightless(max_increase="5%")
    with pytest.raises(GateInconclusive, match="not finite"):
        measure(check, near, documents(4))
    (found,) = Gate((check,)).evaluate(near, baseline, [documents(60)]).checks
    assert found.verdict == "INVALID" and "16 losses are not finite" in found.definition and found.tokens == 0
