"""The run in a few lines of plain text, for the end of `compress apply`."""

from __future__ import annotations

from typing import Any

from compress.report import figures, prose
from compress.report.reading import read
from compress.report.view import Check, Report, Stage, worst


def summary_lines(run: dict[str, Any]) -> list[str]:
    """One line per model with the check that decides, notes on what ships, the verdict and its claims, in ASCII."""
    report = read(run)
    stages = list(report.stages())
    width = min(36, max(len(_name(s)) for s in stages))
    lines = []
    for stage in stages:
        lines.append(_stage(stage, width, report))
        lines += [f"  {note}" for note in stage.notes if stage.kind == "export"]
    if report.error:
        lines.append(f"error: {report.error}")
    lines.append(f"{prose.STATUS_WORDS.get(report.status, report.status).upper()}: {prose.headline(report)}")
    for claim in prose.claims(report):
        lines.append(f"  {claim.check.verdict or 'not gated'}: {claim.text}")
    return lines


def _name(stage: Stage) -> str:
    prefix = {"baseline": "baseline ", "export": "export "}.get(stage.kind, "")
    return prefix + stage.title


def _stage(stage: Stage, width: int, report: Report) -> str:
    verdict = "" if stage.kind == "baseline" else stage.verdict or "not gated"
    facts = [_check(c) for c in _deciding(stage, report)]
    if stage.size_bytes is not None and stage.kind != "release":
        facts.append(figures.size(stage.size_bytes))
    if stage.bits_per_weight is not None and stage.kind != "release":
        facts.append(f"{figures.bits(stage.bits_per_weight)} bits")
    if stage.seconds is not None:
        facts.append(figures.seconds(stage.seconds))
    facts += ["cached"] if stage.cached else []
    facts += ["changed nothing"] if stage.unchanged else []
    facts += stage.notes[:1] if stage.kind == "holdout" else []
    facts += [f"gate off: {name}" for name in stage.gate_off]
    return f"{_name(stage):<{width}}  {verdict:<12}  {'; '.join(facts)}".rstrip()


def _deciding(stage: Stage, report: Report) -> list[Check]:
    """The check to show: the worst source of the first metric, or of the first that does not pass."""
    order = [c for metric in report.metrics() if (c := worst(stage.checks, metric)) is not None]
    return ([c for c in order if c.verdict != "PASS"] or order)[:1]


def _check(check: Check) -> str:
    measure = check.measure
    loss = f"{check.metric} {measure.text(check.loss, signed=not check.exact)}"
    bounds = "" if check.exact or check.fixed or check.loss is None else f" [{check.bounds(unit=False)}]"
    reason = f" ({check.reason})" if check.reason else ""
    return f"{loss}{bounds}, margin {measure.limit(check.margin)}{reason}"
