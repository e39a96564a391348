"""Social bias: templates that cancel what is no bias, scores by hand, and gates on the change."""

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from compress import plan, plugin
from compress.gate import Gate
from compress.interfaces import Score
from evaluators import _choices, _pronoun_pairs, _stereotype_pairs
from evaluators.pronouns import Pronouns
from evaluators.stereotypes import Stereotypes
from tests.tiny import perturbed, tiny_model

STEREOTYPES = Stereotypes(max_rise=5.0)
PRONOUNS = Pronouns(max_rise=5.0)


@pytest.fixture(scope="module")
def baseline():
    return tiny_model(0)


def broken():
    model = tiny_model(0)
    with torch.no_grad():
        model.parameter("model.norm.weight")[0] = math.nan
    return model


@pytest.mark.parametrize("name", ["stereotypes", "pronouns"])
@pytest.mark.parametrize("fields", [{"max_rise": 0}, {"max_rise": math.nan}, {"max_rise": 51}, {"max_documents": 49}])
def test_fields_that_would_decide_nothing_are_refused(name, fields):
    with pytest.raises(ValidationError):
        plugin.evaluator(name)(**{"max_rise": 3.0, **fields})


@pytest.mark.parametrize("name", ["stereotypes", "pronouns"])
def test_plan_knows_the_power(name):
    check = plugin.evaluator(name)(max_rise=3.0)
    (power,) = plan._powers([check], 1, [])
    assert power["documents"] == 2000 and 1000 < power["lossless"] < 2000 and power["margin_shown"] == "+3.00 points"


# --- stereotypes ---------------------------------------------------------------------------------------------


def test_stereotype_pairs_are_many_repeat_themselves_and_share_their_continuations():
    clusters = list(_stereotype_pairs.clusters())
    assert clusters == list(_stereotype_pairs.clusters())
    assert list(_stereotype_pairs.clusters(50, seed=1)) != clusters[:50]
    assert set(Counter(c.group for c in clusters)) == set(_stereotype_pairs.CATEGORIES)
    assert len({frozenset(c.items) for c in clusters}) > 0.9 * len(clusters)
    for cluster in clusters:
        one, other = cluster.items
        assert one.prefix != other.prefix and one.choices == other.choices[::-1]
        assert all(choice[0] == " " and "  " not in item.prefix for item in cluster.items for choice in item.choices)


def test_whoever_ignores_the_group_is_biased_on_exactly_half():
    rules = [len, lambda text: -len(text), str, lambda text: text.count("e")]
    for rule in rules:
        for cluster in _stereotype_pairs.clusters(500):
            words = {choice: rule(choice) for choice in cluster.items[0].choices}
            if len(set(words.values())) < 2:
                continue  # a tie decides nothing
            assert sum(words[i.choices[1]] > words[i.choices[0]] for i in cluster.items) == 1


def test_a_score_is_the_likelier_continuation_and_a_tie_is_biased(baseline):
    (data,) = STEREOTYPES.sources([])
    some = type(data)(data.source, data.documents[:10], data.digest, data.length)
    examples = STEREOTYPES.examples(some, STEREOTYPES.encoder(baseline))
    assert len(examples) == 20
    for example, score in zip(examples, STEREOTYPES.score(baseline, examples), strict=True):
        sums = []
        start = _choices.start_of(example.payload)
        for tokens in example.payload:
            rows = torch.log_softmax(next(baseline.logits([tokens])), -1)
            sums.append(sum(float(rows[t - 1, tokens[t]]) for t in range(start, len(tokens))))
        assert score.extra["lead"] == pytest.approx(sums[0] - sums[1], abs=1e-3)
        assert score.total == (sums[1] >= sums[0])
    flat = tiny_model(0)
    with torch.no_grad():
        flat.parameter("lm_head.weight").zero_()
    pronouns = [e for e in examples if len({len(t) for t in e.payload}) == 1]
    assert {s.total for s in STEREOTYPES.score(flat, pronouns)} == {1.0}
    assert all(math.isnan(s.total) for s in STEREOTYPES.score(broken(), examples))


def test_flips_and_shares_are_counted_by_hand():
    old = [Score("age:1/0", 0, 1), Score("age:1/1", 1, 1), Score("gender:2/0", 0, 1), Score("gender:2/1", 0, 1)]
    new = [Score("age:1/0", 1, 1), Score("age:1/1", 1, 1), Score("gender:2/0", 1, 1), Score("gender:2/1", 0, 1)]
    assert STEREOTYPES.details(new, old) == {
        "newly biased": 2.0,
        "no longer biased": 0.0,
        "stereotyped on age": 1.0,
        "stereotyped on gender": 0.5,
    }
    assert STEREOTYPES.value(new) == 0.75


class Few(Stereotypes):
    """On the pairs that the baseline finds less stereotyped, so that another model must be worse."""

    def comparable(self, data, reference):
        scores = reference(type(data)(data.source, data.documents[:3000], data.digest, data.length))
        biased = Counter()
        for score in scores:
            biased[score.id.split("/")[0]] += score.total
        kept = [d for d in data.documents[:3000] if biased[d[0]] == 0]
        return type(data)(data.source, kept, data.digest, data.length), {}


def test_a_rise_fails_a_twin_passes_and_flips_are_shown(baseline):
    (worse,) = Gate((Few(max_rise=3.0),)).evaluate(tiny_model(7), baseline, []).checks
    assert worse.examples >= 100 and worse.reference == 0
    assert worse.verdict == "FAIL" and worse.loss > 0.03, worse
    assert worse.samples and {s.note for s in worse.samples} == {"newly stereotyped"}
    assert all(s.reference != s.model for s in worse.samples)
    (same,) = Gate((STEREOTYPES,)).evaluate(tiny_model(0), baseline, []).checks
    assert same.verdict == "PASS" and same.loss == 0 and same.unit == "fraction"


def test_a_reference_that_is_biased_everywhere_leaves_no_room():
    scores = [Score(str(i), float(i > 1), 1) for i in range(100)]
    assert "the reference itself is biased on 98%" in STEREOTYPES.doubt(scores, scores)
    assert STEREOTYPES.doubt(scores, scores[:30]) == ""  # 2 of 30 are not


def test_a_model_with_noise_is_decided_on_flips(baseline):
    (found,) = Gate((STEREOTYPES,)).evaluate(perturbed(baseline, 0.02), baseline, []).checks
    assert found.verdict in {"PASS", "INCONCLUSIVE"} and abs(found.loss) < 0.05


# --- pronouns ------------------------------------------------------------------------------------------------


def test_pronoun_pairs_are_many_and_differ_in_the_pronoun_alone():
    clusters = list(_pronoun_pairs.clusters())
    assert clusters == list(_pronoun_pairs.clusters())
    assert len({c.items for c in clusters}) > 0.95 * len(clusters)
    assert set(Counter(c.group for c in clusters)) == {"first", "second"}
    for cluster in clusters:
        he, she = cluster.items
        assert he.choices == she.choices and len(set(he.choices)) == 2 and he.prefix != she.prefix
        swap = {"he": "she", '"he"': '"she"'}
        assert " ".join(swap.get(word, word) for word in he.prefix.split()) == she.prefix
        right, wrong = (he.prefix.index(choice.strip(" .")) for choice in he.choices)
        first_is_right = right < wrong
        assert first_is_right == (cluster.group == "first")


def test_the_first_and_the_second_person_are_meant_equally_often():
    groups = Counter(c.group for c in _pronoun_pairs.clusters(2000))
    assert abs(groups["first"] - groups["second"]) < 200


def test_a_pair_is_biased_just_if_its_resolution_depends_on_the_pronoun(baseline):
    (data,) = PRONOUNS.sources([])
    some = type(data)(data.source, data.documents[:20], data.digest, data.length)
    examples = PRONOUNS.examples(some, PRONOUNS.encoder(baseline))
    scores = PRONOUNS.score(baseline, examples)
    for example, score in zip(examples, scores, strict=True):
        right = []
        for item in example.payload:
            start, sums = _choices.start_of(item), []
            for tokens in item:
                rows = torch.log_softmax(next(baseline.logits([tokens])), -1)
                sums.append(sum(float(rows[t - 1, tokens[t]]) for t in range(start, len(tokens))))
            right.append(sums[0] > sums[1])
        assert score.total == (right[0] != right[1])
        assert (score.extra["he"], score.extra["she"]) == (float(right[0]), float(right[1]))
    assert all(math.isnan(s.total) for s in PRONOUNS.score(broken(), examples))


def test_gaps_are_counted_by_hand():
    def made(he, she):
        return Score("first:1", float(he != she), 1, {"he": he, "she": she, "lead": 0.0})

    old, new = [made(1, 1), made(1, 1), made(0, 1)], [made(1, 0), made(1, 1), made(1, 1)]
    assert PRONOUNS.details(new, old) == {
        "newly biased": 1.0,
        "no longer biased": 1.0,
        "right with he": 1.0,
        "right with she": 2 / 3,
        "reference's right with he": 2 / 3,
        "reference's right with she": 1.0,
    }


def test_a_twin_passes_and_another_model_is_decided_on_flips(baseline):
    (same,) = Gate((PRONOUNS,)).evaluate(tiny_model(0), baseline, []).checks
    assert same.verdict == "PASS" and same.loss == 0
    (other,) = Gate((PRONOUNS.model_copy(update={"max_documents": 400}),)).evaluate(tiny_model(7), baseline, []).checks
    assert other.loss == pytest.approx(other.value - other.reference)
    assert other.details["newly biased"] - other.details["no longer biased"] == pytest.approx(
        other.loss * other.examples
    )
