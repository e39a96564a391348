import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compress.errors import GateInconclusive, RecipeError
from compress.gate import Gate
from compress.interfaces import Documents, Score
from compress.measure import _limited, _without_margin, evaluate, measure
from evaluators import _choices, _facts
from evaluators._choices import Cluster, Item
from evaluators.accuracy import TASKS, Accuracy
from tests.evaluators.test_items import prose
from tests.tiny import WORDS, documents, perturbed, tiny_model

CHECK = Accuracy(max_drop=3.0)


@pytest.fixture(scope="module")
def baseline():
    return tiny_model(0)


@pytest.fixture(scope="module")
def liked(baseline):
    """Clusters of two items whose right answer is what the baseline prefers: it is right on all of them."""
    return made("liked", baseline, 1200)


def made(group, model, count, seed=0, flipped=False):
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prefix = " ".join(rng.choices(WORDS, k=3))
        items = [Item(prefix, tuple(f" {word}." for word in rng.sample(WORDS, 2))) for _ in range(2)]
        found.append(Cluster(str(number), group, tuple(items)))
    tokens = [[t for i in c.items for t in one(i, model)] for c in found]
    scores = _choices.log_probabilities(model, [t for cluster in tokens for t in cluster])
    pairs = iter(scores)
    return [replace(c, items=tuple(ordered(i, next(pairs), flipped) for i in c.items)) for c in found]


def one(item, model):
    return list(_choices.sequences(json.dumps([[item.prefix, *item.choices]]), model.encode, 512))


def ordered(item, scores, flipped):
    better_first = (scores[0] > scores[1]) != flipped
    return item if better_first else replace(item, choices=item.choices[::-1])


def sources_of(*clusters, source="minimal_pairs"):
    class Own(Accuracy):
        def sources(self, datasets):
            return [_choices.as_documents(source, [c for part in clusters for c in part], 512)]

    return Own(max_drop=3.0)


def judge(check, model, baseline, **more):
    (result,) = Gate((check,)).evaluate(model, baseline, [], **more).checks
    return result


# --- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [math.nan, math.inf, 0, -1, 50.1, "3%", True, None])
def test_senseless_margins_are_refused(drop):
    with pytest.raises(ValidationError):
        Accuracy(max_drop=drop)


@pytest.mark.parametrize(
    ("tasks", "drop"), [(["minimal_pairs"], 17), (["cloze", "minimal_pairs"], 20), (["cloze"], 33)]
)
def test_margins_that_no_baseline_can_exceed_chance_by_three_times_are_refused(tasks, drop):
    with pytest.raises(ValidationError, match="no baseline exceeds chance on"):
        Accuracy(tasks=tasks, max_drop=drop)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        (["minimal_pair"], "unknown task 'minimal_pair'; did you mean minimal_pairs?"),
        (["hellaswag"], "known: cloze, facts, lm_eval:NAME, minimal_pairs"),
        (["lm_eval:"], "unknown task 'lm_eval:'"),
        ([], "at least 1 item"),
        (["cloze", "cloze"], "a task is listed twice"),
    ],
)
def test_senseless_tasks_are_refused(tasks, reason):
    with pytest.raises(ValidationError, match=reason.replace("?", r"\?")):
        Accuracy(tasks=tasks, max_drop=3.0)


def test_too_few_clusters_to_ever_decide_are_refused():
    with pytest.raises(ValidationError, match="max_documents=49 can never decide"):
        Accuracy(max_drop=3.0, max_documents=49)


def test_a_recipe_forbids_any_loss_and_bounds_gains_in_points():
    asked = Accuracy(max_drop=3.0, no_regression=True, max_gain=20)
    assert asked.forbids_any_loss and asked.plausible_gain == pytest.approx(0.2)
    assert not Accuracy(max_drop=3.0).forbids_any_loss
    assert {"no_regression", "max_gain"} <= asked.margin_fields  # neither moves a score


def test_the_margin_is_a_fraction_and_is_shown_in_points():
    assert CHECK.margin == pytest.approx(0.03)
    assert (CHECK.display(0.03), CHECK.display(-0.001), CHECK.display(0.0)) == (
        "-3.00 points",
        "+0.10 points",
        "+0.00 points",
    )


# --- scores ------------------------------------------------------------------------------------------------


def plain_log_probability(model, tokens, start):
    rows = torch.log_softmax(next(model.logits([list(tokens)])).double(), 1)
    return sum(rows[t - 1, tokens[t]].item() for t in range(start, len(tokens)))


def test_log_probabilities_are_those_of_whole_sequences_token_by_token(baseline):
    words = ("The cat", "The cart is", "The cat sat", "The dog")
    item = tuple(tuple(baseline.encode(w)) for w in words)
    other = tuple(tuple(baseline.encode(w)) for w in ("ab", "ac", "ad"))
    found = _choices.log_probabilities(baseline, [item, other])
    assert [len(f) for f in found] == [4, 3]
    for tokens, score in zip(item, found[0]):
        assert score == pytest.approx(plain_log_probability(baseline, tokens, 4), abs=1e-4)
    for tokens, score in zip(other, found[1]):
        assert score == pytest.approx(plain_log_probability(baseline, tokens, 1), abs=1e-4)


def test_choices_of_one_token_share_a_window():
    assert _choices._windows([(1, 2, 3), (1, 2, 4), (1, 2, 5)]) == [(1, 2)]
    assert _choices._windows([(1, 2, 3, 9), (1, 2, 4)]) == [(1, 2, 3)]
    assert _choices._windows([(1, 2, 3, 9), (1, 2, 4, 9)]) == [(1, 2, 3), (1, 2, 4)]


def test_long_prefixes_are_cut_from_the_left_and_no_common_token_is_an_error(baseline):
    text = json.dumps([["abcdef", "gh", "ij"]])
    (cut,) = _choices.sequences(text, baseline.encode, 4)
    assert cut == tuple(tuple(baseline.encode(w)) for w in ("efgh", "efij"))
    with pytest.raises(RecipeError, match="share no token; give them a longer prefix"):
        list(_choices.sequences(json.dumps([["", "ab", "cd"]]), baseline.encode, 10))


def test_items_beyond_the_context_are_refused(baseline):
    long = tuple(range(100)) + tuple(range(100))
    with pytest.raises(RecipeError, match="exceed the context of 128"):
        _choices.log_probabilities(baseline, [((*long, 1), (*long, 2))])


def test_scores_are_wrong_answers_and_nan_stays_nan(baseline):
    good, bad = made("a", baseline, 3), made("b", baseline, 3, flipped=True)
    data = _choices.as_documents("minimal_pairs", good + bad, 512)
    scores = CHECK.score(baseline, CHECK.examples(data, baseline.encode))
    assert [s.total for s in scores] == [0.0] * 6 + [1.0] * 6
    assert all((s.extra["lead"] > 0) == (s.total == 0) for s in scores)
    assert [s.extra["chosen"] for s in scores] == [0.0] * 6 + [1.0] * 6
    assert CHECK.value(scores) == 0.5
    broken = perturbed(baseline, 0.0)
    with torch.no_grad():
        broken.parameter("lm_head.weight").fill_(math.nan)
    assert all(math.isnan(s.total) for s in CHECK.score(broken, CHECK.examples(data, baseline.encode)))


def test_a_tie_is_wrong(baseline):
    data = Documents("minimal_pairs", [("a:0", json.dumps([["the", " cat", " cat"]]))], "d")
    (score,) = CHECK.score(baseline, CHECK.examples(data, baseline.encode))
    assert (score.total, score.extra["chosen"]) == (1.0, 1.0)


# --- what counts -------------------------------------------------------------------------------------------


def asked_of(rates):
    """A data set of one-item clusters per group, and a reference that is right at the given rates."""
    pairs = [(f"{g}:{i}", json.dumps([["x", "a", "b"]])) for i in range(100) for g in rates]
    seen = []

    def reference(part):
        seen.extend(part.documents)
        place = Counter()
        scores = []
        for name, text in part.documents:
            group = _choices.group_of(name)
            place[group] += 1
            assert len(json.loads(text)) == 1
            scores.append(Score(f"{name}/0", float(place[group] > rates[group] * Accuracy.QUALIFYING), 1.0))
        return scores

    return Documents("minimal_pairs", pairs, "d"), reference, seen


def test_a_group_counts_where_the_reference_exceeds_chance_by_three_margins():
    data, reference, seen = asked_of({"good": 1.0, "enough": 24 / 32, "short": 23 / 32, "chance": 0.5})
    kept, figures = CHECK.comparable(data, reference)
    assert {_choices.group_of(name) for name, _ in kept.documents} == {"good", "enough"}
    assert len(kept.documents) == 2 * (100 - 32)
    assert not {name for name, _ in kept.documents} & {name for name, _ in seen}  # no cluster serves both
    assert len(seen) == 4 * 32
    assert figures == {
        "baseline on chance (not counted)": 0.5,
        "baseline on enough": 24 / 32,
        "baseline on good": 1.0,
        "baseline on short (not counted)": 23 / 32,
    }
    wider, _ = Accuracy(max_drop=5.0).comparable(data, reference)  # 0.65 is to be exceeded now
    assert {_choices.group_of(name) for name, _ in wider.documents} == {"good"}


def test_a_task_at_chance_is_invalid_and_says_why(baseline, liked):
    data, reference, _ = asked_of({"chance": 0.5})
    with pytest.raises(GateInconclusive, match=r"not proven to exceed 59% .* on anything: chance 50% of 32"):
        CHECK.comparable(data, reference)
    rng = random.Random(0)
    mixed = [rng.choice(pair) for pair in zip(liked, made("liked", baseline, 1200, flipped=True))]
    result = judge(sources_of(mixed), perturbed(baseline, 0.001), baseline)
    assert (result.verdict, result.examples) == ("INVALID", 0)
    assert "not proven to exceed 59%" in result.definition


def test_no_items_at_all_are_invalid(baseline):
    (result,) = (
        Gate((Accuracy(tasks=["cloze"], max_drop=3.0),))
        .evaluate(perturbed(baseline, 0.1), baseline, [Documents("blank", [("a", "one.")], "d")])
        .checks
    )
    assert (result.verdict, result.source) == ("INVALID", "cloze: blank")
    assert "there are no items" in result.definition
    found = Gate((Accuracy(tasks=["cloze"], max_drop=3.0),)).evaluate(perturbed(baseline, 0.1), baseline, [])
    assert found.verdict == "INVALID" and "no evaluation source" in found.checks[0].definition


# --- the gate ----------------------------------------------------------------------------------------------


def test_a_near_model_passes_and_stops_early(baseline, liked):
    result = judge(sources_of(liked), perturbed(baseline, 0.003), baseline)
    assert result.verdict == "PASS" and result.loss <= result.upper <= 0.03 == result.margin
    assert 400 < result.examples < 1000  # two items a cluster; no flip would take about 280 clusters
    assert result.reference == 1.0 and result.value == pytest.approx(1 - result.loss, abs=1e-12)
    assert result.details["wrong to right"] == 0  # there is nothing to gain
    assert result.details["right to wrong"] == pytest.approx(result.loss * result.examples)
    assert result.details["accuracy on liked"] == result.value
    assert result.details["baseline on liked"] == 1.0


def test_a_far_model_fails_early(baseline, liked):
    result = judge(sources_of(liked), perturbed(baseline, 3.0), baseline)
    assert result.verdict == "FAIL" and result.lower > 0.03
    assert result.examples < 400 and result.details["right to wrong"] > 20


def test_flips_are_counted_both_ways_and_the_loss_is_their_balance(baseline):
    half = [*made("good", baseline, 300), *made("good", baseline, 100, seed=5, flipped=True)]
    random.Random(0).shuffle(half)
    result = judge(sources_of(half), perturbed(baseline, 1.0), baseline)
    down, up = result.details["right to wrong"], result.details["wrong to right"]
    assert down > 0 and up > 0
    assert result.loss == pytest.approx((down - up) / result.examples, abs=1e-12)


class Memory(dict):
    """A cache of scores that went through JSON."""

    def put(self, key, value):
        self[key] = json.loads(json.dumps(value))


@pytest.mark.parametrize("cache", [None, Memory()])
def test_flips_are_shown_with_what_each_model_chose(baseline, cache):
    half = [*made("good", baseline, 300), *made("good", baseline, 100, seed=5, flipped=True)]
    half = [replace(c, id=str(i)) for i, c in enumerate(half)]
    random.Random(0).shuffle(half)
    far = perturbed(baseline, 1.0)
    for _ in range(2):  # the second time the reference's scores come from the cache
        result = judge(sources_of(half), far, baseline, cache=cache)
        notes = [s.note for s in result.samples]
        assert notes == ["right to wrong"] * 4 + ["wrong to right"] * 4
        items = {f"good:{c.id}/{i}": item for c in half for i, item in enumerate(c.items)}
        for sample in result.samples:
            (tokens,), item = one(items[sample.id], baseline), items[sample.id]
            texts = [sample.prompt + answer for answer in (sample.reference, sample.model)]
            right, wrong = (item.prefix + choice for choice in item.choices)
            assert texts == ([right, wrong] if sample.note == "right to wrong" else [wrong, right])
            for model, text in ((baseline, texts[0]), (far, texts[1])):
                scores = _choices.log_probabilities(model, [tokens])[0]
                assert baseline.decode(tokens[scores.index(max(scores))]) == text


def test_a_task_without_a_flip_shows_nothing(baseline, liked):
    result = judge(sources_of(liked), perturbed(baseline, 0.0001), baseline)
    assert result.details["right to wrong"] == 0 and result.samples == []


def test_the_same_weights_lose_nothing_and_other_weights_with_equal_scores_are_invalid(baseline, liked):
    twin = perturbed(baseline, 0.0)
    result = judge(sources_of(liked), twin, baseline)
    assert (result.verdict, result.loss, result.upper) == ("PASS", 0.0, 0.0)
    # bytes 128 and above occur in no item, so that their input embedding changes no score
    with torch.no_grad():
        row = baseline.encode("é")[0]
        twin.parameter("model.embed_tokens.weight")[row] += 1.0
    twin.touch()
    result = judge(sources_of(liked), twin, baseline)
    assert result.verdict == "INVALID" and "are equal, and the weights are not" in result.definition


def test_attempts_and_other_sources_make_it_stricter(baseline, liked):
    check, near = sources_of(liked), perturbed(baseline, 0.003)
    once, four = judge(check, near, baseline), judge(check, near, baseline, attempts=4)
    assert four.verdict == once.verdict == "PASS"
    assert four.examples > once.examples


def test_clusters_are_the_units(baseline):
    few = made("liked", baseline, 32 + 49)
    result = judge(sources_of(few), perturbed(baseline, 0.1), baseline)
    assert result.verdict == "INVALID" and "49 examples, and at least 50 are needed" in result.definition
    assert result.examples == 98


def test_chance_is_known_for_every_task():
    assert {name: task.chance for name, task in TASKS.items()} == {
        "minimal_pairs": 0.5,
        "cloze": 1 / 32,
        "facts": 1 / 8,
    }


def test_facts_are_many_distinct_and_draw_their_wrong_answers_among_their_kind():
    (data,) = Accuracy(tasks=["facts"], max_drop=3.0).sources([])
    groups = Counter(_choices.group_of(name) for name, _ in data.documents)
    assert groups == {"capitals": 108, "symbols": 66, "authors": 66}  # each with enough left beside those that qualify
    for name, text in data.documents:
        ((prefix, right, *wrong),) = json.loads(text)
        known = _facts.pairs(_choices.group_of(name))
        subject = name.split(":", 1)[1].replace("_", " ")
        assert right == f" {known[subject]}" and subject in prefix and len({right, *wrong}) == 8
        assert {w.strip() for w in wrong} <= set(known.values()) and known[subject] not in subject
    assert Accuracy(tasks=["facts"], max_drop=3.0).sources([]) == [data]
    assert [name for name, _ in data.documents] != sorted(name for name, _ in data.documents)


def test_cloze_runs_on_text(baseline):
    data = prose(400)
    check = Accuracy(tasks=["cloze"], max_drop=3.0)
    (items,) = check.sources([data])
    batch = check.examples(replace(items, documents=items.documents[:20]), baseline.encode)
    assert len(batch) == 20 and all(len(e.payload) == 32 for e in batch)
    scores = check.score(baseline, batch)
    for example, score in zip(batch, scores):
        start = _choices.start_of(example.payload)
        plain = [plain_log_probability(baseline, t, start) for t in example.payload]
        assert (score.total == 0) == (plain[0] > max(plain[1:]))


def test_documents_of_text_are_untouched_by_default():
    from evaluators.perplexity import Perplexity

    check, data = Perplexity(max_increase="5%"), documents(3)
    assert check.sources([data])[0] is data and check.comparable(data, lambda part: [])[0] is data


# --- eval --------------------------------------------------------------------------------------------------


def test_eval_names_tasks_and_reports_accuracy_with_an_interval_over_clusters(baseline):
    check = _without_margin("accuracy:minimal_pairs")
    (data,) = _limited(check.sources([prose(60)]), 40)
    found = measure(check, baseline, data, reference=perturbed(baseline, 1.0))
    assert (found.metric, found.source, found.examples) == ("accuracy", "minimal_pairs", 80)
    scores = check.score(baseline, check.examples(data, baseline.encode))
    means = [1 - (a.total + b.total) / 2 for a, b in zip(scores[::2], scores[1::2])]
    mean = sum(means) / 40
    error = (sum((x - mean) ** 2 for x in means) / 39 / 40) ** 0.5
    assert found.value == pytest.approx(mean)
    assert found.interval == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error))
    assert found.against["lower"] < found.against["loss"] < found.against["upper"]


@pytest.mark.parametrize(
    ("spec", "reason"), [("perplexity:minimal_pairs", "perplexity has no tasks"), ("acuracy", "did you mean accuracy")]
)
def test_eval_refuses_tasks_of_what_has_none(spec, reason):
    with pytest.raises(RecipeError, match=reason):
        _without_margin(spec)


def test_eval_without_a_task_measures_all():
    assert [d.source for d in _without_margin("accuracy").sources([prose(60)])] == ["minimal_pairs", "cloze: prose"]


def test_eval_has_no_windows_of_answers():
    with pytest.raises(RecipeError, match="accuracy asks for answers, not for windows of text"):
        evaluate("nowhere", ["accuracy:cloze"], windows=4)
