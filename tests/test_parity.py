"""Artifacts against the model that they were made from, in their own runtimes, and where the two part."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import onnx
import pytest
import torch

from compress import parity, run
from compress.encodings import Encoding
from compress.exporting import weights_exact
from compress.gate import CheckResult
from compress.interfaces import Documents, LanguageModel
from compress.model import Model
from compress.plugin import exporter
from compress.store import Store
from export._llama_cpp import find
from export.onnx import Onnx
from tests import tiny_gguf
from tests.test_run import INT8, load, place  # noqa: F401 (a fixture)
from tests.tiny import documents
from tests.tiny_onnx import encode

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "portable": ("onnx", {"flavour": "portable"}),
    "genai": ("onnx", {}),
    "gguf": ("gguf", {}),
    "checkpoint": ("checkpoint", {}),
}


def model_for(format: str) -> Model:
    model = tiny_gguf.tiny(initializer_range=0.1)

    def choose(name: str) -> Encoding | None:
        outer = "embed" in name or "head" in name
        return (None if format == "checkpoint" else Encoding("int8", 32)) if outer else Encoding("int4", 32)

    return encode(model, choose)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, Path]]:
    """Model and folder by format, each written once."""
    done: dict[str, tuple[Model, Path]] = {}

    def make(format: str) -> tuple[Model, Path]:
        if format not in done:
            name, fields = FORMATS[format]
            model, path = model_for(format), tmp_path_factory.mktemp("export") / "out"
            path.mkdir()
            exporter(name)(**fields).write(model, path)
            done[format] = (model, path)
        return done[format]

    return make


def checks(opened: LanguageModel, gated: Model, data: list[Documents] | None = None) -> dict[str, CheckResult]:
    found = parity.parity_checks(opened, gated, data if data is not None else [documents(6, seed=2)])
    return {c.metric: c for c in found}


def open_(format: str, path: Path) -> Any:
    return exporter(FORMATS[format][0])().open(path)


@pytest.mark.parametrize("format", FORMATS)
def test_an_artifact_computes_what_was_gated_within_its_precision(format, exported):
    model, path = exported(format)
    opened = open_(format, path)
    found = checks(opened, model)
    assert list(found) == ["parity", "parity_max", "parity_tokens"]
    assert {c.verdict for c in found.values()} == {"PASS"}
    assert found["parity_tokens"].tokens == parity.GENERATED and found["parity"].examples == 6
    kind = parity.precision(opened.compute, model.compute)
    assert kind == ("int8" if format == "gguf" else "float32")
    limits = {"int8": (1e-7, 0.03), "float32": (0.0, 1e-5)}  # nats, those of docs/gates.md
    assert limits[kind][0] <= found["parity"].details["kl"] < limits[kind][1]
    if kind == "int8":  # and the tighter tolerance would tell the difference
        assert found["parity"].loss > parity.TOLERANCES["float32"].mean
    opened.close()


def changed(model: Model, tensor: str) -> Model:
    """A twin of the model in which one weight has another sign."""
    twin = Model(copy.deepcopy(model.module), model.tokenizer)
    with torch.no_grad():
        twin.parameter(tensor).neg_()
    return twin


@pytest.mark.parametrize("format", ["portable", "genai", "checkpoint"])
@pytest.mark.parametrize(("tensor", "module"), [
    ("model.embed_tokens.weight", "model.embed_tokens"),
    ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp"),
    ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn"),
    ("lm_head.weight", "lm_head"),
])  # fmt: skip
def test_the_module_in_which_the_models_part_is_named(format, tensor, module, exported):
    model, path = exported(format)
    opened = open_(format, path)
    found = checks(opened, changed(model, tensor))
    assert found["parity"].verdict == found["parity_max"].verdict == "FAIL"
    assert module in found["parity"].definition.partition("The two ")[2].split(":")[0]
    assert "deterministic" in found["parity"].definition and found["parity"].against == "the gated model"
    opened.close()


def turn(path: Path) -> None:
    """Queries of the second block are no longer rotated, but something else."""
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    turned = next(n for n in graph.graph.node if n.name.startswith("model.layers.1.self_attn/Neg"))
    turned.op_type = "Abs"
    onnx.save(graph, path / "model.onnx")


class Turned(Onnx):
    """Writes the very weights, into a graph that computes something else."""

    def write(self, model: Model, out: Path) -> None:
        super().write(model, out)
        turn(out)


def test_a_run_whose_artifact_computes_something_else_is_exit_3_and_names_the_module(place, tmp_path):  # noqa: F811
    recipe = load(place, f"[{{{INT8}}}]", "[onnx: {flavour: portable}]")
    entry = recipe.export[0].model_copy(update={"exporter": Turned(flavour="portable")})
    record, folder = run.apply(
        recipe.model_copy(update={"export": (entry,)}), tmp_path / "run", Store(tmp_path / "home")
    )
    assert (record.status, record.exit_code) == ("failed", 3) and record.release.verdict == "PASS"
    (made,) = record.exports
    (found,) = (c for c in made.gate.checks if c.metric == "parity")
    assert made.weights_exact and found.verdict == "FAIL" and "part in model.layers.1.self_attn:" in found.definition
    assert not (folder / "artifacts").exists()


def test_equal_weights_in_another_graph_are_noticed(exported, tmp_path):
    model, path = exported("portable")
    path = Path(shutil.copytree(path, tmp_path / "copy"))
    turn(path)
    assert weights_exact(model, exporter("onnx")(flavour="portable"), path)
    opened = open_("portable", path)
    found = checks(opened, model)
    assert {c.verdict for c in found.values()} >= {"FAIL"} and found["parity"].verdict == "FAIL"
    assert "part in model.layers.1.self_attn: its relative difference is" in found["parity"].definition
    opened.close()


def test_llama_cpp_says_that_something_differs_but_not_where(exported, tmp_path):
    model, path = exported("gguf")
    path = Path(shutil.copytree(path, tmp_path / "copy"))
    field = gguf.GGUFReader(find(path), "r+").get_field("llama.rope.freq_base")
    assert field is not None
    field.parts[field.data[0]][0] = 10.0  # other rotations of the same weights
    assert weights_exact(model, exporter("gguf")(), path)
    opened = open_("gguf", path)
    found = checks(opened, model)
    assert found["parity"].verdict == "FAIL"
    assert found["parity"].definition.endswith("not known: llama.cpp shows no intermediate outputs.")
    opened.close()


def test_nothing_to_compare_and_broken_numbers_prove_nothing(exported):
    model, path = exported("portable")
    opened = open_("portable", path)
    assert {c.verdict for c in checks(opened, model, [Documents("none", [], "d")]).values()} == {"INVALID"}
    broken = changed(model, "model.norm.weight")
    with torch.no_grad():
        broken.parameter("model.norm.weight")[3] = torch.nan
    found = checks(opened, broken)
    assert found["parity"].verdict == found["parity_max"].verdict == "INVALID"
    opened.close()


@pytest.mark.parametrize(("computes", "kind"), [
    (["float32 weights, float32 products"], "float32"),
    (["Q8_0 weights, int8 activations, float16 cache", "int4 g32 weights, float32 products"], "int8"),
    (["F16 weights, float16 activations, float16 cache"], "float16"),
    (["int4 g32 weights, float32 activations, no cache", "int4 g32 weights, bfloat16 products"], "bfloat16"),
    (["Q4_0 + F32 weights, int8 + float32 activations, float16 cache"], "int8"),
])  # fmt: skip
def test_the_coarsest_part_of_computing_decides(computes, kind):
    assert parity.precision(*computes) == kind
