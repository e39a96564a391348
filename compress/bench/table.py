"""A benchmark as a table: a row per artifact, figures with their intervals, and ratios to the first artifact."""

from __future__ import annotations

from compress.bench import METRICS, Benchmark, Estimate, Measured
from compress.bench.quality import Quality
from compress.report import figures

Cell = tuple[str, ...]
"""A figure, and below it its interval and its ratio."""


def cells(found: Benchmark, metric: str) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and for each artifact the figures with their intervals, ratios, and its loss of one metric."""
    header = ["artifact", "size", *(f"{m.title}, {m.unit}" for m in METRICS.values()), metric]
    return header, [_row(a, metric) for a in found.artifacts]


def _row(a: Measured, metric: str) -> list[Cell]:
    row: list[Cell] = [(a.name, f"{a.runtime.partition(' (')[0]}; {a.compute}"), (figures.size(a.size_bytes),)]
    for name in METRICS:
        ratios = [_ratio(a.ratios[name])] if a.ratios else []
        row.append((_number(a.metrics[name].value), _interval(a.metrics[name]), *ratios))
    own = [_quality(q) for q in a.quality if q.metric == metric]
    return [*row, *(own or [("not on record",)])]


def _quality(q: Quality) -> Cell:
    measure = figures.measure(q.metric, q.unit)
    return measure.text(q.loss), f"[{measure.digits(q.lower, 'down')} to {measure.digits(q.upper, 'up')}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _interval(e: Estimate) -> str:
    return f"[{_number(e.lower)}, {_number(e.upper)}]"


def _ratio(e: Estimate) -> str:
    return f"\u00d7{e.value:.2f} [{e.lower:.2f}, {e.upper:.2f}]"


def lines(found: Benchmark) -> list[str]:
    """The table for a terminal: per artifact a line, and a line per metric with its interval and ratio."""
    text = []
    for a in found.artifacts:
        text.append(f"{a.name}  {figures.size(a.size_bytes)}  ({a.runtime}; {a.compute})")
        for name, shown in METRICS.items():
            e, ratio = a.metrics[name], a.ratios[name] if a.ratios else None
            figure = f"{_number(e.value)} {shown.unit}"
            text.append(
                f"  {shown.title:<8} {figure:>14}  {_interval(e):<18}" + (f"  {_ratio(ratio)}" if ratio else "")
            )
        for q in a.quality:
            text.append(f"  quality  {q.metric} {' '.join(_quality(q))} on {q.source}")
    note = f"95 % intervals over {found.rounds} interleaved rounds; {found.prompt_tokens} tokens of prompt, "
    note += f"{found.new_tokens} decoded, {figures.count(found.threads, 'threads')}"
    if len(found.artifacts) > 1:
        note += f"; \u00d7 is the ratio to {found.artifacts[0].name}"
    return [*(line.rstrip() for line in text), note]
