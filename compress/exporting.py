"""Exports: an artifact written, read back bit for bit, and gated in the runtime that will execute it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import artifact, lineage, noise, provenance, timing, zeros
from compress.decisions import combine
from compress.encodings import EncodedTensor, Encoding, same_stored
from compress.errors import Corrupt, RecipeError
from compress.gate import Gate, GateResult, Sizes
from compress.interfaces import Exporter, LanguageModel
from compress.parity import VERSION as PARITY_VERSION
from compress.parity import decode_check, parity_checks
from compress.provenance import facts
from compress.recipe import ExportEntry
from compress.record import ExportRecord, FileRecord, RunRecord
from compress.workbench import Workbench, describe_checks

if TYPE_CHECKING:
    from compress.model import Model


def export(bench: Workbench, entry: ExportEntry, final: Path, out: Path) -> ExportRecord:
    """Write one artifact into `out`, and gate it in its runtime; `path` of the record is left to the publisher."""
    started = time.monotonic()
    exporter = entry.exporter
    bench.reporter.say(f"exporting {exporter.name}")
    bench.close()  # writing needs room for copies of its own
    model = bench.model(final)
    model.described = asdict(lineage.of(bench.source))
    files = write_exactly(model, exporter, out)
    seconds = round(time.monotonic() - started, 1)
    brought = _brought_by_zeros(bench, exporter, model, out, files, final)
    bench.close()  # the runtime holds its own weights from here on
    sizes = Sizes(sum(f.bytes for f in files), artifact.manifest(final)["bits_per_weight"])
    opened = exporter.open(out)
    try:
        gate = _gate(bench, entry, opened, sizes, files, final)
        runtime, compute = opened.runtime, opened.compute
    finally:
        opened.close()
    return ExportRecord(
        format=exporter.name,
        params=exporter.model_dump(mode="json"),
        path="",
        files=files,
        size_bytes=sizes.size_bytes,
        bits_per_weight=sizes.bits_per_weight,
        runtime=runtime,
        weights_exact=True,
        compute=compute,
        seconds=seconds,
        gate=gate,
        zeros=brought,
    )


def _brought_by_zeros(
    bench: Workbench, exporter: Exporter, model: Model, out: Path, files: Sequence[FileRecord], final: Path
) -> zeros.Zeros | None:
    """What the model's pruned zeros bring its files, measured once; None where nothing is pruned."""
    if not zeros.pruned(model):
        return None
    given = {
        "zeros": [zeros.VERSION, timing.PROMPT_TOKENS, timing.NEW_TOKENS],
        "exporter": [exporter.name, exporter.version, exporter.model_dump(mode="json")],
        "files": [[f.name, f.sha256] for f in files],
        "model": artifact.digest(final),
        **bench.conditions(),
    }

    def compute() -> Any:
        bench.reporter.say(f"  measuring what pruned zeros bring {exporter.name}")
        return zeros.measure(model, exporter, out, bench.close).model_dump(mode="json")

    return zeros.Zeros.model_validate(bench.recorded(given, compute))


def write_exactly(model: Model, exporter: Exporter, out: Path) -> list[FileRecord]:
    """Write the model's very codes into the new folder `out`; the files, once every tensor was read back.

    Raises Corrupt where the files hold anything but the stored tensors of the model, bit for bit.
    """
    refuse_rounding(model, exporter)
    out.mkdir(parents=True)
    exporter.write(model, out)
    if not weights_exact(model, exporter, out):
        raise Corrupt(f"{exporter.name}: the file does not hold the gated weights; nothing is published")
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return [provenance.record_of(out, name) for name in names]


def refuse_rounding(model: Model, exporter: Exporter) -> None:
    """Raise RecipeError where the runtime would not round what the model rounds while it runs."""
    reasons = [] if model.cache is None else [exporter.refuses_cache(model.cache)]
    for linear, rounding in model.inputs.items():
        held = model.encoding(f"{linear}.weight") or Encoding("fp32")
        reasons.append(exporter.refuses_inputs(rounding, held, linear))
    if reason := next(filter(None, reasons), None):
        raise RecipeError(f"export {exporter.name}: {reason}")


def describe(
    bench: Workbench, entry: ExportEntry, made: ExportRecord, record: RunRecord, final: Path, out: Path
) -> None:
    """Write what was proven beside a gated artifact in `out`, and add those files to its record."""
    known = facts.of_run(bench.recipe, record, made, entry.exporter, final, bench.source)
    made.files = provenance.attach(out, known, made.files)


def weights_exact(model: Model, exporter: Exporter, path: Path) -> bool:
    """Whether tensors, fixed scales and cache types of the model, read back from the files, are what was gated."""
    import torch

    inputs = exporter.stored_inputs(path)
    if (inputs is not None and inputs != model.inputs) or exporter.stored_cache(path) != model.cache:
        return False
    expected = {name for name, _ in model.module.named_parameters()}
    for name, found in exporter.stored(path):
        if name not in expected:
            return False
        expected.remove(name)
        wanted = model.tensor(name)
        if isinstance(wanted, EncodedTensor) and isinstance(found, EncodedTensor):
            if not same_stored(wanted, found):
                return False
        else:
            a, b = (t.decode() if isinstance(t, EncodedTensor) else t for t in (wanted, found))
            if offset := model.facts.architecture.offset(name):  # the norm multiplies by the sum, which files may hold
                a, b = a.float() + offset, b.float() + offset
            if a.shape != b.shape or not torch.equal(a.float().view(torch.int32), b.float().view(torch.int32)):
                return False
    return not expected


def _gate(
    bench: Workbench,
    entry: ExportEntry,
    opened: LanguageModel,
    sizes: Sizes,
    files: Sequence[FileRecord],
    final: Path,
) -> GateResult:
    """The release checks in the artifact's own runtime, through prefill and decoding, and against its torch model."""
    datasets = bench.evaluation()
    progress = bench.progress(f"gate {entry.exporter.name}")

    def compute() -> Any:
        baseline = bench.model(bench.baseline)
        prefill = Gate(entry.gate).evaluate(
            opened, baseline, datasets, sizes=sizes, cache=bench.store, progress=progress, distrust=bench.distrust
        )
        decoded = decode_check(opened, datasets, progress)
        bench.close()
        parity = parity_checks(opened, bench.model(final), datasets, progress)
        checks = [*noise.above_decoding(prefill.checks, entry.gate, decoded), *decoded, *parity]
        return GateResult(verdict=combine([c.verdict for c in checks]), checks=checks).model_dump(mode="json")

    given = {
        "gate": describe_checks(entry.gate),
        "files": [[f.name, f.sha256] for f in files],
        "runtime": [opened.runtime, opened.compute],
        "parity": [PARITY_VERSION, artifact.digest(final)],
        "baseline": artifact.digest(bench.baseline),
        "distrusted": bench.distrusted(entry.gate),
        **bench.conditions(*datasets),
    }
    return GateResult.model_validate(bench.recorded(given, compute))


def folder_names(entries: Sequence[ExportEntry]) -> list[str]:
    """A folder per export: onnx, and onnx-2 for a second one of the same format."""
    seen: dict[str, int] = {}
    names = []
    for entry in entries:
        count = seen[entry.exporter.name] = seen.get(entry.exporter.name, 0) + 1
        names.append(entry.exporter.name if count == 1 else f"{entry.exporter.name}-{count}")
    return names
