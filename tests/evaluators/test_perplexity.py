import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from compress.errors import RecipeError
from compress.interfaces import Documents, Score
from evaluators.perplexity import Perplexity
from tests.tiny import documents, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def plain_nll(model, windows):
    """Summed NLL and number of scored tokens, in a plain transformers loop."""
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        with torch.no_grad():
            loss = model.module(input_ids=ids, labels=ids).loss  # mean over len - 1 positions
        total, count = total + loss.item() * (len(window) - 1), count + len(window) - 1
    return total, count


def test_perplexity_equals_a_plain_transformers_loop(model):
    evaluator, data = Perplexity(max_increase=0.05), documents(20)
    examples = evaluator.examples(data, model.encode)
    scores = evaluator.score(model, examples)
    total, count = 0.0, 0
    for example, score in zip(examples, scores, strict=True):
        want, n = plain_nll(model, example.payload)
        assert (score.id, score.weight) == (example.id, n)
        assert score.total == pytest.approx(want, rel=1e-5)
        total, count = total + want, count + n
    assert evaluator.value(scores) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert evaluator.value(scores) > 2  # a model that knows the answer would be a leak of the target


def test_windows_never_cross_documents_and_lose_no_token(model):
    data = documents(10, length=16)
    for example, (name, text) in zip(Perplexity(max_increase=0.05).examples(data, model.encode), data.documents):
        tokens = model.encode(text)
        flat = [token for window in example.payload for token in window]
        assert example.id == name
        assert all(len(window) == 16 for window in example.payload[:-1])
        assert flat == tokens or (flat == tokens[:-1] and len(tokens) % 16 == 1)


def test_documents_of_fewer_than_two_tokens_are_dropped(model):
    data = Documents("s", [("empty", ""), ("one", "a"), ("two", "ab")], "d", 8)
    examples = Perplexity(max_increase=0.05).examples(data, model.encode)
    assert [(e.id, len(e.payload[0])) for e in examples] == [("two", 2)]


def test_a_window_beyond_the_context_is_refused(model):
    evaluator = Perplexity(max_increase=0.05)
    examples = evaluator.examples(Documents("s", [("long", "ab " * 100)], "d", 129), model.encode)
    with pytest.raises(RecipeError, match="129 tokens exceed the context of 128"):
        evaluator.score(model, examples)
    with pytest.raises(RecipeError, match="at least 2"):
        evaluator.examples(documents(2, length=1), model.encode)
    fits = evaluator.examples(Documents("s", [("long", "ab " * 100)], "d", 128), model.encode)
    assert evaluator.score(model, fits)[0].weight == 127 + 127 + 43


def test_nan_weights_give_nan_scores():
    broken = tiny_model()
    with torch.no_grad():
        broken.parameter("model.norm.weight")[3] = math.nan
    evaluator = Perplexity(max_increase=0.05)
    scores = evaluator.score(broken, evaluator.examples(documents(3), broken.encode))
    assert all(math.isnan(s.total) for s in scores)
    assert math.isnan(evaluator.value(scores))


@pytest.mark.parametrize(
    ("written", "fraction"),
    [
        ("5%", 0.05),
        ("5 %", 0.05),
        (" 0.5%", 0.005),
        ("150%", 1.5),
        (0.05, 0.05),
        (1, 1.0),
        (1.0, 1.0),
        ("1000%", 10.0),
    ],
)
def test_margins_as_people_write_them(written, fraction):
    evaluator = Perplexity(max_increase=written)
    assert evaluator.max_increase == fraction
    assert evaluator.margin == pytest.approx(math.log(1 + fraction), rel=1e-12)
    assert Perplexity.model_validate(evaluator.model_dump()) == evaluator
    assert Perplexity.model_validate_json(evaluator.model_dump_json()) == evaluator


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        (5, 'write "5%"'),
        (1.5, "if percent was meant"),
        (0, "above 0"),
        ("0%", "above 0"),
        (-0.05, "above 0"),
        ("-5%", "above 0"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        ("nan%", "finite"),
        ("inf%", "finite"),
        ("1001%", "checks nothing"),
        ("5", "percent sign"),
        ("five%", "no percentage"),
        ("", "no percentage"),
        (True, "no percentage"),
        (None, "no percentage"),
        ([5], "no percentage"),
    ],
)
def test_senseless_margins_are_refused_with_a_hint(written, hint):
    with pytest.raises(ValidationError, match=hint):
        Perplexity(max_increase=written)


def test_too_few_documents_to_ever_decide_are_refused():
    assert Perplexity(max_increase=0.05, max_documents=50).max_documents == 50
    with pytest.raises(ValidationError, match="at least 50 documents"):
        Perplexity(max_increase=0.05, max_documents=49)


def test_figures_for_readers():
    evaluator = Perplexity(max_increase="5%")
    assert evaluator.display(math.log(1.032)) == "+3.2 %"
    assert evaluator.display(math.log(0.99)) == "-1.0 %"
    assert evaluator.value([Score("a", 1e6, 1.0)]) == math.inf
    assert math.isnan(evaluator.value([Score("a", math.nan, 1.0)]))
    schema = TypeAdapter(Perplexity).json_schema()["properties"]["max_increase"]
    assert {branch["type"] for branch in schema["anyOf"]} == {"string", "number"}
