"""Checks of a model with a classification head: scores by hand, planted losses, and the gate over both."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from compress import assay, noise
from compress.classifier import Classifier
from compress.errors import RecipeError
from compress.gate import Gate
from compress.interfaces import Documents
from evaluators import _head
from evaluators.classification import Classification
from evaluators.label_divergence import LabelDivergence
from tests.tiny_classifier import labelled, learned, tiny_classifier, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = labelled(300, seed=3)


@pytest.fixture(scope="module")
def model() -> Classifier:
    return learned()


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Classification:
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    return Classification(data=f"file:{path}", max_drop=5.0)


TEXTS = Documents("texts", [(row["id"], row["text"]) for row in ROWS], "texts", 48)


def harmed(model: Classifier, noise: float) -> Classifier:
    """A copy whose word embedding has relative Gaussian noise."""
    twin = Classifier(copy.deepcopy(model.module), model.tokenizer)
    weight = twin.parameter(twin.facts.embedding_tensor)
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std() * noise)
    twin.touch()
    return twin


def test_probabilities_are_those_of_the_head(model: Classifier, check: Classification) -> None:
    (data,) = check.sources([])
    examples = check.examples(data, check.encoder(model))
    texts = {row["id"]: row for row in ROWS}
    for example, score in zip(examples[:40], check.score(model, examples[:40]), strict=True):
        row = texts[example.id]
        with torch.no_grad():
            wanted = model.module(**model.tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(0)
        assert score.positions == pytest.approx(wanted.tolist(), abs=1e-5)
        assert score.total == float(int(wanted.argmax()) != ["bad", "good"].index(row["label"]))
        brier = check.model_copy(update={"metric": "brier"}).score(model, [example])[0].total
        assert brier == pytest.approx(float(wanted[["good", "bad"].index(row["label"])]) ** 2, abs=1e-5)


def test_labels_may_be_names_or_numbers_in_any_order(model: Classifier, tmp_path: Path) -> None:
    rows = [{**row, "label": {"bad": "no", "good": "yes"}[row["label"]]} for row in ROWS[:60]]
    data = f"file:{write_rows(tmp_path / 'rows.jsonl', rows)}"
    totals = []
    for labels in ({"yes": "good", "no": "bad"}, {"no": "0", "yes": "1"}):
        named = Classification(data=data, labels=labels, max_drop=5.0)
        named.check_labels(model.labels)
        examples = named.examples(named.sources([])[0], named.encoder(model))
        scores = named.score(model, examples)
        totals.append([s.total for s in scores])
        assert [list(labels)[int(s.extra["label"])] for s in scores] == [
            {row["id"]: row["label"] for row in rows}[e.id] for e in examples
        ]
    assert totals[0] == totals[1] and sum(totals[0]) < 3
    third = Classification(data=data, max_drop=5.0)  # labels of the data that the head does not know
    with pytest.raises(RecipeError, match="'no' is no class of the model; it has bad, good"):
        third.examples(third.sources([])[0], third.encoder(model))
    with pytest.raises(RecipeError, match="expected each class of the model once"):
        _head.places(("bad", "good", "mixed"), ["good", "bad"])


def test_noise_fails_and_a_twin_passes(model: Classifier, check: Classification) -> None:
    (found,) = Gate((check,)).evaluate(harmed(model, 5.0), model, []).checks
    assert found.verdict == "FAIL" and found.reference > 0.97 and found.loss > 0.1
    assert found.details["reference's macro F1"] > found.details["macro F1"]
    assert found.details["right to wrong"] - found.details["wrong to right"] == round(found.loss * found.examples)
    sample = found.samples[0]
    assert {sample.reference, sample.model} == {"bad", "good"} and sample.prompt.startswith("[CLS]")
    (same,) = Gate((check,)).evaluate(Classifier(copy.deepcopy(model.module), model.tokenizer), model, []).checks
    assert same.verdict == "PASS" and same.loss == 0


def test_divergence_of_labels_equals_its_definition(model: Classifier) -> None:
    other = harmed(model, 0.5)
    evaluator = LabelDivergence(max_mean=0.05)
    scores = evaluator.score(other, evaluator.examples(TEXTS, model.encode), model)
    for (_, text), score in zip(TEXTS.documents, scores, strict=True):
        inputs = model.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            p, q = (m.module(**inputs).logits[0].double() for m in (model, other))
        kl = (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()
        assert score.total == pytest.approx(float(kl), abs=1e-5) and score.weight == 1
        assert score.extra["top1"] == float(p.argmax() == q.argmax())
    assert 0 < evaluator.value(scores) and 0 < evaluator.details(scores)["js"] < math.log(2)
    near, far = (Gate((evaluator,)).evaluate(harmed(model, n), model, [TEXTS]).verdict for n in (0.001, 5.0))
    assert (near, far) == ("PASS", "FAIL")


def test_planted_losses_are_seen_and_the_noise_is_below_them(model: Classifier, check: Classification) -> None:
    checks = [check, LabelDivergence(max_mean=0.02)]
    for (found,) in assay.examine(checks, model, [TEXTS]):
        assert found.verdict == "SEEN", found
        assert found.margin < found.planted and found.measured == pytest.approx(found.planted, rel=1e-3)
    for (floor,) in noise.measure(checks, model, [TEXTS]):
        assert floor.floor < 1e-5


def test_a_check_that_ignores_the_model_is_caught(model: Classifier) -> None:
    class Deaf(LabelDivergence):
        def score(self, model, batch, reference=None):  # type: ignore[no-untyped-def]
            return super().score(reference, batch, reference)

    (found,) = assay.examine([Deaf(max_mean=0.02)], model, [TEXTS])[0]
    assert found.verdict == "MISSED"


def test_three_classes_and_windows_of_other_lengths_run_together() -> None:
    model = tiny_classifier("roberta")
    windows = [model.encode(row["text"]) for row in ROWS[:30]]
    alone = [next(model.logits([window])) for window in windows]
    for one, row in zip(alone, model.logits(windows), strict=True):
        torch.testing.assert_close(row, one, atol=1e-5, rtol=0)
