"""Whole runs on a tiny model: verdicts, exit codes, re-use, and what is published."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import artifact, lock, run, source
from compress import recipe as recipes
from compress.errors import Corrupt, Locked, NumericalError, RecipeError
from compress.record import RunRecord
from compress.report import summary_lines
from compress.store import Store
from compress.workbench import Reporter, Workbench
from evaluators.divergence import Divergence
from tests.tiny import WORDS
from tests.tiny_gguf import tiny

RECIPE = """
model: {model}
data:
  calibration: {{source: "file:{text}", tokens: 1024, length: 32}}
  selection: {{source: "file:{text}", tokens: 512, length: 32}}
  evaluation: [{{source: "file:{text}", length: 64}}]
release: [{{perplexity: {{max_increase: 5%}}}}, {{divergence: {{max_mean: 0.02}}}}]
gate: [{{divergence: {{max_mean: 0.02}}}}]
steps: {steps}
export: {export}
"""
INT8 = "quantize.rtn: {encoding: int8, group_size: 32, embeddings: int8}"
INT2 = "quantize.rtn: {encoding: int2, group_size: 32, embeddings: int2}"
INT4 = "quantize.rtn: {encoding: int4, group_size: 32, embeddings: int4}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a saved tiny model and 600 documents."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny()
    model.module.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [{"id": f"d{i}", "text": " ".join(rng.choices(WORDS, k=rng.randint(6, 12)))} for i in range(600)]
    (folder / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def load(place: Path, steps: str, export: str = "[]", overrides: tuple[str, ...] = ()) -> recipes.Recipe:
    text = RECIPE.format(model=place / "model", text=place / "text.jsonl", steps=steps, export=export)
    return recipes.load(text, overrides)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("home"))


def test_a_run_rejects_accepts_exports_and_is_re_used(place, store, tmp_path):
    # 4 bits of random weights diverge far beyond the margin: the alternative must be taken
    recipe = load(place, f"[{{{INT4}, otherwise: [{{{INT8}}}]}}]", "[gguf: {}]")
    record, folder = run.apply(recipe, tmp_path / "run", store)
    assert (record.status, record.exit_code) == ("passed", 0), record
    (step,) = record.steps
    assert [a.verdict for a in step.attempts] == ["FAIL", "PASS"]
    assert step.params["encoding"] == "int8" and step.gate.verdict == "PASS"
    assert len(step.layer_errors) == 14 and all(0 < e < 0.01 for e in step.layer_errors.values())
    assert len(step.encodings) == 16 and set(step.encodings.values()) == {"int8 g32"}
    (export,) = record.exports
    parity = {"decode", "parity", "parity_max", "parity_tokens"}
    assert export.weights_exact and {c.metric for c in export.gate.checks} == {"perplexity", "divergence", *parity}
    for file in export.files:
        assert (folder / export.path / file.name).stat().st_size == file.bytes
    for name in ("run.json", "report.html", "report.md", "recipe.resolved.yaml"):
        assert (folder / name).is_file()
    assert "mean KL from the gated model (nats)" in (folder / "report.html").read_text()
    parsed = json.loads((folder / "run.json").read_text())
    assert RunRecord.model_validate(parsed) == record
    again, _ = run.apply(recipe, tmp_path / "run", store)
    assert again == record
    elsewhere, _ = run.apply(recipe, tmp_path / "other", store)
    assert elsewhere.steps[0].cached and elsewhere.steps[0].digest == step.digest
    assert elsewhere.exports[0].files == export.files


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan")),
        ("model.embed_tokens.weight", float("-inf")),
        ("model.norm.weight", float("inf")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_model_that_is_not_finite_is_refused_by_the_tensor_before_anything_is_measured(
    tensor, value, streaming, place, store, tmp_path
):
    shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[tensor].view(-1)[[3, 7]] = value
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = []
    overrides = (f"model={tmp_path / 'model'}", f"streaming={str(streaming).lower()}")
    recipe = load(place, f"[{{{INT8}}}]", overrides=overrides)
    with pytest.raises(
        NumericalError, match=f": 2 of the [0-9]+ numbers of {tensor} are not finite; get the model anew"
    ):
        run.apply(recipe, tmp_path / "run", store, Reporter(say=said.append))
    assert said == [f"opening {tmp_path / 'model'}"]
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (written["baseline"], written["status"], written["exit_code"]) == (None, "error", 4)


def test_a_calibration_smaller_than_the_channels_is_told_in_the_terminal_and_the_report(place, store, tmp_path):
    recipe = load(place, "[{quantize.gptq: {encoding: int8}, gate: off}]", overrides=("data.calibration.tokens=32",))
    for folder in ("run", "again"):  # the second time from the store
        said = []
        record, _ = run.apply(recipe, tmp_path / folder, store, Reporter(say=said.append))
        (warning,) = [line for line in said if "calibration tokens" in line]
        wide = max(m for _, m in source.facts(source.resolve(recipe.model)).linears.values())
        told = (
            f"32 calibration tokens for {wide} input channels of model.layers.0.mlp.down_proj: its Hessian is singular"
        )
        assert warning.startswith(f"warning: quantize.gptq: {told}")
        assert record.steps[0].notes[0] == warning.removeprefix("warning: quantize.gptq: ")
        assert told.partition(" of ")[0] in (tmp_path / folder / "report.md").read_text()
    assert record.steps[0].cached
    plenty = load(place, "[{quantize.gptq: {encoding: int8}, gate: off}]")
    run.apply(plenty, tmp_path / "plenty", store, Reporter(say=said.append))
    assert len([line for line in said if "calibration tokens" in line]) == 1


def test_a_run_goes_on_after_steps_that_dismiss_the_baseline(place, store, tmp_path):
    budget = "tokens: 256, selection_tokens: 64, checks: 1"
    steps = [
        "prune.magnitude: {sparsity: 0.01, allocation: owl}",  # which makes it read calibration data
        f"distill.logits: {{{budget}, top_k: 16, divergence: js}}",
        f"distill.sequence: {{{budget}, prompt_tokens: 4, new_tokens: 12}}",
        f"distill.hidden: {{{budget}, layers: [[1, 1]]}}",
    ]
    record, _ = run.apply(load(place, f"[{', '.join(f'{{{s}}}' for s in steps)}]"), tmp_path / "run", store)
    assert record.status == "passed", record
    notes = [note for step in record.steps for attempt in step.attempts for note in attempt.notes[:1]]
    assert len(notes) == 4 and "by owl: 0 0.0" in notes[0] and "bytes per token" in notes[1] and "1 from 1" in notes[3]


def test_every_check_sees_a_planted_loss_before_it_is_trusted(place, store, tmp_path):
    record, folder = run.apply(load(place, f"[{{{INT8}}}]"), tmp_path / "run", store)
    assert [(a.metric, a.verdict, a.examples) for a in record.assays] == [
        ("perplexity", "SEEN", 100),
        ("divergence", "SEEN", 100),
    ]
    for a in record.assays:
        assert a.margin < a.planted < 1.1 * a.margin and a.measured == pytest.approx(a.planted, rel=1e-3)
    for name in ("report.md", "report.html"):
        assert "a loss just above each margin was planted" in (folder / name).read_text()
    again, _ = run.apply(load(place, f"[{{{INT8}}}]"), tmp_path / "again", store)
    assert again.assays == record.assays


def test_a_margin_below_the_noise_of_the_dtype_is_invalid(place, store, tmp_path):
    """bfloat16 products alone make a divergence of about 2e-5 here; a margin below that would judge rounding."""
    lossy = ("dtype=bfloat16", "gate.0.divergence.max_mean=1.2e-5", "release.1.divergence.max_mean=1.2e-5")
    said = []
    recipe = load(place, f"[{{{INT8}}}]", overrides=lossy)
    record, folder = run.apply(recipe, tmp_path / "run", store, Reporter(say=said.append))
    noise = {n.metric: n for n in record.noise}
    assert noise["divergence"].floor > 1.2e-5 and set(noise) == {"perplexity", "divergence"}
    assert (record.status, record.exit_code) == ("inconclusive", 4)
    found = {c.metric: c for c in record.steps[0].gate.checks}
    assert found["divergence"].verdict == "INVALID" and "not above the noise" in found["divergence"].definition
    assert any("means nothing here" in line and "noise" in line for line in said)
    for name in ("report.md", "report.html"):
        assert "The baseline was also compared with itself" in (folder / name).read_text()


class Selfish(Divergence):
    """Compares the reference with itself, nearly."""

    def score(self, model, batch, reference=None):
        return [replace(s, total=1e-5 * i) for i, s in enumerate(super().score(reference, batch, reference))]


def test_a_check_that_misses_a_planted_loss_is_invalid_and_nothing_is_published(place, store, tmp_path):
    recipe = load(place, f"[{{{INT2}}}]")  # a ruined model, which the blind check alone would pass
    blind = Selfish(max_mean=0.5)
    recipe = recipe.model_copy(
        update={"release": (blind,), "steps": (recipe.steps[0].model_copy(update={"gate": ()}),)}
    )
    said = []
    record, folder = run.apply(recipe, tmp_path / "run", store, Reporter(say=said.append))
    assert (record.status, record.exit_code) == ("inconclusive", 4)
    assert [a.verdict for a in record.assays] == ["MISSED"]
    (check,) = record.release.checks
    assert check.verdict == "INVALID" and "was planted in the baseline" in check.definition
    assert any("means nothing here" in line for line in said)
    assert "missed: a loss of 0.52" in (folder / "report.md").read_text()


def test_a_damaged_export_is_made_anew(place, store, tmp_path):
    recipe = load(place, f"[{{{INT8}}}]", "[gguf: {}]")
    record, folder = run.apply(recipe, tmp_path / "run", store)
    path = folder / record.exports[0].path / record.exports[0].files[0].name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    again, _ = run.apply(recipe, tmp_path / "run", store)
    raw[-1] ^= 1
    assert again.status == "passed" and path.read_bytes() == bytes(raw)


def test_a_failed_gate_is_exit_3_and_exports_nothing(place, store, tmp_path):
    record, folder = run.apply(load(place, f"[{{{INT4}}}]", "[gguf: {}]"), tmp_path / "run", store)
    assert (record.status, record.exit_code) == ("failed", 3)
    assert not record.exports and not (folder / "artifacts").exists()
    assert record.steps[0].layer_errors == {}  # of what was accepted only
    assert "FAIL" in (folder / "report.md").read_text()


def test_progress_names_the_part_before_a_colon(place, tmp_path):
    heard: list[tuple[str, float]] = []
    reporter = run.Reporter(progress=lambda label, fraction: heard.append((label, fraction)))
    run.apply(load(place, f"[{{{INT8}}}]", "[gguf: {}]"), tmp_path / "run", Store(tmp_path / "home"), reporter)
    parts = dict.fromkeys(label.partition(":")[0] for label, _ in heard)
    gates = ["gate quantize.rtn", "inspect", "gate release", "gate gguf"]
    assert list(parts) == ["assay", "noise", "baseline", "quantize.rtn", *gates]
    assert all(0 <= fraction <= 1 for _, fraction in heard)


def test_too_little_data_is_exit_4(place, store, tmp_path):
    steps = f"[{{{INT8}, gate: [{{perplexity: {{max_increase: 0.001%, max_documents: 60}}}}]}}]"
    record, _ = run.apply(load(place, steps), tmp_path / "run", store)
    assert (record.status, record.exit_code) == ("inconclusive", 4)
    few = place / "few.jsonl"
    few.write_text("".join((place / "text.jsonl").read_text().splitlines(keepends=True)[:60]))
    text = (place / "few.jsonl").as_posix()
    source = RECIPE.format(model=place / "model", text=text, steps=f"[{{{INT8}}}]", export="[]")
    source = source.replace("tokens: 1024", "tokens: 64").replace("tokens: 512", "tokens: 32")
    record, _ = run.apply(recipes.load(source), tmp_path / "few", store)
    assert (record.status, record.exit_code) == ("inconclusive", 4)
    assert record.steps[0].gate.checks[0].verdict == "INVALID"


def test_a_plan_that_cannot_work_is_refused_before_anything_is_written(place, store, tmp_path):
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+ .*int2"):
        run.apply(load(place, f"[{{{INT2}}}]", "[gguf: {}]"), tmp_path / "run", store)
    assert not (tmp_path / "run").exists()


def test_a_step_that_changes_nothing_is_said(place, store, tmp_path):
    said: list[str] = []
    nothing = "prune.magnitude: {sparsity: 0.0}"
    steps = f"[{{{nothing}}}, {{{INT8}}}]"
    record, folder = run.apply(load(place, steps), tmp_path / "run", store, Reporter(say=said.append))
    assert [step.unchanged for step in record.steps] == [True, False]
    assert [a.unchanged for step in record.steps for a in step.attempts] == [True, False]
    assert record.steps[0].gate.verdict == "PASS"  # no loss is no loss, and the reader is told
    assert any("prune.magnitude" in line and "changed nothing" in line for line in said)
    assert sum("changed nothing" in line for line in said) == 1
    read = json.loads((folder / "run.json").read_text())
    assert read["steps"][0]["unchanged"] and not read["steps"][1]["unchanged"]
    for name in ("report.md", "report.html"):
        assert (folder / name).read_text().count("changed nothing") == 1
    assert "changed nothing" in next(line for line in summary_lines(read) if "prune.magnitude" in line)
    assert sum("changed nothing" in line for line in summary_lines(read)) == 1


def test_set_changes_the_key_and_is_recorded(place, store, tmp_path):
    one = load(place, f"[{{{INT8}}}]")
    two = load(place, f"[{{{INT8}}}]", overrides=("steps.0.group_size=16",))
    first, _ = run.apply(one, tmp_path / "a", store)
    second, folder = run.apply(two, tmp_path / "b", store)
    assert first.key != second.key and "group_size: 16" in (folder / "recipe.resolved.yaml").read_text()


def test_a_damaged_store_entry_is_set_aside_and_computed_anew(place, store, tmp_path):
    recipe = load(place, f"[{{{INT8}}}]")
    record, _ = run.apply(recipe, tmp_path / "a", store)
    for manifest in (store.root / "artifacts").glob("*/compression.json"):
        manifest.write_text("{")
    for kept in (store.root / "records").rglob("*.json"):
        kept.write_text(kept.read_text().replace("1", "2", 1))
    again, _ = run.apply(recipe, tmp_path / "b", store)
    assert again.status == "passed" and again.steps[0].digest == record.steps[0].digest
    assert list((store.root / "quarantine").iterdir())


def test_a_folder_in_use_is_exit_7_and_left_alone(place, store, tmp_path):
    recipe = load(place, f"[{{{INT8}}}]")
    (tmp_path / "run").mkdir()
    with lock.hold(tmp_path / "run"), pytest.raises(Locked, match=f"process {os.getpid()};"):
        run.apply(recipe, tmp_path / "run", store)
    assert not list((tmp_path / "run").iterdir())
    record, folder = run.apply(recipe, tmp_path / "run", store)
    assert record.status == "passed" and not (folder / ".lock").exists()


def test_an_entry_of_the_store_that_is_there_stays(place, store, tmp_path):
    model = tiny()
    path = store.save(model, "entry")
    before = (path / "model.safetensors").stat().st_ino
    assert store.save(model, "entry") == path and (path / "model.safetensors").stat().st_ino == before


def test_a_folder_used_again_keeps_no_artifact_of_an_earlier_recipe(place, store, tmp_path):
    run.apply(load(place, f"[{{{INT8}}}]", "[gguf: {}]"), tmp_path / "run", store)
    assert (tmp_path / "run" / "artifacts").exists()
    record, folder = run.apply(load(place, f"[{{{INT4}}}]", "[gguf: {}]"), tmp_path / "run", store)
    assert record.status == "failed" and not (folder / "artifacts").exists()


def test_an_unforeseen_failure_is_on_record(place, store, tmp_path):
    def fail(line: str) -> None:
        assert json.loads((tmp_path / "run" / "run.json").read_text())["error"] == run.UNFINISHED
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run.apply(load(place, f"[{{{INT8}}}]"), tmp_path / "run", store, run.Reporter(say=fail))
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (found["status"], found["exit_code"]) == ("error", 6) and "No space left" in found["error"]


def test_a_baseline_at_chance_proves_no_accuracy_and_nothing_is_published(place, store, tmp_path):
    overrides = ("release.0={accuracy: {tasks: [minimal_pairs], max_drop: 3.0}}",)
    recipe = load(place, f"[{{{INT8}}}]", "[gguf: {}]", overrides)
    record, _ = run.apply(recipe, tmp_path / "run", store)
    assert (record.status, record.exit_code, record.exports) == ("inconclusive", 4, [])
    (check,) = (c for c in record.release.checks if c.metric == "accuracy")
    assert (check.verdict, check.source) == ("INVALID", "minimal_pairs")
    assert "not proven to exceed 59% (chance and three margins)" in check.definition


def test_a_selection_that_fills_no_window_costs_the_layer_errors_alone(place, store, tmp_path):
    said: list[str] = []
    (tmp_path / "short.jsonl").write_text('{"text": "a word"}\n')
    recipe = load(place, f"[{{{INT8}}}]", overrides=(f"data.selection.source=file:{tmp_path}/short.jsonl",))
    record, _ = run.apply(recipe, tmp_path / "run", store, run.Reporter(say=said.append))
    assert record.status == "passed" and record.steps[0].layer_errors == {}
    (line,) = (line for line in said if "layer errors" in line)
    assert "are not measured: selection source file:" in line and "tokens fill no window of 32" in line


def test_a_model_swapped_while_it_is_opened_is_not_kept_as_the_one_before(place, tmp_path):
    other, home = tmp_path / "other", Store(tmp_path / "home")
    shutil.copytree(place / "model", tmp_path / "model")
    tiny(seed=1).module.save_pretrained(other)
    recipe = load(place, f"[{{{INT8}}}]", overrides=(f"model={tmp_path / 'model'}",))

    def swap(line: str) -> None:
        if line.startswith("opening"):
            os.replace(other / "model.safetensors", tmp_path / "model" / "model.safetensors")

    with pytest.raises(Corrupt, match="its files changed while they were read; run again"):
        run.apply(recipe, tmp_path / "run", home, Reporter(say=swap))
    assert not list((home.root / "artifacts").iterdir())
    record, _ = run.apply(recipe, tmp_path / "run", home)
    assert record.status == "passed"
    kept = artifact.load(home.find(record.baseline.digest)).parameter("model.embed_tokens.weight")
    assert torch.equal(kept, tiny(seed=1).parameter("model.embed_tokens.weight"))


def test_a_baseline_swapped_in_the_store_is_made_anew(place, tmp_path):
    """The compressed model in the baseline's place would find no loss in itself."""
    home = Store(tmp_path / "home")
    first, _ = run.apply(load(place, f"[{{{INT8}}}]"), tmp_path / "a", home)
    baseline, step = home.find(first.baseline.digest), home.find(first.steps[0].digest)
    shutil.rmtree(baseline)
    shutil.copytree(step, baseline)
    again, _ = run.apply(load(place, f"[{{{INT4}}}]"), tmp_path / "b", home)
    assert again.status == "failed" and again.baseline == first.baseline
    assert [p.name.split(".")[0] for p in (home.root / "quarantine").iterdir()] == [baseline.name]


def test_states_are_recalled_for_the_very_same_weights_alone(place, tmp_path):
    recipe, folder = load(place, f"[{{{INT8}}}]"), tmp_path / "baseline"
    bench = Workbench(recipe, Store(tmp_path), Reporter(), source.resolve(recipe.model), [], baseline=folder)
    artifact.save(tiny(), folder)
    first = bench.model(folder).recalled
    bench.close()
    assert first is not None and bench.model(folder).recalled is first
    bench.close()
    shutil.rmtree(folder)
    artifact.save(tiny(seed=1), folder)
    assert bench.model(folder).recalled is not first
