"""Encoder classifiers as portable ONNX: exact weights, standard operators, onnxruntime's logits, and a whole run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compress import measure, parity, plugin, provenance, run, ungated, verify
from compress import recipe as recipes
from compress.classifier import Classifier
from compress.encodings import Encoding
from compress.errors import Corrupt, RecipeError
from compress.exporting import weights_exact
from compress.interfaces import Context, Documents
from compress.store import Store
from export.onnx import Onnx
from tests.test_classifier import windows
from tests.tiny_classifier import KINDS, labelled, learned, saved, tiny_classifier, write_rows
from tests.tiny_onnx import encode

pytestmark = pytest.mark.usefixtures("one_thread")
PORTABLE = Onnx(flavour="portable")
TEXTS = ["the small proof", "a loss", "model weight scale token group loss margin proof", "zebra", "of " * 60]
DATA = Documents("texts", [(str(i), text) for i, text in enumerate(TEXTS)], "texts", 48)


def mixed(name: str) -> Encoding | None:
    """Codes with zero points and without, in groups and whole rows, and floats, beside each other."""
    if "embeddings" in name:
        return Encoding("int8", 16)
    if "query" in name or "q_lin" in name:
        return Encoding("int4", 16, symmetric=False)
    if "key" in name or "k_lin" in name:
        return Encoding("int2", 8)
    if "value" in name or "v_lin" in name:
        return Encoding("bf16")
    return None if "output" in name or "lin2" in name else Encoding("int8")


OTHER_ACTIVATIONS = {
    "bert": {"hidden_act": "relu"},
    "roberta": {"hidden_act": "gelu_new"},
    "distilbert": {"activation": "silu"},
}
CASES: dict[str, Callable[[str], Encoding | None]] = {"mixed": mixed, "plain": lambda name: None}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Classifier, Path]]:
    """Exports by kind and case, each written once."""
    done: dict[tuple[str, str], tuple[Classifier, Path]] = {}

    def make(kind: str, case: str) -> tuple[Classifier, Path]:
        if (kind, case) not in done:
            model = tiny_classifier(kind, **(OTHER_ACTIVATIONS[kind] if case == "plain" else {}))
            path = tmp_path_factory.mktemp("onnx") / "out"
            PORTABLE.write(encode(model, CASES[case]), path)
            done[kind, case] = model, path
        return done[kind, case]

    return make


def rows(model: Any) -> torch.Tensor:
    return torch.cat([row.clone() for row in model.logits([model.encode(text) for text in TEXTS])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_files_hold_the_very_tensors_and_onnxruntime_computes_the_same(export: Any, kind: str, case: str) -> None:
    model, path = export(kind, case)
    assert weights_exact(model, PORTABLE, path)
    assert [name for name, _ in PORTABLE.stored(path)] == [name for name, _ in model.tensors()]
    opened: Any = measure.open_model(str(path))
    assert [opened.encode(text) for text in TEXTS] == [model.encode(text) for text in TEXTS]  # the last one is cut
    torch.testing.assert_close(rows(opened), rows(model), atol=1e-4, rtol=0)
    assert opened.labels == model.labels and "float32 activations" in opened.compute
    checks = parity.parity_checks(opened, model, [DATA])
    assert [(c.metric, c.verdict) for c in checks] == [("parity", "PASS"), ("parity_max", "PASS")]
    assert parity.decode_check(opened, [DATA]) == []
    with pytest.raises(RecipeError, match="writes no text"):
        opened.generate([2, 3], 4)
    opened.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_session_takes_any_batch_and_padding_on_either_side(export: Any, kind: str) -> None:
    model, path = export(kind, "mixed")
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""} and graph.opset_import[0].version == 21
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input]
    assert shapes == [["batch", "sequence"]] * 2
    (out,) = graph.graph.output
    assert [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim] == ["batch", 3]
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        inputs = model.tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
        model.tokenizer.padding_side = "right"
        with torch.no_grad():
            names = ("input_ids", "attention_mask")
            expected = model.module(**{name: inputs[name] for name in names}).logits
        found = session.run(["logits"], {name: inputs[name].numpy() for name in names})[0]
        # On the left, the first token is padding, which a head reads all the same.
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_where_two_models_part_is_named(export: Any, tmp_path: Path) -> None:
    model, path = export("bert", "plain")
    twin = tiny_classifier(hidden_act="relu")
    assert twin.digest == model.digest
    with torch.no_grad():
        twin.parameter("bert.encoder.layer.1.intermediate.dense.weight").mul_(1.5)
    twin.touch()
    opened = Onnx().open(path)
    failed = [c for c in parity.parity_checks(opened, twin, [DATA]) if c.verdict == "FAIL"]
    assert failed and all("part in bert.encoder.layer.1.output.LayerNorm" in c.definition for c in failed)
    opened.close()


def test_damaged_folders_are_refused(export: Any, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json"):
        copied = Path(shutil.copytree(export("bert", "mixed")[1], tmp_path / name))
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Corrupt):
            Onnx().open(copied)
    copied = Path(shutil.copytree(export("bert", "mixed")[1], tmp_path / "other"))
    config = {**json.loads((copied / "config.json").read_text()), "model_type": "llama", "architectures": ["X"]}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(Corrupt):
        Onnx().open(copied)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_encoder_is_written_exactly(kind: str, tmp_path: Path) -> None:
    model = tiny_classifier(kind)
    context = Context(seed=0, calibration=windows(model)[:20])
    plugin.step("prune.layers")(count=1).apply(model, context)
    plugin.step("prune.neurons")(fraction=0.5).apply(model, context)
    plugin.step("quantize.rtn")(encoding="int8", group_size=16).apply(model, context)
    assert (model.facts.layers, model.facts.sizes["mlp"]) == (1, 32)
    PORTABLE.check(model.facts)
    PORTABLE.write(model, tmp_path / "out")
    assert weights_exact(model, PORTABLE, tmp_path / "out")
    opened: Any = measure.open_model(str(tmp_path / "out"))
    torch.testing.assert_close(rows(opened), rows(model), atol=1e-4, rtol=0)
    opened.close()


def test_what_it_does_not_write_is_refused_beforehand(tmp_path: Path) -> None:
    PORTABLE.check(tiny_classifier().facts)
    with pytest.raises(RecipeError, match="llama, mistral, qwen2, qwen3, not of bert; use flavour: portable"):
        Onnx().check(tiny_classifier().facts)
    with pytest.raises(RecipeError, match="computes silu, gelu, gelu_tanh, relu, not 'quick_gelu'$"):
        PORTABLE.check(tiny_classifier(hidden_act="quick_gelu").facts)


RECIPE = """
model: {place}/model
data:
  calibration: {{source: "file:{place}/rows.jsonl", tokens: 2048, length: 24}}
  selection: {{source: "file:{place}/rows.jsonl", tokens: 512, length: 24}}
  evaluation: [{{source: "file:{place}/rows.jsonl", length: 48}}]
release:
  - classification: {{data: "file:{place}/test.jsonl", max_drop: 5.0}}
  - label_divergence: {{max_mean: 0.05}}
gate: [{{classification: {{data: "file:{place}/test.jsonl", max_drop: 5.0}}}}]
steps:
  - prune.magnitude: {{sparsity: 0.97}}
    otherwise: [{{quantize.gptq: {{encoding: int8, group_size: 32}}}}]
export: [onnx: {{flavour: portable}}]
"""


def test_a_run_rejects_accepts_and_ships_what_verifies(tmp_path: Path) -> None:
    saved(learned(), tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", labelled(600, seed=5))
    write_rows(tmp_path / "test.jsonl", labelled(300, seed=6))
    recipe = recipes.load(RECIPE.format(place=tmp_path))
    record, folder = run.apply(recipe, tmp_path / "run", Store(tmp_path / "home"))
    assert record.status == "passed", record.error
    (step,) = record.steps
    assert [a.verdict for a in step.attempts] == ["FAIL", "PASS"]
    assert {a.verdict for a in record.assays} == {"SEEN"} and record.baseline and record.baseline.metrics == []
    assert len(step.layer_errors) == 12 and all(e is not None and 0 < e < 0.01 for e in step.layer_errors.values())
    (made,) = record.exports
    assert made.weights_exact and made.runtime.startswith("onnxruntime")
    assert {c.metric for c in made.gate.checks} == {"classification", "label_divergence", "parity", "parity_max"}
    out = folder / made.path
    assert verify.verify(out)[0].startswith(f"{out}: ") and "match" in verify.verify(out)[0]
    verify.verify(folder)
    facts = provenance.read(out)
    assert facts["task"] == "text-classification"
    assert "pipeline_tag: text-classification" in (out / "README.md").read_text()
    assert '"task": "text-classification"' in (out / "bom.json").read_text()
    assert "label\\_divergence" in (folder / "report.md").read_text()


def test_an_export_by_hand_is_exact_and_says_how_to_measure_it(tmp_path: Path) -> None:
    made = ungated.export(learned(), "onnx", tmp_path / "out", flavour="portable")
    assert made.weights_exact and "label_divergence" in made.hint
    assert {file.name for file in made.files} >= {"model.onnx", "config.json", "tokenizer.json", "compression.json"}
    with pytest.raises(RecipeError, match="use flavour: portable"):
        ungated.export(learned(), "onnx", tmp_path / "other")
