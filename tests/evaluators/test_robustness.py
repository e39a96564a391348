"""Perturbations by their properties, and the gate on perturbed items."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress import assay, plan
from compress.errors import RecipeError
from compress.gate import Gate
from compress.measure import _without_margin
from evaluators import _choices, _cloze, _minimal_pairs, _perturb
from evaluators.robustness import Robustness
from tests.evaluators.test_accuracy import made
from tests.evaluators.test_items import prose
from tests.tiny import tiny_model

CHECK = Robustness(max_drop=3.0, perturb=tuple(_perturb.KINDS))
TEXTS = st.lists(st.sampled_from("The teacher near the doctors has noticed an old WOODEN clock 42".split()), min_size=1)


def changed(kind, text, seed=0):
    return _perturb.KINDS[kind](text, random.Random(seed))


# --- perturbations -------------------------------------------------------------------------------------------


@given(TEXTS, st.integers(0, 99))
def test_typos_swap_inner_letters_and_leave_everything_else(words, seed):
    new = changed("typos", " ".join(words), seed).split(" ")
    assert len(new) == len(words)
    for before, after in zip(words, new, strict=True):
        assert Counter(before) == Counter(after) and (before[0], before[-1]) == (after[0], after[-1])
        places = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
        assert not places or (len(places) == 2 and places[1] == places[0] + 1)
    able = [w for w in words if w in {"teacher", "near", "doctors", "noticed", "WOODEN", "clock"}]
    assert (new != words) == bool(able)


@given(TEXTS, st.integers(0, 99))
def test_casing_changes_case_alone_and_word_order_the_order_alone(words, seed):
    text = " ".join(words)
    assert changed("casing", text, seed).lower() == text.lower()
    assert (changed("casing", text, seed) != text) == any(word != word.upper() for word in words)
    new = changed("word_order", text, seed).split(" ")
    assert Counter(new) == Counter(words) and new[-3:] == words[-3:]


@pytest.mark.parametrize("kind", ["instruction", "languages"])
def test_what_is_put_before_a_text_leaves_it_whole(kind):
    found = {changed(kind, "The king slept", seed) for seed in range(50)}
    assert len(found) == 4 and all(text.endswith(" The king slept") for text in found)


def test_examples_worked_out_by_hand():
    assert changed("typos", "abcd") == "acbd"  # the only two inner letters
    assert changed("typos", "is it aaaa") == "is it aaaa"  # nothing to swap
    assert changed("casing", "x 42") == "X 42"
    assert changed("synonyms", "a large film, often shown") == "a big movie, frequently displayed"
    assert changed("synonyms", "an often shown tale") == "an often displayed story"  # "an frequently" would be wrong
    assert changed("synonyms", "The king slept as though") == "The king slept as though"


def test_synonyms_are_words_that_name_each_other_or_lead_nowhere():
    table = _perturb._synonyms()
    assert len(table) == 69 and all(a != b and a.islower() and " " not in a + b for a, b in table.items())
    assert sum(table.get(b) == a for a, b in table.items()) == 58


@pytest.mark.parametrize("kind", _perturb.KINDS)
def test_items_keep_their_answers_and_ids_and_repeat_themselves(kind):
    clusters = _cloze.clusters(prose(800)) if kind == "word_order" else _minimal_pairs.clusters(300)
    data = _choices.as_documents("minimal_pairs", [*clusters], 512)
    first, again = _perturb.perturbed(data, kind), _perturb.perturbed(data, kind)
    assert first == again and first.source == f"minimal_pairs with {kind}" and first.digest != data.digest
    before = dict(data.documents)
    for name, text in first.documents:
        for (prefix, *choices), (new, *same) in zip(json.loads(before[name]), json.loads(text), strict=True):
            assert choices == same and new != prefix
    least = 0.02 if kind == "synonyms" else 0.8  # few of these sentences hold a word of the list
    assert len(first.documents) > least * len(data.documents) > 2


def test_two_perturbations_of_one_document_are_drawn_apart():
    prefix = "The teacher near the doctors noticed the wooden clock"
    data = _choices.as_documents("s", [_choices.Cluster(str(i), "g", (_choices.Item(prefix, (" a", " b")),))
                                       for i in range(40)], 512)  # fmt: skip
    assert len({text for _, text in _perturb.perturbed(data, "typos").documents}) > 20


# --- fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"perturb": ["typo"]}, r"unknown perturbation 'typo'; did you mean typos"),
        ({"perturb": []}, "at least 1 item"),
        ({"perturb": ["typos", "typos"]}, "listed twice"),
        ({"tasks": ["lm_eval:piqa"]}, "only items made here can be perturbed"),
        ({"tasks": ["minimal_pairs"], "perturb": ["word_order"]}, "ungrammatical"),
        ({"task_path": "x"}, "task_path"),
        ({"max_drop": 0}, "max_drop"),
    ],
)
def test_fields_that_would_decide_nothing_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        Robustness(**{"max_drop": 3.0, **fields})


def test_each_perturbation_of_each_task_is_a_source_and_plan_knows_its_power():
    data = prose(300)
    check = Robustness(max_drop=3.0, tasks=["cloze", "minimal_pairs"], perturb=["typos", "casing"])
    names = [d.source for d in check.sources([data])]
    assert names == [
        f"{task} with {kind}" for task in ("cloze: prose", "minimal_pairs") for kind in ("typos", "casing")
    ]
    powers = plan._powers([check], 1, [data])
    assert [p["source"] for p in powers] == names and all(p["lossless"] > 1000 for p in powers)
    with pytest.raises(RecipeError, match="robustness has no task 'lm_eval:piqa'"):
        _without_margin("robustness:lm_eval:piqa").sources([data])


# --- the gate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline():
    return tiny_model(0)


@pytest.fixture(scope="module")
def own(baseline):
    """A check whose items, once in capitals, are those that the baseline answers rightly."""
    clusters = made("liked", baseline, 400)
    capitals = _perturb.perturbed(_choices.as_documents("minimal_pairs", clusters, 512), "casing")
    pairs = []
    for name, text in capitals.documents:
        items = [*_choices.sequences(text, baseline.encode, 512)]
        right = [scores[0] > scores[1] for scores in _choices.log_probabilities(baseline, items)]
        rows = [row if ok else [row[0], row[2], row[1]] for row, ok in zip(json.loads(text), right, strict=True)]
        pairs.append((name, json.dumps(rows)))

    class Own(Robustness):
        def sources(self, datasets):
            return [type(capitals)(capitals.source, pairs, capitals.digest, capitals.length)]

    return Own(max_drop=3.0, tasks=["minimal_pairs"], perturb=["casing"])


def test_a_worse_model_fails_on_the_same_perturbed_items_and_a_twin_passes(baseline, own):
    (worse,) = Gate((own,)).evaluate(tiny_model(7), baseline, []).checks
    assert worse.verdict == "FAIL" and worse.source == "minimal_pairs with casing"
    assert worse.details["right to wrong"] > 10 and worse.reference == 1
    (same,) = Gate((own,)).evaluate(tiny_model(0), baseline, []).checks
    assert same.verdict == "PASS" and same.loss == 0


def test_a_planted_loss_is_seen(baseline, own):
    ((found,),) = assay.examine([own.model_copy(update={"max_drop": 10.0})], baseline, [])
    assert found.verdict == "SEEN", found
