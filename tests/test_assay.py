"""Planted losses: evaluators that are blind in some way are caught, correct ones are not."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.assay import Assay, examine, settings
from compress.gate import Gate
from compress.interfaces import Example, Score
from compress.model import Model
from compress.numerics.divergence import token_nll
from compress.planting import Planted, forgetting, sharpening
from compress.scoring import Memo
from evaluators._choices import Cluster, Item, as_documents
from evaluators._windows import flatten
from evaluators.accuracy import Accuracy
from evaluators.divergence import Divergence
from evaluators.footprint import Footprint
from evaluators.perplexity import Perplexity
from tests.tiny import WORDS, documents, perturbed, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = documents(130)


@pytest.fixture(scope="module")
def guessing():
    """Random weights: worse than guessing."""
    return tiny_model()


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learned to spell the words of the documents."""
    model = tiny_model()
    windows = [model.encode(text)[:32] for _, text in documents(400, seed=1).documents]
    batch = torch.tensor([w for w in windows if len(w) == 32])
    optimizer = torch.optim.Adam(model.module.parameters(), 0.01)
    for step in range(60):
        rows = batch[(step * 16) % 256 :][:16]
        loss = model.module(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2.5  # nats; guessing is 5.5
    model.touch()
    return model


def assay(check, model, data=DATA, **options) -> Assay:
    ((found,),) = examine([check], model, [data], **options)
    return found


# --- what is planted ---------------------------------------------------------------------------------------


def scored(check, model, reference, data):
    """Loss per token by the evaluator's own account, the slow way."""
    batch = check.examples(data, reference.encode)
    new = check.score(model, batch, reference)
    old = 0.0 if check.relative else sum(s.total for s in check.score(reference, batch))
    return (sum(s.total for s in new) - old) / sum(s.weight for s in new)


@pytest.mark.parametrize("which", ["guessing", "trained"])
def test_sharpening_makes_the_losses_asked_for(which, request):
    model = request.getfixturevalue(which)
    wanted = [("nll", 0.0512), ("kl", 0.084), ("nll", 0.3), ("kl", 0.01)]
    for (kind, loss), found in zip(wanted, sharpening(model, DATA, wanted), strict=True):
        check = Perplexity(max_increase="5%") if kind == "nll" else Divergence(max_mean=0.08)
        planted = found.model(model)
        assert scored(check, planted, model, DATA) == pytest.approx(loss, rel=0.02)  # interpolation
        assert planted.digest not in (model.digest, sharpening(model, DATA, [("nll", 0.2)])[0].model(model).digest)
        found.observe(model, DATA.documents, DATA.length)
        assert found.loss() == pytest.approx(scored(check, planted, model, DATA), rel=1e-4)


def test_a_planted_model_is_a_language_model(trained):
    flipped = Planted(trained, "negated", lambda window, rows: -rows)
    window = tuple(trained.encode("the token"))
    torch.testing.assert_close(flipped.decode_logits(window), -trained.decode_logits(window))
    torch.testing.assert_close(next(flipped.logits([window])), -next(trained.logits([window])))
    (sharp,) = sharpening(trained, DATA, [("nll", 0.1)])
    assert sharp.model(trained).generate(window, 8) == trained.generate(window, 8)  # order of tokens is unchanged
    assert flipped.generate(window, 8) != trained.generate(window, 8)
    assert flipped.runtime == trained.runtime and flipped.encode("a") == trained.encode("a")


def items(n, wrong=()):
    """Clusters of one item with three choices over tokens, and their scores."""
    examples = [Example(f"{i}/0", f"{i}", ((1, i, 7, 2), (1, i, 8), (1, i, 9, 3))) for i in range(n)]
    return examples, [Score(e.id, float(i in wrong), 1.0) for i, e in enumerate(examples)]


def test_forgetting_takes_just_enough_right_answers_and_spreads_them():
    examples, scores = items(100, wrong=range(0, 100, 2))
    found = forgetting(examples, scores, 0.0315)
    assert found.loss() == 0.04 and sum(found.lost.values()) == 4  # the least multiple of 1/100 beyond it
    contexts = [context for context, _ in found.first_tokens]
    assert all(len(c) == 2 and c[1] % 2 == 1 for c in contexts)  # right ones only
    assert {token for _, token in found.first_tokens} == {7}
    assert max(np.diff([c[1] for c in contexts])) < 40
    assert forgetting(examples, scores, 0.5) is None
    inseparable = [replace(e, payload=((1, 2), (1, 2, 3))) for e in examples]
    assert forgetting(inseparable, scores, 0.0315) is None


def test_what_cannot_be_forgotten_is_passed_over_and_what_else_turns_is_counted():
    def cluster(name, *payloads):
        return [Example(f"{name}/{i}", name, payload) for i, payload in enumerate(payloads)]

    mirrored = cluster("mirrored", ((1, 5, 2), (1, 6, 2)), ((1, 6), (1, 5)))  # each is the other's right choice
    plain = [e for i in range(8) for e in cluster(f"plain {i}", ((2, i, 5), (2, i, 6)))]
    further = cluster("further", ((2, 0, 6), (2, 0, 5)))  # right where "plain 0" is wrong, in one context
    scores = [Score(e.id, 0.0, 1.0) for e in (*mirrored, *plain, *further)]
    found = forgetting([*mirrored, *plain, *further], scores, 0.75)
    assert {name for name, lost in found.lost.items() if lost} == {f"plain {i}" for i in range(8)}
    assert found.loss() == 0.8
    assert forgetting(mirrored, scores[:2], 0.1) is None
    wrong = [*scores[:-1], Score(further[0].id, 1.0, 1.0)]  # what beat it becomes impossible: it turns right
    assert forgetting([*mirrored, *plain, *further], wrong, 0.75).lost["further"] == -1.0


# --- correct evaluators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["guessing", "trained"])
@pytest.mark.parametrize(
    "check",
    [
        Perplexity(max_increase="5%"),
        Perplexity(max_increase="1%"),
        Perplexity(max_increase="80%"),
        Divergence(max_mean=0.08),
    ],
)
def test_correct_evaluators_see_a_planted_loss(which, check, request):
    found = assay(check, request.getfixturevalue(which))
    assert (found.verdict, found.reason, found.examples) == ("SEEN", "", 100)
    assert 1.02 * check.margin < found.planted < 1.08 * check.margin
    assert found.measured == pytest.approx(found.planted, rel=1e-3)


class Spelling(Accuracy):
    """The end of a word against that of another word and against a jumble: easy for whoever has learned the words."""

    def sources(self, datasets):
        rng = random.Random(0)
        clusters = []
        for i in range(180):
            word, other = rng.sample([w for w in WORDS if len(w) > 4], 2)
            lead = " ".join(rng.choices(WORDS, k=3)) + f" {word[:2]}"
            jumbled = "".join(rng.sample("qxzjv", 3))
            choices = (word[2:], jumbled, f"{jumbled}{other[2:]}")
            clusters.append(Cluster(f"{i}", "spelling", (Item(lead, choices),)))
        return [as_documents("minimal_pairs", clusters, 64)]


ANSWERS = Spelling(tasks=("minimal_pairs",), max_drop=3.0)


@pytest.mark.parametrize("check", [Perplexity(max_increase="5%"), Divergence(max_mean=0.08)])
def test_a_baseline_of_bfloat16_products_is_no_obstacle(check, trained):
    store = {}
    coarse = Model(trained.module, trained.tokenizer, "bfloat16")
    found = assay(check, coarse, cache=Cache(store))
    assert found.verdict == "SEEN" and found.measured == pytest.approx(found.planted, rel=1e-3)
    assert bool(store) == (not check.relative)
    assert assay(check, coarse, cache=Cache(store)) == found  # reference scores from the cache


class Cache:
    """Keeps scores in a dict, through JSON as files would."""

    def __init__(self, kept):
        self.kept = kept

    def get(self, key):
        return json.loads(self.kept[key]) if key in self.kept else None

    def put(self, key, value):
        self.kept[key] = json.dumps(value, allow_nan=False)


def test_a_correct_evaluator_sees_forgotten_answers(trained):
    found = assay(ANSWERS, trained)
    assert (found.verdict, found.reason, found.source) == ("SEEN", "", "minimal_pairs")
    assert found.measured == found.planted == 0.04  # 3.15 % of 100 clusters, rounded up
    assert found.examples == 100


def test_answers_of_a_baseline_that_guesses_are_left_to_the_gate(guessing):
    found = assay(ANSWERS, guessing)
    assert found.verdict == "UNTESTED" and "not proven to exceed" in found.reason
    gate = Gate((ANSWERS,)).evaluate(perturbed(guessing, 0.01), guessing, [DATA])
    assert gate.verdict == "INVALID"


# --- evaluators that are blind -----------------------------------------------------------------------------


class Deaf(Perplexity):
    """Ignores the model: scores by the length of the text."""

    def score(self, model, batch, reference=None):
        return [Score(e.id, float(sum(map(len, e.payload))) + 0.01 * i, len(e.payload[0])) for i, e in enumerate(batch)]


class OffByOne(Perplexity):
    """Scores each row against the token it has read instead of the one it predicts."""

    def score(self, model, batch, reference=None):
        logits = model.logits(flatten(model, batch))
        nll = [[token_nll(next(logits)[1:], torch.tensor(w[1:])) for w in e.payload] for e in batch]
        return [Score(e.id, sum(x.sum().item() for x in n), sum(map(len, n))) for e, n in zip(batch, nll, strict=True)]


class LastToken(Perplexity):
    """Scores the last position of each window alone."""

    def score(self, model, batch, reference=None):
        logits = model.logits(flatten(model, batch))
        nll = [[token_nll(next(logits)[-2:-1], torch.tensor(w[-1:])) for w in e.payload] for e in batch]
        return [Score(e.id, sum(x.sum().item() for x in n), sum(map(len, n))) for e, n in zip(batch, nll, strict=True)]


class Unnormalized(Perplexity):
    """Takes the target's logit for its log-probability."""

    def score(self, model, batch, reference=None):
        logits = model.logits(flatten(model, batch))
        x = [[-next(logits)[range(len(w) - 1), list(w[1:])].double() for w in e.payload] for e in batch]
        return [Score(e.id, sum(v.sum().item() for v in n), sum(map(len, n))) for e, n in zip(batch, x, strict=True)]


class Remembering(Perplexity):
    """Returns the scores of the first model that it was shown, whichever is asked for."""

    def score(self, model, batch, reference=None):
        while isinstance(model, Planted | Memo):
            model = model.inner
        return super().score(model, batch)


class Backwards(Divergence):
    """KL(model‖reference) in place of KL(reference‖model)."""

    def score(self, model, batch, reference=None):
        return super().score(reference, batch, model)


class Selfish(Divergence):
    """Compares the reference with itself, nearly."""

    def score(self, model, batch, reference=None):
        return [replace(s, total=1e-4 * i) for i, s in enumerate(super().score(reference, batch, reference))]


class Halved(Divergence):
    """Counts every token twice."""

    def score(self, model, batch, reference=None):
        return [replace(s, weight=2 * s.weight) for s in super().score(model, batch, reference)]


BLIND = [
    *[kind(max_increase="5%") for kind in (Deaf, OffByOne, LastToken, Unnormalized, Remembering)],
    *[kind(max_mean=0.08) for kind in (Backwards, Selfish, Halved)],
]


@pytest.mark.parametrize("check", BLIND, ids=lambda check: type(check).__name__)
def test_blind_evaluators_are_caught(check, trained):
    found = assay(check, trained)
    assert found.verdict == "MISSED"
    assert "was planted in the baseline" in found.reason


def test_without_the_assay_a_blind_evaluator_passes_a_ruined_model(trained):
    """What the assay is for: the blind verdict is wrong, and nothing in the scores themselves shows it."""
    ruined, right, blind = perturbed(trained, 1.0), Divergence(max_mean=0.08), Selfish(max_mean=0.08)
    assert Gate((right,)).evaluate(ruined, trained, [DATA]).verdict == "FAIL"
    assert Gate((blind,)).evaluate(ruined, trained, [DATA]).verdict == "PASS"


class Certain(Spelling):
    """Finds every answer right."""

    def score(self, model, batch, reference=None):
        return [replace(s, total=0.0) for s in super().score(model, batch)]


class Stubborn(Spelling):
    """Asks the baseline for the model's answers."""

    def score(self, model, batch, reference=None):
        while isinstance(model, Planted | Memo):
            model = model.inner
        return super().score(model, batch)


@pytest.mark.parametrize("kind", [Certain, Stubborn])
def test_blind_answers_are_caught(kind, trained):
    found = assay(kind(tasks=("minimal_pairs",), max_drop=3.0), trained)
    assert (found.verdict, found.measured) == ("MISSED", 0.0) and found.planted == 0.04
    assert "measures 0" in found.reason


# --- what cannot be planted, and cost ----------------------------------------------------------------------


class Foreign(Perplexity):
    """A metric that the assay knows nothing about."""

    planted = None


def test_what_cannot_be_tested_is_said(trained):
    found = assay(Foreign(max_increase="5%"), trained)
    assert found.verdict == "UNTESTED" and "no loss is known" in found.reason
    few = assay(Perplexity(max_increase="5%"), trained, documents(49))
    assert few.verdict == "UNTESTED" and few.reason == "49 documents, and at least 50 are needed"
    assert examine([Footprint(max_mb=80)], trained, [DATA]) == [[]]


def test_a_margin_below_what_float32_resolves_is_not_trusted(trained):
    found = assay(Divergence(max_mean=1e-9), trained)
    assert found.verdict == "MISSED" and "below what float32 logits resolve" in found.reason


def test_a_baseline_without_numbers_is_not_trusted(trained):
    found = assay(Perplexity(max_increase="5%"), perturbed(trained, math.nan))
    assert found.verdict == "MISSED"
    assert Assay.model_validate_json(found.model_dump_json()).reason == found.reason


def test_all_checks_of_a_source_share_two_passes(trained):
    rows = []
    handle = trained.module.get_output_embeddings().register_forward_hook(lambda *seen: rows.append(len(seen[-1])))
    checks = [Perplexity(max_increase="5%"), Perplexity(max_increase="10%"), Divergence(max_mean=0.08)]
    found = examine(checks, trained, [DATA])
    handle.remove()
    examples = checks[0].examples(DATA, trained.encode)[:100]
    assert sum(rows) == 2 * sum(len(window) for e in examples for window in e.payload)
    assert [a.verdict for (a,) in found] == ["SEEN"] * 3
    assert found[0] == examine(checks[:1], trained, [DATA])[0]


def test_a_check_of_few_documents_is_tested_on_as_many_as_any_other(trained):
    found = assay(Perplexity(max_increase="5%", max_documents=60), trained)
    assert found == assay(Perplexity(max_increase="5%"), trained)


def test_settings_hold_what_an_assay_depends_on():
    one = Perplexity(max_increase="5%")
    assert settings(one) == settings(Perplexity(max_increase="5%", against="parent", confidence=0.9, max_documents=60))
    assert settings(one) != settings(Perplexity(max_increase="6%"))
    assert settings(one) != settings(Divergence(max_mean=0.05))


def test_a_distrusted_check_is_invalid_and_costs_nothing(trained):
    checks = (Perplexity(max_increase="5%"), Divergence(max_mean=0.08))
    result = Gate(checks).evaluate(
        perturbed(trained, 0.01), trained, [DATA], distrust=lambda c, source: f"{c.name} of {source}" * (c is checks[0])
    )
    assert [(c.verdict, c.examples > 0) for c in result.checks] == [("INVALID", False), ("PASS", True)]
    assert result.verdict == "INVALID" and "Invalid here: perplexity of words." in result.checks[0].definition
