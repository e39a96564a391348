"""`apply`: carry out a recipe, gate every step, export what passes, gate the artifacts, and write it all down."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import artifact, data, environment, exporting, holdout, lock, publishing, recipe_data, refusals, source
from compress.decisions import combine
from compress.errors import exit_code, one_line
from compress.gate import GateResult
from compress.interfaces import Context, Step
from compress.machine import peak_memory
from compress.recipe import Recipe, StepEntry
from compress.record import Attempt, RunRecord, StepRecord
from compress.scarcity import scarcity
from compress.store import Store, key_of, write_atomic
from compress.workbench import Reporter, Workbench

UNFINISHED = "not finished: in progress, or killed; run the same command again to resume"
UNCHANGED = "changed nothing: every stored tensor is its parent's, bit for bit"
_STATUS = {
    "PASS": ("passed", 0),
    "FAIL": ("failed", 3),
    "INCONCLUSIVE": ("inconclusive", 4),
    "INVALID": ("inconclusive", 4),
}


def apply(
    recipe: Recipe,
    run_dir: Path | None = None,
    store: Store | None = None,
    reporter: Reporter | None = None,
) -> tuple[RunRecord, Path]:
    """Carry out a recipe; returns the run's record and its folder. Equal inputs re-use finished work.

    A gate that does not pass is no exception: see `status` and `exit_code` of the record. Raises CompressError
    for everything else, after writing what is known.
    """
    reporter = reporter or Reporter()
    if recipe.data.holdout is not None:
        holdout.checks(recipe)  # that some of them read it
    opened = source.download(source.resolve(recipe.model))
    splits = data.split(recipe_data.requests(recipe), recipe.seed)
    key = _run_key(recipe, source.digest(opened), [s.digest for s in splits])
    folder = run_dir or Path("runs") / f"{recipe.name}-{key[:12]}"
    if (finished := _finished(folder, key)) is not None:
        reporter.say(f"nothing to do: {folder} holds this very run, every file verified")
        return finished, folder
    refusals.check_documents(recipe, source.facts(opened), splits)
    for warning in refusals.check(recipe, source.facts(opened)):
        reporter.say(f"warning: {warning}")
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        recipe=recipe.name,
        key=key,
        versions=environment.versions(),
        host=environment.host(),
        data=[_describe(s) for s in splits],
    )
    with lock.hold(folder):
        bench = Workbench(recipe, store or Store(), reporter, opened, splits)
        _carry_out(_Work(bench, folder, record))
    return record, folder


def _carry_out(work: _Work) -> None:
    """The run, with its record on disk from beginning to end, whatever ends it."""
    record, folder = work.record, work.folder
    work.bench.store.sweep()
    publishing.sweep(folder)
    write_atomic(folder / "recipe.resolved.yaml", work.bench.recipe.to_yaml())
    record.error = UNFINISHED
    _write(record, folder)
    try:
        work.run()
        record.error = None
    except BaseException as error:  # a signal, too
        record.status, record.exit_code, record.error = "error", exit_code(error), one_line(error)
        raise
    finally:
        work.bench.close()
        _write(record, folder)


@dataclass
class _Work:
    """One run in progress."""

    bench: Workbench
    folder: Path
    record: RunRecord

    def run(self) -> None:
        """Baseline, steps, release, exports; stops at the first gate that does not pass."""
        recipe = self.bench.recipe
        self.record.baseline = self.bench.open_baseline()
        self.record.assays = [found for own in self.bench.assays.values() for found in own]
        self.record.noise = [found for own in self.bench.noises.values() for found in own]
        parent = self.bench.baseline
        for entry in recipe.steps:
            accepted = self._step(entry, parent)
            if accepted is None:
                return self._conclude(self.record.steps[-1].gate)
            parent = accepted
        self.record.release = self.bench.gate(recipe.release, parent, parent=None, label="release")
        self._say_gate("release", self.record.release)
        if self.record.release.verdict != "PASS":
            return self._conclude(self.record.release)
        self._look_at_holdout(parent)
        if self.record.holdout is not None and self.record.holdout.gate.verdict != "PASS":
            return self._conclude(self.record.holdout.gate)
        self._export(parent)
        verdict = combine([self.record.release.verdict, *(e.gate.verdict for e in self.record.exports)])
        return self._conclude(GateResult(verdict=verdict, checks=[]))

    def _look_at_holdout(self, final: Path) -> None:
        """Let the final model see the holdout, if the recipe keeps one, and put that on record beforehand."""
        bench, recipe = self.bench, self.bench.recipe
        for held in recipe_data.evaluation(bench.splits, "holdout"):
            checks, left_out = holdout.checks(recipe)
            baseline, model = artifact.digest(bench.baseline), artifact.digest(final)
            use, before = holdout.spend(bench.store, baseline, held, model, recipe.name)
            divided = holdout.attempts(use)
            if before:
                seen = f"{len(before)} models before this one have seen it ({', '.join(dict.fromkeys(before))})"
                bench.reporter.say(f"warning: the holdout is not fresh: {seen}; the allowed error is 1/{divided}")
            gate = bench.gate(checks, final, parent=None, label="holdout", attempts=divided, datasets=[held])
            facts = {"source": held.source, "documents": len(held.documents), "digest": held.digest}
            self.record.holdout = holdout.Holdout(use=use, before=before, left_out=left_out, gate=gate, **facts)
            self._say_gate(f"holdout, use {use}", gate)

    def _conclude(self, gate: GateResult | None) -> None:
        assert gate is not None
        status, self.record.exit_code = _STATUS[gate.verdict]
        self.record.status = status  # type: ignore[assignment]
        if not any(e.path for e in self.record.exports):  # an earlier run in this folder proved something else
            shutil.rmtree(self.folder / "artifacts", ignore_errors=True)

    # --- steps -------------------------------------------------------------------------------------------

    def _step(self, entry: StepEntry, parent: Path) -> Path | None:
        """Try the step and its alternatives from the same parent; the accepted artifact, or None."""
        attempts: list[Attempt] = []
        for step in entry.attempts:
            folder, made = self._make(step, parent)
            gate = None
            if entry.gate:
                gate = self.bench.gate(entry.gate, folder, parent, step.name, len(entry.attempts))
            attempts.append(_attempt(step, gate, folder, made, parent))
            if attempts[-1].unchanged:
                self.bench.reporter.say(f"warning: {step.name} {_brief(step)} {UNCHANGED}")
            accepted = gate is None or gate.verdict == "PASS"
            self._say_gate(f"{step.name} {_brief(step)}", gate)
            if accepted:
                break
        record = StepRecord(
            parent=artifact.digest(parent),
            digest=artifact.digest(folder),
            peak_rss_bytes=made["peak_rss_bytes"],
            parameters=artifact.manifest(folder)["parameters"],
            gate=gate,
            gate_off=list(entry.gate_off),
            attempts=attempts,
            layer_errors=self.bench.layer_errors(folder) if accepted else {},
            encodings=artifact.encodings(folder) if accepted else {},
            **attempts[-1].model_dump(exclude={"verdict", "checks"}),
        )
        self.record.steps.append(record)
        _write(self.record, self.folder)
        return folder if accepted else None

    def _make(self, step: Step, parent: Path) -> tuple[Path, dict[str, Any]]:
        """The artifact that a step makes of its parent, from the store or made now."""
        bench = self.bench
        needs = {"calibration": step.uses_calibration, "selection": step.uses_selection}
        key = key_of(
            {
                "parent": artifact.digest(parent),
                "step": [step.name, step.version, step.model_dump(mode="json")],
                "data": [s.digest for s in bench.splits if needs.get(s.request.role)],
                "teacher": artifact.digest(bench.baseline) if step.recovers else None,
                "seed": bench.recipe.seed,
                "versions": environment.step_versions(),
                "reads": step.reads(),
            }
        )
        if (known := bench.store.made(key)) is not None:
            self._warn(step, known[1].get("warnings", ()))
            return known[0], {**known[1], "cached": True}
        bench.reporter.say(f"{step.name} {_brief(step)}")
        started = time.monotonic()
        with bench.store.work(key) if step.recovers else nullcontext() as work:
            model = artifact.load(parent, bench.recipe.dtype)  # its own copy: the step changes it in place
            context = Context(
                seed=bench.recipe.seed,
                calibration=bench.windows("calibration", model) if needs["calibration"] else (),
                selection=bench.windows("selection", model) if needs["selection"] else (),
                dataset=bench.source_of("calibration") if needs["calibration"] else "",
                teacher=lambda: bench.model(bench.baseline),
                dismiss=bench.close,
                progress=bench.progress(step.name),
                work=work,
            )
            said = scarcity(step, model.facts, sum(map(len, context.calibration)))
            warnings = [said] if said else []
            self._warn(step, warnings)
            step.apply(model, context)
            model.touch()
            folder = bench.store.save(model, key)
            model.close()
        made = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_rss_bytes": peak_memory(),
            "notes": [*warnings, *context.notes],
            "warnings": warnings,
        }
        bench.store.remember(key, made)
        return folder, {**made, "cached": False}

    def _warn(self, step: Step, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self.bench.reporter.say(f"warning: {step.name}: {warning}")

    def _say_gate(self, label: str, gate: GateResult | None) -> None:
        if gate is None:
            self.bench.reporter.say(f"  {label}: not gated")
            return
        shown = ", ".join(
            f"{c.metric} {c.loss:+.4f} ≤ {c.upper:+.4f} (margin {c.margin:.4f}, n={c.examples})" for c in gate.checks
        )
        self.bench.reporter.say(f"  {gate.verdict}  {label}: {shown}")
        for c in (c for c in gate.checks if c.review):
            self.bench.reporter.say(f"  review: {c.metric} on {c.source}: {c.review}")

    # --- exports -----------------------------------------------------------------------------------------

    def _export(self, final: Path) -> None:
        """Write, check and gate each artifact; publish all of them, or none."""
        entries, target = self.bench.recipe.export, self.folder / "artifacts"
        names = exporting.folder_names(entries)
        with publishing.staging(target) as staging:
            for name, entry in zip(names, entries):
                made = exporting.export(self.bench, entry, final, staging / name)
                self._say_gate(f"{made.format} in {made.runtime}", made.gate)
                self.record.exports.append(made)
            if entries and all(e.gate.verdict == "PASS" for e in self.record.exports):
                for name, entry, made in zip(names, entries, self.record.exports):
                    exporting.describe(self.bench, entry, made, self.record, final, staging / name)
                publishing.publish(staging, target)
                for name, made in zip(names, self.record.exports):
                    made.path = f"artifacts/{name}"


def _attempt(step: Step, gate: GateResult | None, folder: Path, made: dict[str, Any], parent: Path) -> Attempt:
    facts = artifact.manifest(folder)
    unchanged = facts["model_digest"] == artifact.manifest(parent)["model_digest"]
    return Attempt(
        name=step.name,
        params=step.model_dump(mode="json"),
        verdict=gate.verdict if gate else "UNGATED",
        checks=gate.checks if gate else [],
        seconds=made["seconds"],
        cached=made["cached"],
        size_bytes=facts["size_bytes"],
        bits_per_weight=facts["bits_per_weight"],
        notes=[*made["notes"], *([UNCHANGED] if unchanged else [])],
        unchanged=unchanged,
    )


def _brief(step: Step) -> str:
    """The fields that were set, for a line of progress."""
    return " ".join(f"{k}={v}" for k, v in step.model_dump(mode="json", exclude_unset=True).items())


def _describe(part: data.Split) -> dict[str, Any]:
    request = part.request
    return {
        "role": request.role,
        "source": request.source,
        "documents": len(part.documents),
        "dropped": list(part.dropped),
        "digest": part.digest,
    }


def _run_key(recipe: Recipe, model: str, splits: Sequence[str]) -> str:
    return key_of(
        {
            "recipe": recipe.resolved(),
            "plugins": sorted({(p.name, p.version) for p in _plugins(recipe)}),
            "model": model,
            "data": [*splits, *(check.reads() for check in recipe.checks())],
            "teachers": [step.reads() for entry in recipe.steps for step in entry.attempts],
            "versions": environment.versions(),
            "host": environment.host(),
        }
    )


def _plugins(recipe: Recipe) -> Iterator[Any]:
    for entry in recipe.steps:
        yield from (*entry.attempts, *entry.gate)
    yield from recipe.release
    for export in recipe.export:
        yield from (export.exporter, *export.gate)


def _finished(folder: Path, key: str) -> RunRecord | None:
    """The record in `folder` if it is this very run, finished, with every exported file as it was written."""
    try:
        record = RunRecord.model_validate_json((folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    if record.key != key or record.status == "error":
        return None
    for export in (e for e in record.exports if e.path):
        for file in export.files:
            path = folder / export.path / file.name
            if not path.is_file() or artifact.file_sha256(path) != file.sha256:
                return None
    return record


def _write(record: RunRecord, folder: Path) -> None:
    from compress import report

    text = record.to_json()
    report.write(json.loads(text), folder)
    write_atomic(folder / "run.json", text)  # last: a finished record vouches for the rest
