"""A benchmark as a table: a row per artifact, figures with their intervals, and ratios to the first artifact."""

from __future__ import annotations

from compress.bench import METRICS, Benchmark, Estimate, Measured
from compress.report import figures

Cell = tuple[str, str]
"""A figure, and its interval or ratio below it."""


def cells(found: Benchmark) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and for each artifact the figures with their intervals, with ratios where there are any."""
    header = ["artifact", "size", *(f"{m.title}, {m.unit}" for m in METRICS.values()), "quality"]
    return header, [_row(a) for a in found.artifacts]


def _row(a: Measured) -> list[Cell]:
    row = [(a.name, f"{a.runtime.partition(' (')[0]}; {a.compute}"), (figures.size(a.size_bytes), "")]
    for name in METRICS:
        ratio = a.ratios[name] if a.ratios else None
        row.append(
            (_number(a.metrics[name].value), _interval(a.metrics[name]) + (f" {_ratio(ratio)}" if ratio else ""))
        )
    shown = [f"{q.metric} {figures.measure(q.metric, q.unit).text(q.loss)}" for q in a.quality[:1]]
    bounds = [f"[{_bounds(a)}]" for _ in a.quality[:1]]
    return [*row, ("".join(shown) or "not on record", "".join(bounds))]


def _bounds(a: Measured) -> str:
    measure = figures.measure(a.quality[0].metric, a.quality[0].unit)
    return f"{measure.digits(a.quality[0].lower, 'down')} to {measure.digits(a.quality[0].upper, 'up')}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _interval(e: Estimate) -> str:
    return f"[{_number(e.lower)}, {_number(e.upper)}]"


def _ratio(e: Estimate) -> str:
    return f"\u00d7{e.value:.2f} [{e.lower:.2f}, {e.upper:.2f}]"


def lines(found: Benchmark) -> list[str]:
    """The table for a terminal: per artifact a line, and a line per metric with its interval and ratio."""
    text = []
    for a in found.artifacts:
        text.append(f"{a.name}  {figures.size(a.size_bytes)}  ({a.runtime}; {a.compute})")
        for name, metric in METRICS.items():
            e, ratio = a.metrics[name], a.ratios[name] if a.ratios else None
            figure = f"{_number(e.value)} {metric.unit}"
            text.append(
                f"  {metric.title:<8} {figure:>14}  {_interval(e):<18}" + (f"  {_ratio(ratio)}" if ratio else "")
            )
        for q in a.quality:
            measure = figures.measure(q.metric, q.unit)
            bounds = f"[{measure.digits(q.lower, 'down')} to {measure.digits(q.upper, 'up')}]"
            text.append(f"  {'quality':<8} {q.metric} {measure.text(q.loss)} {bounds} on {q.source}")
    first = found.artifacts[0].name
    note = f"95 % intervals over {found.rounds} interleaved rounds; {found.prompt_tokens} tokens of prompt, "
    note += f"{found.new_tokens} decoded, {figures.count(found.threads, 'threads')}"
    return [line.rstrip() for line in text] + [
        note + (f"; \u00d7 is the ratio to {first}" * (len(found.artifacts) > 1))
    ]
