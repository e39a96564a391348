"""`apply`: carry out a recipe, gate every step, export what passes, gate the artifacts, and write it all down."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import artifact, data, lock, machine, plan, publishing, source
from compress.encodings import EncodedTensor, same_stored
from compress.errors import Corrupt, exit_code, one_line
from compress.gate import Gate, GateResult, Sizes, combine
from compress.interfaces import Context, Documents, Evaluator, Exporter, LanguageModel, Progress, Step
from compress.measure import measure
from compress.parity import decode_check
from compress.plugin import evaluator
from compress.recipe import ExportEntry, Recipe, StepEntry
from compress.record import Attempt, Baseline, ExportRecord, FileRecord, Metric, RunRecord, StepRecord
from compress.store import Store, key_of, write_atomic

if TYPE_CHECKING:
    from compress.model import Model

BASELINE_DOCUMENTS = 100  # of each source, for the baseline's own figures
UNFINISHED = "not finished: in progress, or killed; run the same command again to resume"
_LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "llama-cpp-python",
    "gguf",
)
_STATUS = {
    "PASS": ("passed", 0),
    "FAIL": ("failed", 3),
    "INCONCLUSIVE": ("inconclusive", 4),
    "INVALID": ("inconclusive", 4),
}


@dataclass(frozen=True)
class Reporter:
    """Where a run tells what it is doing: `say` a line, `progress` a fraction."""

    say: Callable[[str], None] = lambda line: None
    progress: Progress = lambda label, fraction: None


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
    opened = source.download(source.resolve(recipe.model))
    splits = data.split(plan.requests(recipe), recipe.seed)
    key = _run_key(recipe, source.digest(opened), [s.digest for s in splits])
    folder = run_dir or Path("runs") / f"{recipe.name}-{key[:12]}"
    if (finished := _finished(folder, key)) is not None:
        reporter.say(f"nothing to do: {folder} holds this very run, every file verified")
        return finished, folder
    for warning in plan.check(recipe, source.facts(opened)):
        reporter.say(f"warning: {warning}")
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        recipe=recipe.name, key=key, versions=_versions(), host=_host(), data=[_describe(s) for s in splits]
    )
    with lock.hold(folder):
        work = _Work(recipe, folder, store or Store(), reporter, record, opened, splits)
        _carry_out(work)
    return record, folder


def _carry_out(work: _Work) -> None:
    """The run, with its record on disk from beginning to end, whatever ends it."""
    record, folder = work.record, work.folder
    work.store.sweep()
    publishing.sweep(folder)
    write_atomic(folder / "recipe.resolved.yaml", work.recipe.to_yaml())
    record.error = UNFINISHED
    _write(record, folder)
    try:
        work.run()
        record.error = None
    except BaseException as error:  # a signal, too
        record.status, record.exit_code, record.error = "error", exit_code(error), one_line(error)
        raise
    finally:
        work.close()
        _write(record, folder)


@dataclass
class _Work:
    """One run in progress."""

    recipe: Recipe
    folder: Path
    store: Store
    reporter: Reporter
    record: RunRecord
    source: source.Source
    splits: Sequence[data.Split]
    _open: dict[str, Model] = field(default_factory=dict)  # artifact path → model, the latest two

    def run(self) -> None:
        """Baseline, steps, release, exports; stops at the first gate that does not pass."""
        parent = self._baseline()
        for entry in self.recipe.steps:
            accepted = self._step(entry, parent)
            if accepted is None:
                return self._conclude(self.record.steps[-1].gate)
            parent = accepted
        self.record.release = self._gate(self.recipe.release, parent, parent=None, label="release")
        self._say_gate("release", self.record.release)
        if self.record.release.verdict != "PASS":
            return self._conclude(self.record.release)
        self._export(parent)
        verdict = combine([self.record.release.verdict, *(e.gate.verdict for e in self.record.exports)])
        return self._conclude(GateResult(verdict=verdict, checks=[]))

    def _conclude(self, gate: GateResult | None) -> None:
        assert gate is not None
        status, self.record.exit_code = _STATUS[gate.verdict]
        self.record.status = status  # type: ignore[assignment]
        if not any(e.path for e in self.record.exports):  # an earlier run in this folder proved something else
            shutil.rmtree(self.folder / "artifacts", ignore_errors=True)

    # --- models ------------------------------------------------------------------------------------------

    def _baseline(self) -> Path:
        key = key_of({"baseline": source.digest(self.source), "versions": _step_versions()})
        folder = self.store.artifact(key)
        if folder is None:
            self.reporter.say(f"opening {self.recipe.model}")
            model = source.load(self.recipe.model, self.recipe.dtype)
            folder = self.store.save(model, key)
        self._baseline_path = folder
        facts = artifact.manifest(folder)
        metrics = [self._baseline_metric(folder, documents) for documents in self._evaluation()]
        self.record.baseline = Baseline(
            model=self.recipe.model,
            digest=artifact.digest(folder),
            size_bytes=facts["size_bytes"],
            metrics=metrics,
        )
        return folder

    def _baseline_metric(self, folder: Path, documents: Documents) -> Metric:
        perplexity = evaluator("perplexity").model_construct()  # measures, and needs no margin
        some = replace(documents, documents=documents.documents[:BASELINE_DOCUMENTS])

        def progress(what: str, done: float) -> None:
            self.reporter.progress(f"baseline: {what}", done)

        def compute() -> Any:
            model = self._model(folder)
            return measure(perplexity, model, some, cache=self.store, progress=progress).model_dump(mode="json")

        facts = {"metric": "perplexity", "model": artifact.digest(folder), **self._conditions(some)}
        return Metric.model_validate(self._recorded({**facts, "documents": BASELINE_DOCUMENTS}, compute))

    def _recorded(self, facts: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """A stored value by what determines it, computed where it is absent."""
        key = key_of(facts)
        found = self.store.get(key)
        if found is None:
            found = compute()
            self.store.put(key, found)
        return found

    def _model(self, folder: Path) -> Model:
        """An artifact opened; the baseline stays, and one other."""
        name = str(folder)
        if name not in self._open:
            for other in [k for k in self._open if k != str(self._baseline_path)]:
                self._open.pop(other).close()
            try:
                self._open[name] = artifact.load(folder, self.recipe.dtype)
            except Corrupt as error:
                self.store.quarantine(folder, error)
                raise
        return self._open[name]

    def close(self) -> None:
        """Release every open model."""
        for model in self._open.values():
            model.close()
        self._open.clear()

    # --- steps -------------------------------------------------------------------------------------------

    def _step(self, entry: StepEntry, parent: Path) -> Path | None:
        """Try the step and its alternatives from the same parent; the accepted artifact, or None."""
        attempts: list[Attempt] = []
        for step in entry.attempts:
            folder, made = self._apply_step(step, parent)
            gate = None
            if entry.gate:
                gate = self._gate(entry.gate, folder, parent, step.name, len(entry.attempts))
            facts = artifact.manifest(folder)
            attempts.append(
                Attempt(
                    name=step.name,
                    params=step.model_dump(mode="json"),
                    verdict=gate.verdict if gate else "UNGATED",
                    checks=gate.checks if gate else [],
                    seconds=made["seconds"],
                    cached=made["cached"],
                    size_bytes=facts["size_bytes"],
                    bits_per_weight=facts["bits_per_weight"],
                    notes=made["notes"],
                )
            )
            accepted = gate is None or gate.verdict == "PASS"
            self._say_gate(f"{step.name} {_brief(step)}", gate)
            if accepted:
                break
        record = StepRecord(
            parent=artifact.digest(parent),
            digest=artifact.digest(folder),
            peak_rss_bytes=made["peak_rss_bytes"],
            parameters=facts["parameters"],
            gate=gate,
            gate_off=list(entry.gate_off),
            attempts=attempts,
            **attempts[-1].model_dump(exclude={"verdict", "checks"}),
        )
        self.record.steps.append(record)
        _write(self.record, self.folder)
        return folder if accepted else None

    def _apply_step(self, step: Step, parent: Path) -> tuple[Path, dict[str, Any]]:
        """The artifact that a step makes of its parent, from the store or made now."""
        needs = {"calibration": step.uses_calibration, "selection": step.uses_selection}
        key = key_of(
            {
                "parent": artifact.digest(parent),
                "step": [step.name, step.version, step.model_dump(mode="json")],
                "data": [s.digest for s in self.splits if needs.get(s.request.role)],
                "teacher": artifact.digest(self._baseline_path) if step.recovers else None,
                "seed": self.recipe.seed,
                "versions": _step_versions(),
            }
        )
        folder, made = self.store.artifact(key), self.store.get(f"{key}.made")
        if folder is not None and made is not None:
            return folder, {**made, "cached": True}
        self.reporter.say(f"{step.name} {_brief(step)}")
        started = time.monotonic()
        model = artifact.load(parent, self.recipe.dtype)  # its own copy: the step changes it in place
        context = Context(
            seed=self.recipe.seed,
            calibration=self._windows("calibration", model) if needs["calibration"] else (),
            selection=self._windows("selection", model) if needs["selection"] else (),
            teacher=lambda: self._model(self._baseline_path),
            progress=self.reporter.progress,
        )
        step.apply(model, context)
        model.touch()
        folder = self.store.save(model, key)
        model.close()
        made = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "notes": context.notes,
        }
        self.store.put(f"{key}.made", made)
        return folder, {**made, "cached": False}

    def _windows(self, role: str, model: Model) -> Sequence[Any]:
        (part,) = [s for s in self.splits if s.request.role == role]
        separator = min(model.eos_ids) if model.eos_ids else 0
        return data.pack(part, model.encode, separator)

    # --- gates -------------------------------------------------------------------------------------------

    def _evaluation(self) -> list[Documents]:
        return [
            Documents(s.request.source, [(d.id, d.text) for d in s.documents], s.digest, s.request.length)
            for s in self.splits
            if s.request.role == "evaluation"
        ]

    def _conditions(self, *datasets: Documents) -> dict[str, Any]:
        """What scores depend on besides the model and the check."""
        return {
            "data": [[d.source, d.digest, d.length] for d in datasets],
            "dtype": self.recipe.dtype,
            "host": _host(),
            "versions": _versions(),
        }

    def _gate(
        self, checks: Sequence[Evaluator], folder: Path, parent: Path | None, label: str, attempts: int = 1
    ) -> GateResult:
        facts = artifact.manifest(folder)
        sizes = Sizes(facts["size_bytes"], facts["bits_per_weight"])
        against_parent = parent is not None and any(c.against == "parent" for c in checks)
        datasets = self._evaluation()

        def compute() -> Any:
            baseline = self._model(self._baseline_path)
            previous = artifact.load(parent, self.recipe.dtype) if against_parent and parent else None
            model = artifact.load(folder, self.recipe.dtype)
            try:
                return (
                    Gate(tuple(checks))
                    .evaluate(
                        model,
                        baseline,
                        datasets,
                        parent=previous,
                        sizes=sizes,
                        attempts=attempts,
                        cache=self.store,
                        progress=lambda what, done: self.reporter.progress(f"gate {label}: {what}", done),
                    )
                    .model_dump(mode="json")
                )
            finally:
                model.close()

        facts_of_gate = {
            "gate": _checks(checks),
            "model": artifact.digest(folder),
            "baseline": artifact.digest(self._baseline_path),
            "parent": artifact.digest(parent) if against_parent and parent else None,
            "attempts": attempts,
            **self._conditions(*datasets),
        }
        return GateResult.model_validate(self._recorded(facts_of_gate, compute))

    def _say_gate(self, label: str, gate: GateResult | None) -> None:
        if gate is None:
            self.reporter.say(f"  {label}: not gated")
            return
        shown = ", ".join(
            f"{c.metric} {c.loss:+.4f} ≤ {c.upper:+.4f} (margin {c.margin:.4f}, n={c.examples})" for c in gate.checks
        )
        self.reporter.say(f"  {gate.verdict}  {label}: {shown}")

    # --- exports -----------------------------------------------------------------------------------------

    def _export(self, final: Path) -> None:
        """Write, check and gate each artifact; publish all of them, or none."""
        target = self.folder / "artifacts"
        names = _folder_names(self.recipe.export)
        with publishing.staging(target) as staging:
            for name, entry in zip(names, self.recipe.export):
                self.record.exports.append(self._export_one(entry, final, staging / name))
            if self.recipe.export and all(e.gate.verdict == "PASS" for e in self.record.exports):
                publishing.publish(staging, target)
                for name, made in zip(names, self.record.exports):
                    made.path = f"artifacts/{name}"

    def _export_one(self, entry: ExportEntry, final: Path, out: Path) -> ExportRecord:
        started = time.monotonic()
        exporter = entry.exporter
        self.reporter.say(f"exporting {exporter.name}")
        out.mkdir(parents=True)
        model = self._model(final)
        exporter.write(model, out)
        exact = weights_exact(model, exporter, out)
        if final != self._baseline_path:
            self._open.pop(str(final)).close()  # the runtime holds a copy of its own from here on
            del model
        written = time.monotonic() - started
        files = [
            FileRecord(name=str(p.relative_to(out)), bytes=p.stat().st_size, sha256=artifact.file_sha256(p))
            for p in sorted(out.rglob("*"))
            if p.is_file()
        ]
        size = sum(f.bytes for f in files)
        facts = artifact.manifest(final)
        opened = exporter.open(out)
        try:
            sizes = Sizes(size, facts["bits_per_weight"])
            gate = self._gate_artifact(entry, opened, exact, sizes, files, exporter.name)
            runtime, compute = opened.runtime, opened.compute
        finally:
            opened.close()
        self._say_gate(f"{exporter.name} in {runtime}", gate)
        return ExportRecord(
            format=exporter.name,
            params=exporter.model_dump(mode="json"),
            path="",
            files=files,
            size_bytes=size,
            bits_per_weight=facts["bits_per_weight"],
            runtime=runtime,
            weights_exact=exact,
            compute=compute,
            seconds=round(written, 1),
            gate=gate,
        )

    def _gate_artifact(
        self,
        entry: ExportEntry,
        opened: LanguageModel,
        exact: bool,
        sizes: Sizes,
        files: Sequence[FileRecord],
        label: str,
    ) -> GateResult:
        """The release checks in the artifact's own runtime, through prefill and through decoding."""
        datasets = self._evaluation()

        def progress(what: str, done: float) -> None:
            self.reporter.progress(f"gate {label}: {what}", done)

        def compute() -> Any:
            baseline = self._model(self._baseline_path)
            prefill = Gate(entry.gate).evaluate(
                opened, baseline, datasets, sizes=sizes, cache=self.store, progress=progress
            )
            checks = [*prefill.checks, *decode_check(opened, datasets, progress)]
            return GateResult(verdict=combine([c.verdict for c in checks]), checks=checks).model_dump(mode="json")

        facts = {
            "gate": _checks(entry.gate),
            "files": [[f.name, f.sha256] for f in files],
            "runtime": [opened.runtime, opened.compute],
            "baseline": artifact.digest(self._baseline_path),
            **self._conditions(*datasets),
        }
        result = GateResult.model_validate(self._recorded(facts, compute))
        if not exact:
            raise Corrupt(f"{label}: the file does not hold the gated weights; nothing is published")
        return result


def weights_exact(model: Model, exporter: Exporter, path: Path) -> bool:
    """Whether every tensor of the model, read back from the files, is stored bit for bit as it was gated."""
    import torch

    expected = dict(model.tensors())
    for name, found in exporter.stored(path):
        if name not in expected:
            return False
        wanted = expected.pop(name)
        if isinstance(wanted, EncodedTensor) and isinstance(found, EncodedTensor):
            if not same_stored(wanted, found):
                return False
        else:
            a, b = (t.decode() if isinstance(t, EncodedTensor) else t for t in (wanted, found))
            if a.shape != b.shape or not torch.equal(a.float().view(torch.int32), b.float().view(torch.int32)):
                return False
    return not expected


def _checks(checks: Sequence[Evaluator]) -> list[Any]:
    return [[c.name, c.version, c.model_dump(mode="json")] for c in checks]


def _folder_names(entries: Sequence[ExportEntry]) -> list[str]:
    """A folder per export: onnx, and onnx-2 for a second one of the same format."""
    seen: dict[str, int] = {}
    names = []
    for entry in entries:
        count = seen[entry.exporter.name] = seen.get(entry.exporter.name, 0) + 1
        names.append(entry.exporter.name if count == 1 else f"{entry.exporter.name}-{count}")
    return names


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
            "data": list(splits),
            "versions": _versions(),
            "host": _host(),
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


def _versions() -> dict[str, str]:
    found = {"compress-toolkit": _version("compress-toolkit"), "python": platform.python_version()}
    return found | {name: _version(name) for name in _LIBRARIES}


def _step_versions() -> dict[str, str]:
    """Versions that decide what a step computes."""
    return {name: _version(name) for name in ("torch", "transformers", "numpy")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _host() -> dict[str, str | int]:
    """What decides floating-point results besides versions: processor and threads."""
    return {"machine": platform.machine(), "processor": machine.processor(), "cpus": len(os.sched_getaffinity(0))}
