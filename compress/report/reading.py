"""Reading a run's record, `run.json`, into what a report shows. Missing keys are empty, not errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from compress.report import figures, zeros
from compress.report.figures import clean, number
from compress.report.view import (
    Artifact,
    Check,
    File,
    Noise,
    Planted,
    Reading,
    Report,
    Sample,
    Stage,
)


def maps(value: object) -> list[dict[str, Any]]:
    """The mappings in a list; nothing for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def mapping(value: object) -> dict[str, Any]:
    """A mapping, or an empty one."""
    return value if isinstance(value, dict) else {}


def read(run: Mapping[str, Any]) -> Report:
    """Read a parsed `run.json`."""
    baseline = mapping(run.get("baseline"))
    model = clean(baseline.get("model")) or "unnamed model"
    attempts = tuple(s for i, step in enumerate(maps(run.get("steps"))) for s in _attempts(i + 1, step))
    release = _release(mapping(run.get("release")), attempts)
    artifacts = tuple(_artifact(e) for e in maps(run.get("exports")))
    recipe = run.get("recipe")
    report = Report(
        recipe=clean(recipe.get("name") if isinstance(recipe, dict) else recipe),
        status=clean(run.get("status")) or "unknown",
        exit_code=clean(run.get("exit_code")),
        error=clean(run.get("error")),
        model=model,
        baseline=_baseline(model, baseline),
        readings=tuple(_reading(m) for m in maps(baseline.get("metrics"))),
        attempts=attempts,
        release=release,
        artifacts=artifacts,
        versions={clean(k): figures.plain(v) for k, v in mapping(run.get("versions")).items()},
        host={clean(k): _host_value(clean(k), v) for k, v in mapping(run.get("host")).items()},
        planted=tuple(_planted(a) for a in maps(run.get("assays"))),
        noise=tuple(_noise(n) for n in maps(run.get("noise"))),
        holdout=_holdout(mapping(run.get("holdout"))),
    )
    found = [(clean(m.get("metric")), clean(m.get("definition"))) for m in maps(baseline.get("metrics"))]
    found += [(c.metric, c.definition) for s in report.stages() for c in s.checks]
    definitions: dict[str, str] = {}
    for name, text in found:
        if text:
            definitions.setdefault(name, text)
    return replace(report, definitions=definitions)


def check(record: Mapping[str, Any]) -> Check:
    """Read one CHECK. An INVALID one says why at the end of its definition."""
    definition, _, reason = clean(record.get("definition")).partition(" Invalid here: ")
    reason = reason or clean(record.get("review"))
    return Check(
        metric=clean(record.get("metric")) or "unnamed",
        unit=clean(record.get("unit")),
        source=clean(record.get("source")),
        against=clean(record.get("against")) or "baseline",
        verdict=_verdict(record.get("verdict")),
        definition=definition,
        reason=reason.removesuffix("."),
        details=mapping(record.get("details")),
        aspect=clean(record.get("aspect")) or "quality",
        samples=tuple(_sample(s) for s in maps(record.get("samples"))),
        **{name: number(record.get(name)) for name in _NUMBERS},
    )


def _sample(record: Mapping[str, Any]) -> Sample:
    prompt, reference, model = (figures.block(record.get(name)) for name in ("prompt", "reference", "model"))
    return Sample(clean(record.get("id")), prompt, reference, model, clean(record.get("note")))


_NUMBERS = ("reference", "value", "loss", "lower", "upper", "margin", "confidence", "examples", "tokens")


def _verdict(value: object) -> str:
    return clean(value).upper()


def _checks(value: object) -> tuple[Check, ...]:
    return tuple(check(c) for c in maps(value))


def _words(value: object) -> tuple[str, ...]:
    return tuple(clean(v) for v in value) if isinstance(value, list) else ()


def _host_value(key: str, value: object) -> str:
    amount = number(value)
    if isinstance(value, list):
        return ", ".join(figures.plain(v) for v in value)
    return figures.size(amount) if key.endswith("_bytes") and amount is not None else figures.plain(value)


def _baseline(model: str, record: Mapping[str, Any]) -> Stage:
    return Stage(
        kind="baseline",
        label="",
        name=model,
        size_bytes=number(record.get("size_bytes")),
        bits_per_weight=number(record.get("bits_per_weight")),
        parameters=number(record.get("parameters")),
        digest=clean(record.get("digest")),
    )


def _reading(record: Mapping[str, Any]) -> Reading:
    metric = clean(record.get("metric")) or "unnamed"
    ends = record.get("interval")
    interval = ""
    if isinstance(ends, (list, tuple)) and len(ends) == 2:
        interval = " to ".join(figures.value_text(metric, number(end)) for end in ends)
    return Reading(
        metric=metric,
        source=clean(record.get("source")),
        value=number(record.get("value")),
        interval=interval,
        examples=number(record.get("examples")),
        tokens=number(record.get("tokens")),
    )


def _planted(record: Mapping[str, Any]) -> Planted:
    metric = clean(record.get("metric")) or "unnamed"
    return Planted(
        metric=metric,
        source=clean(record.get("source")),
        measure=figures.measure(metric, clean(record.get("unit"))),
        margin=number(record.get("margin")),
        planted=number(record.get("planted")),
        measured=number(record.get("measured")),
        verdict=_verdict(record.get("verdict")),
        reason=clean(record.get("reason")),
    )


def _noise(record: Mapping[str, Any]) -> Noise:
    metric = clean(record.get("metric")) or "unnamed"
    numbers = {name: number(record.get(name)) for name in ("loss", "lower", "upper", "examples")}
    measure = figures.measure(metric, clean(record.get("unit")))
    return Noise(metric=metric, source=clean(record.get("source")), measure=measure, **numbers)


def _attempts(index: int, step: Mapping[str, Any]) -> Iterator[Stage]:
    """The attempts at one step. Only the last can have been accepted, and only if the step's gate passed."""
    gate = mapping(step.get("gate"))
    records = maps(step.get("attempts")) or [dict(step, checks=gate.get("checks"), verdict=gate.get("verdict"))]
    for position, record in enumerate(records):
        last = position == len(records) - 1
        verdict = _verdict(record.get("verdict") or (gate.get("verdict") if last else None))
        accepted = last and verdict in {"", "PASS"} and _verdict(gate.get("verdict")) in {"", "PASS"}
        own = step if last and (accepted or len(records) == 1) else record
        checks = _checks(record.get("checks")) or (_checks(gate.get("checks")) if last else ())
        yield Stage(
            kind="step" if accepted else "rejected",
            label=f"{index}{_letter(position)}" if len(records) > 1 else f"{index}",
            name=clean(record.get("name") or step.get("name")) or "unnamed step",
            verdict=verdict,
            checks=checks,
            params=figures.parameters(mapping(record.get("params", step.get("params")))),
            size_bytes=number(own.get("size_bytes")),
            bits_per_weight=number(own.get("bits_per_weight")),
            parameters=number(own.get("parameters")),
            seconds=number(record.get("seconds", step.get("seconds") if len(records) == 1 else None)),
            peak_rss_bytes=number(own.get("peak_rss_bytes")),
            digest=clean(own.get("digest")),
            cached=bool(own.get("cached")),
            unchanged=record.get("unchanged") is True,
            notes=_words(record.get("notes")) or (_words(step.get("notes")) if last else ()),
            gate_off=_words(step.get("gate_off")) if last else (),
            layer_errors=_layer_errors(step) if accepted else {},
            encodings={clean(k): clean(v) for k, v in mapping(step.get("encodings")).items()} if accepted else {},
        )


def _layer_errors(step: Mapping[str, Any]) -> dict[str, float | None]:
    return {clean(name): number(error) for name, error in mapping(step.get("layer_errors")).items()}


def _letter(position: int) -> str:
    return chr(ord("a") + position) if position < 26 else f".{position + 1}"


def _release(record: Mapping[str, Any], attempts: tuple[Stage, ...]) -> Stage | None:
    if not record.get("verdict") and not record.get("checks"):
        return None
    final = next((s for s in reversed(attempts) if s.kind == "step"), None)
    return Stage(
        kind="release",
        label="",
        name="release",
        verdict=_verdict(record.get("verdict")),
        checks=_checks(record.get("checks")),
        size_bytes=final.size_bytes if final else None,
        bits_per_weight=final.bits_per_weight if final else None,
    )


def _holdout(record: Mapping[str, Any]) -> Stage | None:
    """The final model on the sealed holdout, with who has seen it before."""
    gate = mapping(record.get("gate"))
    if not gate:
        return None
    before, left_out = _words(record.get("before")), _words(record.get("left_out"))
    use = figures.count(number(record.get("use")))
    notes = [f"use {use} of this holdout"]
    if before:
        seen = f"{figures.count(float(len(before)), 'other models')} have seen it ({', '.join(dict.fromkeys(before))})"
        notes = [
            f"{notes[0]}: {seen}, and the allowed error is divided accordingly; documents that are fresh prove more"
        ]
    notes += [f"not held out, as their items are their own: {', '.join(left_out)}"] if left_out else []
    return Stage(
        kind="holdout",
        label="",
        name="sealed holdout",
        verdict=_verdict(gate.get("verdict")),
        checks=_checks(gate.get("checks")),
        notes=tuple(notes),
    )


def _artifact(record: Mapping[str, Any]) -> Artifact:
    gate = mapping(record.get("gate"))
    exact = record.get("weights_exact")
    stage = Stage(
        kind="export",
        label="",
        name=clean(record.get("format")) or "unnamed format",
        verdict=_verdict(gate.get("verdict")),
        checks=_checks(gate.get("checks")),
        size_bytes=number(record.get("size_bytes")),
        bits_per_weight=number(record.get("bits_per_weight")),
        seconds=number(record.get("seconds")),
        peak_rss_bytes=number(record.get("peak_rss_bytes")),
        notes=tuple(zeros.notes(record.get("zeros"))),
        gate_off=_words(record.get("gate_off")),
    )
    return Artifact(
        stage=stage,
        path=clean(record.get("path")),
        files=tuple(
            File(clean(f.get("name")), number(f.get("bytes")), clean(f.get("sha256")))
            for f in maps(record.get("files"))
        ),
        runtime=clean(record.get("runtime")),
        weights_exact=exact if isinstance(exact, bool) else None,
        compute=clean(record.get("compute")),
    )
