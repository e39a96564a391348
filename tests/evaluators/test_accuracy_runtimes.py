"""The same answers in every runtime: scores need windows of logits and a tokenizer, nothing of torch's model."""

from dataclasses import replace

import pytest

from compress import plugin
from evaluators.accuracy import Accuracy
from tests import tiny_gguf, tiny_onnx

MODELS = {"gguf": lambda: tiny_gguf.tiny(), "onnx": lambda: tiny_onnx.tiny("llama", True)}


@pytest.mark.parametrize("name", MODELS)
def test_leads_are_those_of_torch(name, tmp_path):
    model, exporter = MODELS[name](), plugin.exporter(name)()
    exporter.write(model, tmp_path)
    runtime = exporter.open(tmp_path)
    check = Accuracy(tasks=["minimal_pairs"], max_drop=3.0)
    (data,) = check.sources([])
    data = replace(data, documents=data.documents[:20])
    ours, theirs = check.examples(data, model.encode), check.examples(data, runtime.encode)
    assert ours == theirs and len(ours) == 40
    scores = list(zip(check.score(model, ours), check.score(runtime, ours), strict=True))
    runtime.close()
    for torchs, other in scores:
        assert other.extra["lead"] == pytest.approx(torchs.extra["lead"], abs=0.1)  # llama.cpp's cache is float16
    clear = [(a.total, b.total) for a, b in scores if abs(a.extra["lead"]) > 0.2]
    assert len(clear) > 20 and {a for a, _ in clear} == {0.0, 1.0}
    assert all(a == b for a, b in clear)
