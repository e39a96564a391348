import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.decisions import Decision, Rule, interval
from compress.errors import RecipeError
from compress.gate import CheckResult, Gate, GateResult, Sizes, Trial
from compress.interfaces import P_REGRESSION, Documents, Sample, Score
from compress.numerics.paired import holm
from evaluators.footprint import Footprint
from evaluators.long_context import LongContext
from evaluators.perplexity import Perplexity
from tests.gates import DIVERGENCE, PERPLEXITY, Store, baseline, far, gate, near, other_tokens, twin_of_equal_scores  # noqa: F401 (fixtures)
from tests.tiny import documents, perturbed, tiny_model

MARGIN = math.log(1.05)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_near_model_passes_and_stops_early(baseline, near):
    result = gate(PERPLEXITY, DIVERGENCE).evaluate(near, baseline, [documents(160)])
    perplexity, divergence = result.checks
    assert result.verdict == perplexity.verdict == divergence.verdict == "PASS"
    assert 50 <= perplexity.examples < 80 and 100 <= divergence.examples < 130
    assert perplexity.upper <= perplexity.margin == pytest.approx(MARGIN)
    assert divergence.reference == 0 and divergence.value == pytest.approx(divergence.loss)
    assert math.log(perplexity.value / perplexity.reference) == pytest.approx(perplexity.loss, abs=1e-12)
    assert set(divergence.details) == {"js", "top1", "p50", "p90", "p99", "p999"}
    assert 0.9 < divergence.details["top1"] <= 1
    assert perplexity.definition == PERPLEXITY.definition


def test_a_far_model_fails(baseline, far):
    result = gate(PERPLEXITY, DIVERGENCE).evaluate(far, baseline, [documents(160)])
    assert [check.verdict for check in result.checks] == ["FAIL", "FAIL"]
    assert all(check.lower > check.margin for check in result.checks)
    assert result.verdict == "FAIL"


@pytest.mark.parametrize("max_documents", [None, 70])
def test_a_loss_at_the_margin_is_inconclusive_on_all_documents(baseline, far, max_documents):
    data, count = documents(120), max_documents or 120
    scores = [PERPLEXITY.score(m, PERPLEXITY.examples(data, m.encode)[:count]) for m in (far, baseline)]
    increase = PERPLEXITY.value(scores[0]) / PERPLEXITY.value(scores[1]) - 1
    at_margin = Perplexity(max_increase=f"{100 * increase}%", max_documents=max_documents)
    check = gate(at_margin).evaluate(far, baseline, [data]).checks[0]
    assert check.verdict == "INCONCLUSIVE"
    assert check.examples == count
    assert check.loss == pytest.approx(check.margin, rel=1e-6)
    assert check.lower < check.margin < check.upper


def test_the_worst_source_decides(baseline, near):
    good, short = documents(80), documents(20, seed=1, source="short")
    result = gate(PERPLEXITY).evaluate(near, baseline, [good, short])
    assert [(c.source, c.verdict) for c in result.checks] == [("words", "PASS"), ("short", "INVALID")]
    assert result.verdict == "INVALID"
    assert "20 examples, and at least 50 are needed" in result.checks[1].definition


def test_levels_account_for_attempts_and_for_the_number_of_checks(baseline, near):
    data = [documents(64), documents(64, seed=1, source="more")]
    one = gate(PERPLEXITY).evaluate(near, baseline, data[:1]).checks[0]
    tried = gate(PERPLEXITY).evaluate(near, baseline, data[:1], attempts=4).checks[0]
    two = gate(PERPLEXITY, Perplexity(max_increase="6%")).evaluate(near, baseline, data).checks
    examples = PERPLEXITY.examples(data[0], baseline.encode)[: one.examples]
    looks = [examples[i : i + 16] for i in range(0, len(examples), 16)]  # sums of floats depend on what is batched
    new, old = ([s for look in looks for s in PERPLEXITY.score(model, look)] for model in (near, baseline))
    losses, weights = (np.array(x) for x in zip(*((a.total - b.total, a.weight) for a, b in zip(new, old))))

    def bounds(check, alpha_pass, alpha_fail):
        rule = Rule(MARGIN, alpha_pass, alpha_fail, 64, 50)
        return (check.loss, check.lower, check.upper) == pytest.approx(interval(losses, weights, rule), rel=1e-6)

    assert bounds(one, 0.05, 0.05) and bounds(tried, 0.0125, 0.0125)
    assert len(two) == 4 and bounds(two[0], 0.05, 0.0125)  # k = 4: two checks on two sources
    with pytest.raises(ValueError, match="at least 1"):
        gate(PERPLEXITY).evaluate(near, baseline, data, attempts=0)


def test_the_same_weights_pass_with_no_loss(baseline):
    result = gate(PERPLEXITY, DIVERGENCE).evaluate(tiny_model(), baseline, [documents(120)])
    assert result.verdict == "PASS"
    assert [(c.loss, c.lower, c.upper) for c in result.checks] == [(0.0, 0.0, 0.0)] * 2


def test_other_weights_without_any_loss_are_invalid(baseline):
    twin = twin_of_equal_scores()
    assert twin.digest != baseline.digest
    check = gate(PERPLEXITY).evaluate(twin, baseline, [documents(160)]).checks[0]
    assert check.verdict == "INVALID" and "losses are equal" in check.definition


def test_a_model_is_never_compared_with_itself(baseline):
    with pytest.raises(ValueError, match="same object"):
        gate(PERPLEXITY).evaluate(baseline, baseline, [documents(60)])


def test_nan_logits_are_invalid_at_once_and_null_in_json(baseline):
    broken = perturbed(baseline, math.nan)
    result = gate(PERPLEXITY, DIVERGENCE).evaluate(broken, baseline, [documents(160)])
    assert result.verdict == "INVALID"
    assert [(c.verdict, c.examples) for c in result.checks] == [("INVALID", 16)] * 2
    assert all("not finite" in check.definition for check in result.checks)
    written = json.loads(result.model_dump_json(), parse_constant=pytest.fail)
    assert written["checks"][0]["upper"] is None and written["checks"][1]["details"]["p999"] is None
    json.dumps(result.model_dump(), allow_nan=False)
    assert math.isnan(GateResult.model_validate(written).checks[0].upper)


def test_a_nan_reference_is_invalid(baseline, near):
    broken = perturbed(baseline, math.nan)
    assert gate(PERPLEXITY).evaluate(near, broken, [documents(60)]).verdict == "INVALID"
    assert gate(DIVERGENCE).evaluate(near, broken, [documents(120)]).verdict == "INVALID"


@pytest.mark.parametrize("data", [[], [documents(0)], [Documents("blank", [("a", ""), ("b", "x")], "d", 64)]])
def test_an_empty_corpus_passes_nothing(baseline, near, data):
    result = gate(PERPLEXITY).evaluate(near, baseline, data)
    assert result.verdict == "INVALID"
    assert [check.examples for check in result.checks] == [0]


def test_no_checks_are_refused():
    with pytest.raises(RecipeError, match="prove nothing"):
        Gate(())


def test_documents_with_one_id_are_invalid(baseline, near):
    data = documents(60)
    twice = replace(data, documents=[*data.documents[:59], data.documents[0]])
    check = gate(Perplexity(max_increase="0.001%")).evaluate(near, baseline, [twice]).checks[0]
    assert check.verdict == "INVALID" and "occurs twice" in check.definition


def test_tokenizers_that_differ_are_invalid(baseline):
    check = gate(PERPLEXITY).evaluate(other_tokens(), baseline, [documents(60)]).checks[0]
    assert check.verdict == "INVALID" and "differently" in check.definition


class Shuffled(Perplexity):
    """An evaluator that hands its scores back in the wrong order."""

    def score(self, model, batch, reference=None):
        return super().score(model, batch)[::-1]


class Shortened(Perplexity):
    """An evaluator that counts one position less for every second model it scores."""

    def score(self, model, batch, reference=None):
        scores = super().score(model, batch)
        return scores if model.digest == tiny_model().digest else [replace(s, weight=s.weight - 1) for s in scores]


class Lossy(Perplexity):
    """An evaluator that forgets an example."""

    def score(self, model, batch, reference=None):
        return super().score(model, batch)[1:]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Shuffled, "not those of the examples"), (Lossy, "not those"), (Shortened, "numbers of positions")],
)
def test_scores_that_do_not_pair_are_invalid(baseline, near, kind, reason):
    check = gate(kind(max_increase="5%")).evaluate(near, baseline, [documents(60)]).checks[0]
    assert check.verdict == "INVALID" and reason in check.definition


def test_against_parent(baseline, near, far):
    check = Perplexity(max_increase="5%", against="parent")
    assert gate(check).evaluate(perturbed(far, 0.01), baseline, [documents(80)], parent=far).verdict == "PASS"
    assert gate(check).evaluate(near, baseline, [documents(80)], parent=far).checks[0].against == "parent"
    with pytest.raises(RecipeError, match="no parent"):
        gate(check).evaluate(near, baseline, [documents(80)])


@pytest.mark.parametrize(
    ("size", "verdict"), [(80_000_000, "PASS"), (80_000_001, "FAIL"), (1, "PASS"), (math.nan, "INVALID")]
)
def test_exact_checks_compare_sizes(baseline, near, size, verdict):
    sizes = Sizes(size, 4.5)
    check = gate(Footprint(max_mb=80)).evaluate(near, baseline, [], sizes=sizes).checks[0]
    assert check.verdict == verdict
    assert check.source == "files" and check.details["bits_per_weight"] == 4.5
    assert check.value == check.loss == check.upper or verdict == "INVALID"


@pytest.mark.parametrize("sizes", [None, Sizes(0, 4.5), Sizes(-1, 4.5)])
def test_exact_checks_without_files_are_invalid(baseline, near, sizes):
    check = gate(Footprint(max_mb=80)).evaluate(near, baseline, [], sizes=sizes).checks[0]
    assert check.verdict == "INVALID" and "no files were measured" in check.definition


def test_exact_checks_take_no_share_of_the_error(baseline, near):
    data, sizes = [documents(64)], Sizes(1, 1.0)
    alone = gate(PERPLEXITY).evaluate(near, baseline, data)
    beside = gate(Footprint(max_mb=80), PERPLEXITY).evaluate(near, baseline, data, sizes=sizes)
    assert [c.metric for c in beside.checks] == ["footprint", "perplexity"]
    assert beside.checks[1] == alone.checks[0]


class Gaining(Perplexity):
    """Perplexity of a model that knows the answers: its scores are better by 0.2 nats per token."""

    def score(self, model, batch, reference=None):
        gain = 0.0 if model.digest == tiny_model().digest else 0.2
        return [replace(s, total=s.total - gain * s.weight) for s in super().score(model, batch)]


def test_a_gain_too_good_to_be_true_does_not_pass_unseen(baseline, near):
    result = gate(Gaining(max_increase="5%"), DIVERGENCE).evaluate(near, baseline, [documents(160)])
    found, other = result.checks
    assert found.verdict == result.verdict == "INCONCLUSIVE" and other.verdict == "PASS"
    assert found.upper < math.log(0.9) and "-10.0 % is proven" in found.review and "max_gain" in found.review
    assert "Invalid" not in found.definition and other.review == ""
    allowed = Gaining(max_increase="5%", max_gain="30%")
    (check,) = gate(allowed).evaluate(near, baseline, [documents(160)]).checks
    assert check.verdict == "PASS" and check.review == "" and check.loss == found.loss


def test_what_a_step_wins_back_from_its_parent_is_no_such_gain(baseline, near, far):
    check = Perplexity(max_increase="5%", against="parent", max_gain="0.1%")
    parent = perturbed(far, 1.0)
    (found,) = gate(check).evaluate(near, baseline, [documents(160)], parent=parent).checks
    assert found.verdict == "PASS" and found.upper < -check.plausible_gain and found.review == ""


@given(gain=st.floats(0.001, 0.9), max_gain=st.floats(0.001, 0.9))
def test_a_gain_on_a_fixed_set_is_reviewed_just_where_it_exceeds_the_bound(gain, max_gain):
    check = Whole(max_increase="5%", max_gain=max_gain)
    trial = object.__new__(Trial)
    trial.check = check
    loss = math.log1p(-gain)
    review = trial._review(Decision("PASS", loss, loss, loss))
    assert bool(review) == (loss < -check.plausible_gain)
    assert check.plausible_gain == pytest.approx(-math.log(1 - max_gain))
    assert not any(trial._review(Decision(v, loss, loss, loss)) for v in ("FAIL", "INCONCLUSIVE", "INVALID"))


class Answers(Perplexity):
    """Answers of which the model, unlike the baseline, has one wrong in `every` of a source, which its name tells."""

    statistic = "betting"
    no_regression: bool = True

    @property
    def forbids_any_loss(self):
        return self.no_regression

    def score(self, model, batch, reference=None):
        same = model.digest == tiny_model().digest
        found = []
        for example in batch:
            source, i = example.id.split("-")
            found.append(Score(example.id, float(not same and int(i) % int(source[5:]) == 0), 1.0))
        return found


def test_a_proven_loss_on_any_task_fails_where_none_is_allowed(baseline, near):
    """One answer in 8 is lost on the second of three tasks, within the margin of 50 points."""
    data = [documents(300, source=f"every{n}") for n in (301, 8, 150)]
    strict = gate(Answers(max_increase=math.expm1(0.4))).evaluate(near, baseline, data)
    assert [c.verdict for c in strict.checks] == ["PASS", "FAIL", "PASS"] and strict.verdict == "FAIL"
    p = [c.details[P_REGRESSION] for c in strict.checks]
    assert [c.details[f"{P_REGRESSION}, Holm"] for c in strict.checks] == holm(p)
    assert p[1] < 0.001 < 0.05 < p[0] and [c.examples for c in strict.checks] == [300] * 3
    assert "a loss is proven here" in strict.checks[1].review and strict.checks[0].review == ""
    lenient = gate(Answers(max_increase=math.expm1(0.4), no_regression=False)).evaluate(near, baseline, data)
    assert lenient.verdict == "PASS" and all(c.examples < 300 for c in lenient.checks)
    assert all(P_REGRESSION not in c.details for c in lenient.checks)


def test_the_correction_is_for_all_tasks_together(baseline, near):
    """A loss that is proven alone is not, beside four more tasks that lost nothing."""
    check = Answers(max_increase=math.expm1(0.4), max_documents=100)
    lossy = documents(100, source="every9")
    alone = gate(check).evaluate(near, baseline, [lossy]).checks[0]
    p = alone.details[P_REGRESSION]
    assert alone.verdict == "FAIL" and 0.01 < p <= 0.05 and f"{P_REGRESSION}, Holm" not in alone.details
    others = [documents(100, source=f"every{n}") for n in (101, 102, 103, 104)]
    beside = gate(check).evaluate(near, baseline, [lossy, *others])
    assert beside.verdict == "PASS" and beside.checks[0].details[f"{P_REGRESSION}, Holm"] == pytest.approx(5 * p)


class Whole(Perplexity):
    """Perplexity on a fixed set."""

    statistic = "census"

    def doubt(self, scores, reference):
        return "" if scores[0].id == "words-0" else "it starts elsewhere"


WHOLE = Whole(max_increase="5%")


def test_a_census_reads_every_document_and_claims_no_error(baseline, near, far):
    data = documents(60)
    for model, verdict in ((near, "PASS"), (far, "FAIL")):
        found = gate(WHOLE).evaluate(model, baseline, [data], attempts=3).checks[0]
        assert (found.verdict, found.examples) == (verdict, 60)
        assert found.lower == found.upper == found.loss == pytest.approx(math.log(found.value / found.reference))


def test_a_census_of_which_a_part_is_missing_is_invalid(baseline, near):
    data = documents(60)
    blank = replace(data, documents=[*data.documents[:-1], ("blank", "x")])
    found = gate(WHOLE).evaluate(near, baseline, [blank]).checks[0]
    assert found.verdict == "INVALID" and "59 examples, and at least 60 are needed" in found.definition
    few = gate(WHOLE).evaluate(near, baseline, [documents(49)]).checks[0]
    assert few.verdict == "INVALID" and "49 examples, and at least 50 are needed" in few.definition


def test_a_loss_within_the_margin_passes_only_without_doubt(baseline, near, far):
    data = documents(60)
    elsewhere = replace(data, documents=data.documents[::-1])
    found = gate(WHOLE).evaluate(near, baseline, [elsewhere]).checks[0]
    assert found.verdict == "INVALID" and "it starts elsewhere" in found.definition
    assert gate(WHOLE).evaluate(far, baseline, [elsewhere]).verdict == "FAIL"


def test_a_census_takes_no_share_of_the_error(baseline, near):
    data, long = [documents(64)], LongContext(max_increase="15%", length=64)
    alone = gate(PERPLEXITY).evaluate(near, baseline, data)
    beside = gate(PERPLEXITY, long, WHOLE).evaluate(near, baseline, data)
    assert [c.metric for c in beside.checks] == ["perplexity", "long_context", "perplexity"]
    assert beside.verdict == "PASS" and beside.checks[0] == alone.checks[0]


def test_a_census_from_the_cache_is_as_suspicious_as_without(baseline):
    store, twin = Store(), twin_of_equal_scores()
    first, again = (gate(WHOLE).evaluate(twin, baseline, [documents(60)], cache=store) for _ in range(2))
    assert store.hits and again == first
    assert first.verdict == "INVALID" and "scores of both models are equal" in first.checks[0].definition


def test_results_have_the_keys_of_a_check():
    keys = "metric unit source against reference value loss lower upper margin confidence examples tokens"
    assert set(CheckResult.model_fields) == {
        *keys.split(),
        "verdict",
        "definition",
        "details",
        "review",
        "samples",
        "aspect",
    }


class Shown(Perplexity):
    """Shows what it is given."""

    def samples(self, examples, new, old, decode):
        kept = zip(examples, new, old, strict=True)
        assert all(e.id == a.id == b.id for e, a, b in kept)
        return [Sample(e.id, decode(e.payload[0]), "a", "b") for e in examples]


def test_samples_see_matching_scores_of_a_bounded_number_of_examples(monkeypatch):
    monkeypatch.setattr("compress.gate.EXAMPLES_KEPT", 40)
    model, data = tiny_model(), documents(80)
    check = Shown(max_increase=0.00001, max_documents=80)
    (found,) = gate(check).evaluate(perturbed(model, 0.001), model, [data]).checks
    assert found.examples > 40 == len(found.samples) == 40
    assert [s.prompt for s in found.samples] == [text[:64] for _, text in data.documents[:40]]  # a window
    assert CheckResult.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError, match="unexpected"):
        CheckResult.model_validate({**found.model_dump(), "samples": [{**asdict(found.samples[0]), "unknown": "x"}]})
