"""What a GGUF file is called, and what its header says of where the model comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFValueType

from compress import artifact, lineage, plugin, source
from compress.encodings import Encoding
from compress.interfaces import Context
from export._gguf_origin import file_name
from export._llama_cpp import LlamaCpp, find
from export.gguf import Gguf
from tests.tiny_gguf import encoded, tiny, windows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_header_says_where_the_model_comes_from(tmp_path: Path) -> None:
    model = encoded(tiny(), Encoding("int4", 32))
    model.name = "Small-Instruct-v1.2"
    model.described = {"name": "Small", "repository": "maker/Small", "license": "mit", "languages": ("en", "de")}
    Gguf().write(model, tmp_path)
    file = find(tmp_path)
    fields = GGUFReader(file).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
    wanted = {"name": model.name, "basename": "Small", "finetune": "Instruct", "version": "v1.2", "license": "mit"}
    wanted |= {"languages": ["en", "de"], "quantized_by": "compress-toolkit", "base_model.0.name": "Small"}
    wanted |= {"base_model.0.repo_url": "https://huggingface.co/maker/Small", "base_model.0.organization": "maker"}
    assert {key: found[f"general.{key}"] for key in wanted} == wanted and found["general.base_model.count"] == 1
    assert found["general.size_label"] == f"{sum(p.numel() for p in model.module.parameters()) / 1000:.0f}K"
    assert file.name == f"Small-{found['general.size_label']}-Instruct-v1.2-Q4_0.gguf"
    assert lineage.of(source.resolve(str(file))).repository == "maker/Small"
    (tmp_path / "plain").mkdir()
    Gguf().write(tiny(), tmp_path / "plain")
    known = GGUFReader(find(tmp_path / "plain")).fields.keys()  # what nobody knows is left out
    assert not known & {"general.license", "general.base_model.count", "general.quantized_by"}
    assert not any(key.startswith("quantize.") for key in known)


@pytest.mark.parametrize(("name", "stem"), [
    ("SmolLM2-200K-Instruct", "SmolLM2-{}-Instruct"), ("A model; of mine\n", "A-model-of-mine-{}"),
    ("-rf", "rf-{}"), ("..", "{}"), ("模型", "模型-{}"), ("x" * 300, "x" * 200), ("", "{}"), ("pkg:a b", "pkg-a-b-{}"),
])  # fmt: skip
def test_a_file_is_named_by_the_convention_and_by_nothing_that_a_shell_reads(name: str, stem: str) -> None:
    model = tiny()
    model.name = name
    size = f"{sum(p.numel() for p in model.module.parameters()) / 1000:.0f}K"
    assert file_name(model, "Q4_0") == f"{stem.format(size)}-Q4_0.gguf"


def test_importances_are_on_record_in_llama_cpps_keys(tmp_path: Path) -> None:
    model = tiny()
    calibration = [torch.tensor(window) for window in windows(model, 24, 24, 24)]
    fields = {"type": "q4_1", "keep": {"*.0.self_attn.o_proj": "fp16"}}
    rounding = plugin.step("quantize.ggml")(**fields)
    rounding.apply(model, Context(seed=0, calibration=calibration, dataset="file:mine.jsonl"))
    artifact.save(model, tmp_path / "saved")
    Gguf().write(artifact.load(tmp_path / "saved"), tmp_path)
    found = {key: f for key, f in GGUFReader(find(tmp_path)).fields.items() if key.startswith("quantize.imatrix.")}
    values = {key.rpartition(".")[2]: f.contents() for key, f in found.items()}
    assert values.pop("file").startswith("none: ")
    assert values == {"dataset": "file:mine.jsonl", "entries_count": 13, "chunks_count": 3}  # one of 14 stays fp16
    assert found["quantize.imatrix.entries_count"].types == [GGUFValueType.UINT32]
    runtime = LlamaCpp(tmp_path)
    assert runtime._metadata("quantize.imatrix.dataset") == "file:mine.jsonl"
    runtime.close()
