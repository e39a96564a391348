"""The edges of gates: exactly at a minimum, at a limit, at a level, and what is asked of whom."""

import math

import pytest

import compress.gate as gates
from compress.decisions import Decision
from compress.gate import CheckResult, Gate, Sizes, Trial
from compress.interfaces import P_REGRESSION, Sample, Score
from evaluators.footprint import Footprint
from evaluators.perplexity import Perplexity
from tests.gates import baseline, near  # noqa: F401 (fixtures)
from tests.tiny import documents, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Lessons(Perplexity):
    """Losses by the number in an example's id, for two models that the digest tells apart; what was asked is noted."""

    def examples(self, data, encode):
        asked["documents"].append(len(data.documents))
        return super().examples(data, encode)

    def score(self, model, batch, reference=None):
        asked["judges"].append(reference)
        new = model.digest != tiny_model().digest
        return [Score(e.id, LOSS[new](int(e.id.split("-")[1])), 1.0) for e in batch]

    def samples(self, examples, new, old, decode):
        return [Sample(e.id, "", "", "", f"{len(examples)} {len(new)} {len(old)}") for e in examples[-1:]]


class Fixed(Lessons):
    statistic = "census"


class Strict(Lessons):
    statistic = "betting"

    @property
    def forbids_any_loss(self):
        return True


asked = {"documents": [], "judges": []}
LOSS = {False: lambda i: 1.0, True: lambda i: 1.0 + (i % 7) / 10}  # 0.3 on average: far from sure


@pytest.fixture(autouse=True)
def nothing_asked():
    for noted in asked.values():
        noted.clear()


def test_no_further_documents_are_asked_for_at_the_limit(baseline, near):
    check = Lessons(max_increase=math.expm1(0.3), max_documents=60)
    (found,) = Gate((check,)).evaluate(near, baseline, [documents(120)]).checks
    assert found.verdict == "INCONCLUSIVE" and found.examples == 60
    assert min(asked["documents"]) > 0 and sum(asked["documents"]) == 2 * 60  # by both models' tokenizers


def test_just_enough_examples_are_enough(baseline, near):
    check = Lessons(max_increase=math.expm1(0.3))
    (found,) = Gate((check,)).evaluate(near, baseline, [documents(50)]).checks
    assert found.verdict == "INCONCLUSIVE" and found.examples == 50 and "are needed" not in found.definition
    (few,) = Gate((check,)).evaluate(near, baseline, [documents(49)]).checks
    assert few.verdict == "INVALID" and "49 examples, and at least 50 are needed" in few.definition


def test_equal_scores_of_other_weights_are_suspicious_from_the_minimum_on(baseline, near, monkeypatch):
    monkeypatch.setitem(LOSS, True, LOSS[False])
    given = documents(60)
    trial = Trial(Strict(max_increase="5%"), given, near, baseline, 1, 1)
    trial.take(given.documents[:49], lambda model: model, None)
    assert trial.decision.verdict == "INCONCLUSIVE"
    trial.take(given.documents[49:50], lambda model: model, None)
    assert trial.decision.verdict == "INVALID" and "are equal, and the weights are not" in trial.decision.reason


def test_the_reference_judges_fixed_sets_alone(baseline, near):
    for kind, judge in ((Lessons, None), (Fixed, baseline)):
        asked["judges"].clear()
        Gate((kind(max_increase=math.expm1(0.3)),)).evaluate(near, baseline, [documents(50)])
        assert {id(j) for j in asked["judges"][1::2]} == {id(judge)}  # of the model's scores
        assert not any(asked["judges"][::2])  # the reference's own have no judge


def test_samples_are_chosen_among_the_first_examples(baseline, near, monkeypatch):
    monkeypatch.setattr(gates, "EXAMPLES_KEPT", 20)
    check = Lessons(max_increase=math.expm1(0.3), max_documents=60)
    (found,) = Gate((check,)).evaluate(near, baseline, [documents(60)]).checks
    assert [(s.id, s.note) for s in found.samples] == [("words-19", "20 20 20")]


def test_progress_counts_the_usual_documents_and_then_all(baseline, near):
    trial = Trial(Lessons(max_increase="5%"), documents(300), near, baseline, 1, 1)
    done = {}
    for trial.documents in (0, 100, 199, 200, 250, 299):
        done[trial.documents] = trial.done
    assert done == {0: 0, 100: 0.5, 199: 199 / 200, 200: 200 / 300, 250: 250 / 300, 299: 299 / 300}
    trial.documents = 300
    assert trial.done == 1.0 and not trial.open


def test_a_gain_exactly_as_large_as_is_plausible_needs_no_review(baseline, near):
    check = Lessons(max_increase="5%", max_gain="10%")
    trial = Trial(check, documents(60), near, baseline, 1, 1)
    gain = -check.plausible_gain
    assert trial._review(Decision("PASS", gain, gain, gain)) == ""
    beyond = math.nextafter(gain, -1)
    assert "is proven" in trial._review(Decision("PASS", beyond, beyond, beyond))


def test_no_loss_is_tested_on_the_difference_and_only_where_scores_mean_something(baseline, near):
    def trial(check, verdict="PASS", new=0.5, n=60):
        made = Trial(check, documents(60), near, baseline, 1, 1)
        made.decision = Decision(verdict)
        made.new = [Score(str(i), new, 1.0) for i in range(n)]
        made.old = [Score(str(i), 0.5, 1.0) for i in range(n)]
        made.clusters = [str(i) for i in range(n)]
        return made._regression()

    strict = Strict(max_increase="5%")
    assert trial(strict) == {P_REGRESSION: 1.0}  # as wrong as the reference
    assert trial(strict, new=1.0)[P_REGRESSION] < 1e-3
    for verdict in ("FAIL", "INCONCLUSIVE"):
        assert trial(strict, verdict) == {P_REGRESSION: 1.0}
    assert trial(strict, "INVALID") == trial(strict, n=0) == trial(Lessons(max_increase="5%")) == {}


def result(p: float) -> CheckResult:
    numbers = dict.fromkeys(("reference", "value", "loss", "lower", "upper", "margin"), 0.0)
    texts = dict.fromkeys(("metric", "unit", "source", "against", "definition"), "")
    return CheckResult(
        **numbers, **texts, confidence=0.95, examples=60, tokens=60, verdict="PASS", details={P_REGRESSION: p}
    )


def test_a_loss_proven_exactly_at_the_level_fails():
    level = 1 - 0.95
    assert gates._without_regression(result(level)).verdict == "FAIL"
    above = result(math.nextafter(level, 1))
    assert gates._without_regression(above) is above
    nan = result(math.nan)
    assert gates._without_regression(nan) is nan


def test_a_size_that_is_a_number_is_not_called_invalid(baseline, near):
    check = Footprint(max_mb=80)
    for size in (1, 90_000_000):
        (found,) = Gate((check,)).evaluate(near, baseline, [], sizes=Sizes(size, 4.5)).checks
        assert found.definition == check.definition
    (bad,) = Gate((check,)).evaluate(near, baseline, [], sizes=Sizes(math.nan, 4.5)).checks
    assert bad.definition == f"{check.definition} Invalid here: the measurement is not finite."


def test_equal_scores_of_equal_weights_are_no_suspicion(baseline):
    twin = tiny_model()
    assert twin.digest == baseline.digest
    for kind in (Fixed, Strict):
        (found,) = Gate((kind(max_increase="5%"),)).evaluate(twin, baseline, [documents(60)]).checks
        assert found.verdict == "PASS" and found.loss == 0


def test_an_attempt_less_than_one_is_refused(baseline, near):
    for attempts in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            Gate((Perplexity(max_increase="5%"),)).evaluate(near, baseline, [documents(50)], attempts=attempts)
