"""Every check against its margin, metric by metric."""

from __future__ import annotations

from collections.abc import Sequence

from compress.report import charts, figures, parts, prose, spread
from compress.report.charts import Axis
from compress.report.markup import Child, Markup, element
from compress.report.view import Check, Report, Stage


def evidence(report: Report) -> Markup:
    """A table per metric, each check drawn and written out."""
    blocks = [_metric_block(report, metric) for metric in report.metrics()]
    key = element(
        "p",
        "The mark is the measured loss, the bar its confidence bounds; the shaded range is what the margin "
        "allows, up to the vertical line. An arrow continues beyond the axis.",
        class_="note",
    )
    absent = element("p", "No check was evaluated.", class_="note")
    return parts.section("Every check against its margin", "evidence", key if blocks else absent, blocks)


def _metric_block(report: Report, metric: str) -> Markup:
    pairs = [(s, c) for s in report.stages() for c in s.checks if c.metric == metric]
    axis = Axis.over([c for _, c in pairs])
    unit = axis.measure.suffix.strip()
    exact = all(c.exact for _, c in pairs)
    sample = ["", "", ""] if exact else [parts.named(metric), prose.capital(pairs[0][1].noun), "Tokens"]
    plotted = [
        element("span", f"{'Measured' if exact else 'Loss'}{f' in {unit}' if unit else ''}"),
        charts.axis_header(axis, signed=not exact),
    ]
    head: list[Child] = ["Gate", "Source", plotted, "Measured", "Bounds", "Margin", *sample, "Verdict"]
    levels = sorted({figures.percent(c.confidence) for _, c in pairs if not (c.exact or c.fixed)})
    label = prose.capital(report.definitions.get(metric, "").rstrip("."))
    if levels:
        label = f"{label}. Bounds at {figures.listed(levels)} confidence.".removeprefix(". ")
    stages = [s for s, _ in pairs]
    repeats = [i > 0 and stages[i - 1] is s for i, s in enumerate(stages)]
    rows = [_check_row(s, c, axis, again) for (s, c), again in zip(pairs, repeats, strict=True)]
    title = element("h3", parts.named(metric))
    table = parts.table(head, rows, "evidence", parts.typeset(label), _EVIDENCE_COLUMNS)
    return element("div", title, table, spread.spread(pairs), _details(pairs), class_="metric")


_EVIDENCE_COLUMNS = ("stage", "source", "plotted", "loss", "bounds", "limit", "change", "n", "tokens", "gate")


def _check_row(stage: Stage, check: Check, axis: Axis, again: bool) -> Markup:
    measure = check.measure
    change = figures.value_text(check.metric, check.value)
    if check.reference and not check.exact:
        change = f"{figures.value_text(check.metric, check.reference)} \u2192 {change}"
    name = "final model" if stage.kind == "release" else stage.name
    label = f"{stage.label} " if stage.label else None
    source: Child = check.source or "\u2013"
    if check.against != "baseline":
        source = [check.source, parts.muted(f"against {check.against}")]
    rejected = element("i", "rejected") if stage.kind == "rejected" else None
    cells: list[tuple[str, Child]] = [
        ("stage", [element("span", label), element("b", name), rejected]),
        ("source", source),
        ("plotted", charts.interval(axis, check, f"{stage.title}, {check.source or check.metric}")),
        ("loss", parts.figure(measure.digits(check.loss, signed=not check.exact))),
        ("bounds", parts.figure(check.bounds(unit=False))),
        ("limit", parts.figure(measure.limit(check.margin).removesuffix(measure.suffix))),
        ("change", parts.figure("" if check.exact else change)),
        ("n", parts.figure("" if check.source == "files" else figures.count(check.examples))),
        ("tokens", parts.figure("" if check.source == "files" else figures.count(check.tokens))),
        ("gate", [parts.verdict(check.verdict), parts.muted(check.reason) if check.reason else None]),
    ]
    return parts.row(cells, f"{stage.kind} again" if again else stage.kind)


def _details(pairs: Sequence[tuple[Stage, Check]]) -> Markup | None:
    """What else the gate recorded, folded away."""
    items = []
    for stage, check in pairs:
        if not check.details:
            continue
        drawn = spread.percentiles(check) or {}
        text = ", ".join(figures.detail(key, value) for key, value in check.details.items() if key not in drawn)
        where = f"{'final model' if stage.kind == 'release' else stage.title} {check.source}".strip()
        items.append(element("div", element("dt", where), element("dd", text)))
    if not items:
        return None
    return element("details", element("summary", "Further figures of these checks"), element("dl", items))
