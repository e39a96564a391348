"""Every kind of ONNX export passes the checker, and shape inference knows what each of its values is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress.encodings import Encoding
from export.onnx import Onnx
from tests.tiny_classifier import tiny_classifier
from tests.tiny_onnx import encode, tiny
from tests.tiny_seq2seq import tiny_seq2seq

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: dict[str, tuple[Onnx, Callable[[], Any]]] = {
    "genai": (Onnx(), lambda: tiny("llama", True)),
    "portable": (Onnx(flavour="portable"), lambda: tiny("llama", True)),
    "classifier": (Onnx(flavour="portable"), tiny_classifier),
    "seq2seq": (Onnx(flavour="portable"), tiny_seq2seq),
}
OUTPUTS = {  # ranks of what leaves the graphs, the caches of genai's aside
    "encoder_model.onnx": {"last_hidden_state": 3},
    "decoder_model.onnx": {"logits": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_and_shape_inference_pass(kind: str, tmp_path: Path) -> None:
    exporter, make = KINDS[kind]
    exporter.write(encode(make(), lambda name: Encoding("int4", 16)), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.onnx"))
    assert [file.name for file in files] == (sorted(OUTPUTS) if kind == "seq2seq" else ["model.onnx"])
    assert [file.name for file in (tmp_path / "out").glob("*.data")] == ["model.onnx.data"]  # one, beside the model
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
        onnx.shape_inference.infer_shapes_path(str(file), str(tmp_path / "inferred.onnx"), True, True)
        graph = onnx.load(tmp_path / "inferred.onnx", load_external_data=False).graph
        known = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
        if not kind.startswith("genai"):  # operators of onnxruntime's own say nothing to onnx
            made = {name for node in graph.node for name in node.output}
            assert made <= known.keys() and all(t.elem_type and t.HasField("shape") for t in known.values())
        ranks = {value.name: len(known[value.name].shape.dim) for value in graph.output}
        wanted = OUTPUTS.get(file.name, {"logits": 2 if kind == "classifier" else 3})
        assert {name: ranks[name] for name in wanted} == wanted


def test_a_graph_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    """The checks above can fail: here integers are multiplied with floats."""
    Onnx(flavour="portable").write(tiny("llama", True), tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    product.input[1] = "input_ids"
    onnx.save(model, file)
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(str(file), full_check=True)
