"""Exporting without a run, and opening what a run left: on the folder of a real run of a tiny model."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress import artifact, measure, opening, run, source, ungated
from compress import recipe as recipes
from compress.errors import Corrupt, RecipeError
from compress.interfaces import Context
from compress.plugin import exporter, step
from compress.store import Store
from export._llama_cpp import find
from export.gguf import Gguf
from tests.test_run import INT4, INT8, load, place  # noqa: F401 (a fixture)
from tests.tiny_gguf import tiny

COMMAND = [sys.executable, "-c", "from compress.cli import main; main()"]
ROOT = Path(__file__).parents[1]


def rounded(encoding: str):
    model = tiny()
    step("quantize.rtn")(encoding=encoding, group_size=32, embeddings=encoding).apply(model, Context(seed=0))
    return model


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):  # noqa: F811
    """A run that rejected int4, accepted int8 and exported a GGUF; its record, folder and home."""
    home = tmp_path_factory.mktemp("home")
    recipe = load(place, f"[{{{INT4}, otherwise: [{{{INT8}}}]}}]", "[gguf: {}]")
    record, folder = run.apply(recipe, home / "run", Store(home))
    assert record.status == "passed"
    return record, folder, home


@pytest.fixture(autouse=True)
def at_home(made, monkeypatch):
    monkeypatch.setenv("COMPRESS_HOME", str(made[2]))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


# --- from a run to its model -----------------------------------------------------------------------------


def test_a_run_stands_for_the_model_that_it_accepted_last(made, tmp_path):
    record, folder, home = made
    for spec in (folder, folder / "run.json"):
        origin = opening.locate(str(spec))
        assert artifact.digest(origin.artifact) == record.steps[-1].digest
        assert origin.baseline == record.baseline.model
        assert "steps[0] quantize.rtn" in origin.description and "run passed, release gate PASS" in origin.description
    model = compress.load(folder)
    assert model.digest == rounded("int8").digest
    assert measure.open_model(str(folder)).digest == model.digest
    found = compress.export(folder, "gguf", tmp_path / "out")
    (file,) = [f for f in found.files if f.name.endswith("-Q8_0.gguf")]
    assert file.sha256 in {f.sha256 for f in record.exports[0].files}  # what the run gated, to the byte
    assert found.bits_per_weight == record.exports[0].bits_per_weight
    assert f"--against {record.baseline.model}" in found.hint


def test_a_rejected_step_is_not_the_final_model(place, made, tmp_path):  # noqa: F811
    _, _, home = made
    steps = f"[{{prune.magnitude: {{sparsity: 0.001}}}}, {{{INT4}}}]"
    record, folder = run.apply(load(place, steps), tmp_path / "r", Store(home))
    assert record.status == "failed" and record.steps[0].gate.verdict == "PASS"
    origin = opening.locate(str(folder))
    assert artifact.digest(origin.artifact) == record.steps[0].digest != record.steps[1].digest
    assert "steps[0] prune.magnitude left; run failed, release gate none" in origin.description
    record, folder = run.apply(load(place, f"[{{{INT4}}}]"), tmp_path / "none", Store(home))
    with pytest.raises(RecipeError, match=r"accepted no step \(failed\)"):
        opening.locate(str(folder))


def test_a_swept_model_is_said_and_made_anew_as_the_line_advises(made, tmp_path, monkeypatch):
    record, folder, _ = made
    monkeypatch.setenv("COMPRESS_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(RecipeError, match=r"steps\[0\] quantize.rtn made .* is not in the store") as caught:
        compress.export(folder, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert f"compress apply {folder / 'recipe.resolved.yaml'} --run-dir NEW" in str(caught.value)
    again, new = run.apply(recipes.load(folder / "recipe.resolved.yaml"), tmp_path / "NEW")
    assert again.steps[-1].digest == record.steps[-1].digest
    assert compress.load(new).digest == rounded("int8").digest


def test_a_damaged_artifact_exports_nothing(made, tmp_path):
    model = rounded("int8")
    artifact.save(model, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Corrupt, match="model.safetensors"):
        compress.export(tmp_path / "a", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_no_transformers_folder(tmp_path):
    artifact.save(rounded("int8"), tmp_path / "a")
    with pytest.raises(Corrupt, match="tensor .* is missing"):  # transformers would fill it with random numbers
        source.load(str(tmp_path / "a"))
    assert compress.load(tmp_path / "a").digest == rounded("int8").digest


# --- exporting -------------------------------------------------------------------------------------------


def test_an_open_model_is_exported_and_stays_open(tmp_path):
    model = rounded("int8")
    found = compress.export(model, "gguf", tmp_path / "out")
    assert [f.name for f in found.files] == ["README.md", "bom.json", "compression.json", find(tmp_path / "out").name]
    file = found.files[-1]
    path = tmp_path / "out" / file.name
    assert path.stat().st_size == file.bytes == found.size_bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    assert not found.gated and found.params == {} and model.digest in found.model
    assert found.bits_per_weight == pytest.approx(artifact.bits_per_weight(model))
    opened = exporter("gguf")().open(tmp_path / "out")
    window = model.encode("the model weight scale token group loss margin")
    ours, theirs = next(model.logits([window])), next(opened.logits([window]))
    opened.close()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.8  # llama.cpp rounds activations to 8 bits


def test_weights_changed_by_hand_are_exported_under_their_own_digest(tmp_path):
    model = tiny()
    before = model.digest
    model.parameter("model.norm.weight").data.mul_(2)
    found = compress.export(model, "gguf", tmp_path / "out")
    assert before not in found.model and model.digest in found.model


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(RecipeError, match="exists already"):
            compress.export(rounded("int8"), "gguf", out)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("encoding", ["int2", "int3"])
def test_encodings_are_refused_before_writing_as_the_plan_does(place, tmp_path, encoding):  # noqa: F811
    with pytest.raises(RecipeError) as ours:
        compress.export(rounded(encoding), "gguf", tmp_path / "out")
    assert nothing_left(tmp_path)
    fields = f"quantize.rtn: {{encoding: {encoding}, group_size: 32, embeddings: {encoding}}}"
    with pytest.raises(RecipeError) as plans:
        run.apply(load(place, f"[{{{fields}}}]", "[gguf: {}]"), tmp_path / "run")
    label, _, reason = str(ours.value).split(": ", 2)
    assert label == "export gguf"  # not the exporter's own refusal, which comes while it writes
    assert reason in str(plans.value) and "use int4, int5 or int8" in reason


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    class Unfinished(Gguf):
        """Writes the file and loses the disk."""

        def write(self, model, out):
            super().write(model, out)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        ungated.write(rounded("int8"), Unfinished(), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_file_with_other_weights_is_not_published(tmp_path):
    class Careless(Gguf):
        """Doubles a norm on the way."""

        def write(self, model, out):
            weight = model.parameter("model.norm.weight").data
            weight.mul_(2)
            super().write(model, out)
            weight.div_(2)

    with pytest.raises(Corrupt, match="does not hold the gated weights"):
        ungated.write(rounded("int8"), Careless(), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_fields_are_those_of_the_exporter(tmp_path):
    assert ungated.configured("onnx", {"activations": "int8"}) == exporter("onnx")(activations="int8")
    assert ungated.configured("onnx", overrides=["activations=int8"]) == exporter("onnx")(activations="int8")
    with pytest.raises(RecipeError, match="--set activations=int3  exporter onnx.activations: found 'int3'"):
        ungated.configured("onnx", overrides=["activations=int3"])
    with pytest.raises(RecipeError, match="unknown key 'activation'; did you mean activations"):
        compress.export(tiny(), "onnx", tmp_path / "out", activation="int8")
    with pytest.raises(RecipeError, match="unknown exporter 'ggfu'; did you mean gguf"):
        compress.export(tiny(), "ggfu", tmp_path / "out")


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_that_nothing_was_gated(made, tmp_path):
    record, folder, _ = made
    done = command("export", folder, "gguf", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *_, file, summary, note = done.stdout.splitlines()
    (gated,) = [f for f in record.exports[0].files if f.name.endswith(".gguf")]
    assert file.startswith(str(tmp_path / "out" / gated.name)) and gated.sha256[:12] in file
    assert "bits per weight, weights exact" in summary and str(folder) in summary
    assert note.startswith("NOT GATED: ") and "compress eval" in note and "`export: [gguf: {}]`" in note
    again = command("export", folder, "gguf", "--out", tmp_path / "out")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "exists already" in again.stderr
    done = command("export", tmp_path / "out", "onnx", "--out", tmp_path / "other")
    assert done.returncode == 2 and "is an export; give the model that it was made from" in done.stderr


def test_a_source_folder_is_exported_to_onnx_as_json(place, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    done = command("export", place / "model", "onnx", "--out", out, "--set", "activations=int8", "--json")
    found = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and found["params"] == {"flavour": "genai", "activations": "int8"}
        and found["gated"] is False
    )
    assert {f["name"] for f in found["files"]} == {p.name for p in out.iterdir()} >= {"model.onnx", "tokenizer.json"}
    assert found["bits_per_weight"] == 32 and found["weights_exact"] is True
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["opening", "writing"], done.stderr
