import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from evaluators.divergence import Divergence
from evaluators.perplexity import Perplexity
from tests.tiny import documents, perturbed, tiny_model


@pytest.fixture(scope="module")
def models():
    reference = tiny_model()
    return reference, perturbed(reference, 0.3)


def test_divergence_equals_its_definition_in_a_plain_loop(models):
    reference, model = models
    evaluator = Divergence(max_mean=0.08)
    examples = evaluator.examples(documents(12, length=32), model.encode)
    scores = evaluator.score(model, examples, reference)
    values = []
    for example, score in zip(examples, scores, strict=True):
        kl, agree = [], 0
        for window in example.payload:
            with torch.no_grad():
                p, q = (m.module(input_ids=torch.tensor([window])).logits[0, :-1].double() for m in (reference, model))
            kl += (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).tolist()
            agree += (p.argmax(1) == q.argmax(1)).sum().item()
        assert score.id == example.id
        assert score.weight == len(kl) == len(score.positions)
        assert score.total == pytest.approx(sum(kl), rel=1e-4)
        assert score.extra["top1"] == agree
        assert np.allclose(score.positions, kl, atol=1e-5)
        values += kl
    assert evaluator.value(scores) == pytest.approx(np.mean(values), rel=1e-4)
    details = evaluator.details(scores)
    for name, q in (("p50", 50), ("p90", 90), ("p99", 99), ("p999", 99.9)):
        assert details[name] == pytest.approx(np.percentile(values, q), rel=1e-3)
    assert details["p50"] < details["p90"] < details["p99"] < details["p999"]
    assert details["top1"] == pytest.approx(sum(s.extra["top1"] for s in scores) / len(values))
    assert 0 < details["js"] < details["p999"]


def test_windows_are_those_of_perplexity(models):
    data, encode = documents(5), models[0].encode
    assert Divergence(max_mean=1).examples(data, encode) == Perplexity(max_increase=1).examples(data, encode)


def test_a_model_does_not_diverge_from_itself(models):
    evaluator = Divergence(max_mean=0.08)
    examples = evaluator.examples(documents(5), models[0].encode)
    scores = evaluator.score(tiny_model(), examples, models[0])
    assert [s.total for s in scores] == [0.0] * 5
    assert evaluator.details(scores)["top1"] == 1.0


def test_nan_on_either_side_is_seen(models):
    reference, _ = models
    broken = perturbed(reference, math.nan)
    evaluator = Divergence(max_mean=0.08)
    examples = evaluator.examples(documents(3), reference.encode)
    for pair in ((broken, reference), (reference, broken)):
        assert all(math.isnan(s.total) for s in evaluator.score(pair[0], examples, pair[1]))


def test_a_reference_is_needed(models):
    with pytest.raises(TypeError, match="reference"):
        Divergence(max_mean=0.08).score(models[0], [])


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "0.08", None])
def test_senseless_margins_are_refused(value):
    with pytest.raises(ValidationError):
        Divergence(max_mean=value)


def test_a_hundred_documents_are_needed():
    assert Divergence(max_mean=0.08).margin == 0.08
    with pytest.raises(ValidationError, match="at least 100 documents"):
        Divergence(max_mean=0.08, max_documents=99)
