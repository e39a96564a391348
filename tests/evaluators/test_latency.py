"""Latency gates: real models against the clock, with differences that no noise hides."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress import refusals, run
from compress.architectures import Facts
from compress.errors import RecipeError
from compress.gate import Gate
from compress.model import Model
from compress.store import Store
from evaluators.latency import Latency
from tests.test_run import INT8, load, place  # noqa: F401 (a fixture)
from tests.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def deep_model(layers: int) -> Model:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return Model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)), byte_tokenizer())


@pytest.fixture(scope="module")
def deep() -> Model:
    return deep_model(12)


def judged(check: Latency, model: Model, baseline: Model):
    (found,) = Gate((check,)).evaluate(model, baseline, []).checks
    return found


def test_a_sixth_of_the_layers_is_proven_to_be_faster(deep):
    found = judged(Latency(max_ratio=0.6), tiny_model(), deep)
    assert found.verdict == "PASS" and found.examples >= 50 and found.source == "clock"
    assert found.lower < found.loss < found.upper <= math.log(0.6) == found.margin
    assert 0.05 < found.value < 0.6 and found.value == pytest.approx(math.exp(found.loss))
    assert found.details["model_ms"] / found.details["reference_ms"] == pytest.approx(found.value)


def test_what_is_slower_or_not_fast_enough_fails(deep):
    assert judged(Latency(max_ratio=1.5), deep, tiny_model()).verdict == "FAIL"
    same = judged(Latency(max_ratio=0.5), tiny_model(), tiny_model())
    assert same.verdict == "FAIL" and 0.6 < same.value < 1.6


def test_too_few_rounds_prove_nothing(deep):
    found = judged(Latency(max_ratio=0.9, max_documents=20), tiny_model(), deep)
    assert found.verdict == "INVALID" and "20 examples, and at least 50 are needed" in found.definition


def test_rounds_take_turns_and_only_decoding_is_timed(deep):
    asked = []

    class Told(Model):
        """Says whose turn it is."""

        def stream(self, window, prefill):
            asked.append((self.name, len(window), prefill))
            return super().stream(window, prefill)

    one, two = (Told(tiny_model().module, byte_tokenizer(), name=name) for name in "ab")
    check = Latency(max_ratio=1.0, prompt_tokens=3, new_tokens=2)
    (data,) = check.sources([])
    scores = check.score(one, check.examples(data, one.encode)[:4], two)
    assert "".join(name for name, _, _ in asked) == "ab" + "abba" * 2
    assert {(length, prefill) for _, length, prefill in asked} == {(5, 3)}
    assert all(s.total == pytest.approx(math.log(s.extra["model_ms"] / s.extra["reference_ms"])) for s in scores)


def test_a_model_that_cannot_be_timed_never_passes(deep):
    class Mute(Model):
        """A runtime without a stream."""

        stream = None  # type: ignore[assignment]

    found = judged(Latency(max_ratio=5.0), Mute(tiny_model().module, byte_tokenizer()), deep)
    assert found.verdict == "INVALID" and "cannot be timed" in found.definition


def test_only_exports_are_timed(place):  # noqa: F811
    facts = Facts.from_config(json.loads((place / "model" / "config.json").read_text()))
    timed = "[latency: {max_ratio: 0.6}]"
    refusals.check(load(place, f"[{{{INT8}}}]", f"[{{gguf: {{}}, gate: {timed}}}]"), facts)
    with pytest.raises(RecipeError, match=r"latency: times artifacts in their runtimes.*move it to the gate of an ex"):
        refusals.check(load(place, f"[{{{INT8}, gate: {timed}}}]", "[gguf: {}]"), facts)


def test_no_artifact_carries_what_the_clock_said(place, tmp_path):  # noqa: F811
    recipe = load(place, f"[{{{INT8}}}]", "[{gguf: {}, gate: [latency: {max_ratio: 1}]}]")
    files = []
    for name in ("one", "two"):
        found, folder = run.apply(recipe, tmp_path / name / "run", Store(tmp_path / name))
        (export,) = found.exports
        (check,) = [c for c in export.gate.checks if c.metric == "latency"]
        assert found.status == "passed" and 0 < check.value < 1 and check.upper <= 0
        files.append({f.name: f.sha256 for f in export.files})
    assert files[0] == files[1] and len(files[0]) == 4
    facts = json.loads((Path(folder) / "artifacts" / "gguf" / "compression.json").read_text())
    (kept,) = [c for c in facts["gates"]["artifact"]["checks"] if c["metric"] == "latency"]
    assert kept["verdict"] == "PASS" and kept["margin"] == 0 and kept["loss"] is kept["examples"] is None
    card = (folder / "artifacts" / "gguf" / "README.md").read_text()
    assert "| latency | clock |" in card and "### Latency" in (folder / "report.md").read_text()
