"""The chain from the baseline to the artifacts, with every attempt as a branch."""

from __future__ import annotations

from compress.report import charts, figures, parts, prose
from compress.report.charts import Axis
from compress.report.markup import Child, Markup, element
from compress.report.view import Check, Report, Stage, worst


def chain(report: Report) -> Markup:
    """Every model that was made, its size and its loss."""
    stages = list(report.stages())
    metric = next(iter(report.metrics()), "")
    shown = {id(s): worst(s.checks, metric) for s in stages}
    axis = Axis.over([c for c in shown.values() if c is not None])
    largest = max([s.size_bytes or 0.0 for s in stages])
    last = max(i for i, s in enumerate(stages) if s.kind != "rejected" or i == len(stages) - 1)
    rows = [
        _chain_row(s, shown[id(s)], axis, largest, report, (i == 0, i == last, i <= last)) for i, s in enumerate(stages)
    ]
    unit = f" ({axis.measure.suffix.strip()})" if axis.measure.suffix.strip() else ""
    loss: Child = ""
    if metric:
        loss = [
            element("span", f"{prose.capital(metric)} loss{unit}, worst source"),
            charts.axis_header(axis),
        ]
    head = ["Stage", "Size and bits per weight", loss, "Gate"]
    label = "Every model that was made, in order. Branches are rejected attempts and exported artifacts."
    columns = ("stage", "size", "plotted", "gate")
    return parts.section("From baseline to artifact", "chain", parts.table(head, rows, "chain", label, columns))


def _chain_row(
    stage: Stage,
    check: Check | None,
    axis: Axis,
    largest: float,
    report: Report,
    ends: tuple[bool, bool, bool],
) -> Markup:
    title = element("span", stage.label, class_="label") if stage.label else None
    kinds = {
        "baseline": "baseline",
        "release": "release gate",
        "holdout": "once",
        "export": "artifact",
        "rejected": "rejected",
    }
    name = "final model" if stage.kind == "release" else stage.name
    tag = kinds.get(stage.kind, "cached" if stage.cached else "")
    node = [
        charts.gutter(stage, *ends),
        element("span", title, element("b", name), element("i", tag) if tag else None, class_="name"),
        element("code", parts.short(stage.params, 88), title=stage.params) if stage.params else None,
        [element("small", f"Note: {note}") for note in stage.notes],
        element("small", f"Gate off: {', '.join(stage.gate_off)}") if stage.gate_off else None,
    ]
    verdict: Child = None if stage.kind == "baseline" else [parts.verdict(stage.verdict), _tally(stage)]
    cells: list[tuple[str, Child]] = [
        ("stage branch" if stage.kind in {"rejected", "export"} else "stage", node),
        ("size", _size(stage, largest, report)),
        ("plotted", _loss(stage, check, axis, report)),
        ("gate", verdict),
    ]
    return parts.row(cells, stage.kind)


def _tally(stage: Stage) -> Markup:
    passed = sum(c.verdict == "PASS" for c in stage.checks)
    return parts.muted(f"{passed} of {len(stage.checks)} checks pass" if stage.checks else "no checks")


def _size(stage: Stage, largest: float, report: Report) -> Child:
    if stage.kind == "holdout" or (stage.kind == "release" and stage.size_bytes is not None):
        return parts.muted("as above")
    if stage.size_bytes is None:
        return parts.muted("not stored" if stage.kind == "rejected" else figures.NOTHING)
    more = [] if stage.bits_per_weight is None else [f"{figures.bits(stage.bits_per_weight)} bits"]
    more.append(prose.ratio(report.baseline.size_bytes, stage.size_bytes))
    small = [parts.muted(" \u00b7 ", parts.typeset(p)) for p in more if p]
    text = element("span", parts.figure(figures.size(stage.size_bytes)), small)
    return [text, charts.size_bar(stage.size_bytes, largest, stage.title)]


def _loss(stage: Stage, check: Check | None, axis: Axis, report: Report) -> Child:
    if stage.kind == "baseline":
        values = [r for r in report.readings if r.metric in {"perplexity", *report.metrics()[:1]}]
        known = [f"{r.source or r.metric} {figures.value_text(r.metric, r.value)}" for r in values]
        return parts.muted(f"{values[0].metric} {', '.join(known)}") if values else None
    if check is None:
        return parts.muted("not checked")
    return [
        charts.interval(axis, check, f"{stage.title}, {check.metric}"),
        element(
            "span",
            parts.figure(check.measure.text(check.loss, signed=not check.exact)),
            parts.muted(parts.typeset(f" {check.bounds()} \u00b7 margin {check.measure.limit(check.margin)}")),
            class_="under",
        ),
    ]
