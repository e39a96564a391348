import math

import pytest
import torch
from pydantic import ValidationError

from compress import plugin
from compress.errors import GateInconclusive, RecipeError
from compress.gate import Gate
from compress.interfaces import Documents
from compress.measure import evaluate
from evaluators.long_context import LongContext
from tests import tiny_gguf, tiny_onnx
from tests.gates import twin_of_equal_scores
from tests.tiny import documents, perturbed, tiny_model

CHECK = LongContext(max_increase="15%", length=128, windows=2)
MODELS = {"gguf": lambda: tiny_gguf.tiny(), "onnx": lambda: tiny_onnx.tiny("llama", True)}


@pytest.fixture(scope="module")
def baseline():
    return tiny_model()


def judge(model, baseline, data, check=CHECK, **options):
    return Gate((check,)).evaluate(model, baseline, data, **options).checks


def test_fields():
    assert CHECK.margin == math.log1p(0.15) and CHECK.window == 128 and CHECK.confidence == 1.0
    assert LongContext(max_increase="15%").length == 2048
    assert LongContext.model_validate(CHECK.model_dump(mode="json")) == CHECK
    for wrong in ({"length": 15}, {"windows": 0}, {"confidence": 0.9}, {"max_documents": 50}):
        with pytest.raises(ValidationError):
            LongContext(**{"max_increase": "15%", **wrong})


def test_windows_are_packed_from_the_first_documents_and_scored_on_their_second_half(baseline):
    data = documents(40)
    (joined,) = CHECK.sources([data])
    examples = CHECK.examples(joined, baseline.encode)
    text = "\n\n".join(text for _, text in data.documents).encode()[:256]  # a token per byte
    assert baseline.decode([t for e in examples for t in e.payload]).encode() == text
    for example, score in zip(examples, CHECK.score(baseline, examples), strict=True):
        rows = torch.log_softmax(next(baseline.logits([example.payload])).double(), -1)
        wanted = -sum(float(rows[t - 1, example.payload[t]]) for t in range(64, 128))
        assert (score.total, score.weight) == (pytest.approx(wanted, rel=1e-6), 64)


def test_no_more_documents_are_read_than_the_windows_may_need(baseline):
    many = Documents("s", [(str(i), "word " * 20) for i in range(10_000)], "d")
    (joined,) = CHECK.sources([many])
    assert 8 * 256 <= len(joined.documents[0][1]) < 9 * 256


def test_a_near_model_passes_and_a_far_one_fails_without_an_interval(baseline):
    data = [documents(40), documents(40, seed=1, source="more")]
    near = judge(perturbed(baseline, 0.01), baseline, data)
    assert [(c.verdict, c.source, c.examples, c.tokens) for c in near] == [
        ("PASS", "words", 2, 128),
        ("PASS", "more", 2, 128),
    ]
    (far, _) = judge(perturbed(baseline, 1.0), baseline, data)
    assert far.verdict == "FAIL" and far.loss == far.lower == far.upper > far.margin
    assert math.log(far.value / far.reference) == pytest.approx(far.loss, abs=1e-12)
    assert "no others" in far.definition and far.confidence == 1.0


def test_too_short_a_source_is_invalid_and_says_so(baseline):
    (found,) = judge(perturbed(baseline, 0.01), baseline, [documents(2)])
    assert found.verdict == "INVALID" and found.examples == 0
    assert "words holds 165 tokens, and 2 x 128 are needed; add documents" in found.definition
    (empty,) = judge(perturbed(baseline, 0.01), baseline, [documents(0)])
    assert empty.verdict == "INVALID"


def test_too_short_a_context_is_invalid_and_says_so(baseline):
    check = LongContext(max_increase="15%", length=256)
    (found,) = judge(perturbed(baseline, 0.01), baseline, [documents(40)], check)
    assert found.verdict == "INVALID"
    assert "windows of 256 tokens exceed the model's context of 128 tokens" in found.definition


def test_nan_is_invalid_on_either_side(baseline):
    broken = perturbed(baseline, math.nan)
    for pair in ((broken, baseline), (perturbed(baseline, 0.01), broken)):
        (found,) = judge(*pair, [documents(40)])
        assert found.verdict == "INVALID" and "not finite" in found.definition


def test_equal_scores_of_other_weights_are_invalid(baseline):
    assert judge(tiny_model(), baseline, [documents(40)])[0].verdict == "PASS"
    (found,) = judge(twin_of_equal_scores(), baseline, [documents(40)])
    assert found.verdict == "INVALID" and "scores of both models are equal" in found.definition


@pytest.mark.parametrize("name", MODELS)
def test_artifacts_read_long_windows_as_torch_does(name, tmp_path):
    model, exporter = MODELS[name](), plugin.exporter(name)()
    exporter.write(model, tmp_path)
    runtime = exporter.open(tmp_path)
    (found,) = judge(runtime, model, [documents(40)])
    assert found.verdict == "PASS" and abs(found.loss) < 0.01 and found.examples == 2
    runtime.close()


def test_eval_knows_it(tmp_path):
    plugin.exporter("gguf")().write(tiny_gguf.tiny(max_position_embeddings=4096), tmp_path)
    (metric,) = evaluate(str(tmp_path), ["long_context"], source="pydoc")["metrics"]
    assert (metric["examples"], metric["tokens"], metric["source"]) == (1, 1024, "pydoc")
    assert metric["interval"] == [metric["value"], metric["value"]]
    with pytest.raises(GateInconclusive, match="pydoc holds .* tokens, and 1 x 2,048 are needed"):
        evaluate(str(tmp_path), ["long_context"], source="pydoc", documents=1)
    with pytest.raises(RecipeError, match="long_context reads a fixed set of its own"):
        evaluate("nowhere", ["long_context"], windows=2)


def test_one_window_of_logits_is_asked_for_at_a_time(baseline, monkeypatch):
    (joined,) = CHECK.sources([documents(40)])
    examples = CHECK.examples(joined, baseline.encode)
    plain, asked, original = CHECK.score(baseline, examples), [], baseline.logits

    def logits(windows):
        asked.append(len(windows))
        return original(windows)

    monkeypatch.setattr(baseline, "logits", logits)
    assert CHECK.score(baseline, examples) == plain and asked == [1, 1]
