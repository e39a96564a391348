"""Quality against speed and against size, as a page in one file without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from compress.bench import METRICS, Benchmark, Measured, quality, table
from compress.bench.quality import Quality
from compress.provenance import facts
from compress.report import figures
from compress.report.markup import Markup, element
from compress.report.page import head

WIDTH, HEIGHT = 500.0, 340.0  # of a panel's view box; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 42.0
LINE = 15.0  # between two labels


@dataclass(frozen=True)
class Point:
    """An artifact in a panel; x and y as (lower, value, upper)."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def render(found: Benchmark) -> str | None:
    """The page; None where no artifact has a quality figure on record."""
    chosen = quality.common([a.quality for a in found.artifacts])
    if chosen is None:
        return None
    shown = [(a, q) for a in found.artifacts for q in a.quality if (q.metric, q.base) == chosen]
    left_out = [a.name for a in found.artifacts if all(a is not kept for kept, _ in shown)]
    body = element(
        "main",
        element("h1", f"Quality against speed and size of {figures.count(len(found.artifacts), 'artifacts')}"),
        element("p", _lead(found, shown[0][1], left_out), class_="note"),
        element("div", _panels(shown), class_="panels"),
        element("div", _table(found, chosen[0]), class_="scroll"),
        element("dl", [element("div", element("dt", m.title), element("dd", m.definition)) for m in METRICS.values()]),
    )
    style = files("compress.bench").joinpath("chart.css").read_text(encoding="utf-8")
    page = element("html", head("compress bench", style), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _lead(found: Benchmark, shown: Quality, left_out: Sequence[str]) -> str:
    text = (
        f"Speed: 95 % intervals over {found.rounds} interleaved rounds of {found.prompt_tokens} tokens of prompt and "
        f"{found.new_tokens} decoded, {figures.count(found.threads, 'threads')} of {found.host['processor']}. Quality: "
        f"{shown.metric} against the base model on {facts.shown(shown.source)}, with the bounds of the gate that each "
        "artifact passed."
    )
    if left_out:
        text += f" Without a comparable quality figure, and so only in the table: {figures.listed(list(left_out))}."
    return text


def _panels(shown: Sequence[tuple[Measured, Quality]]) -> list[Markup]:
    measure = figures.measure(shown[0][1].metric, shown[0][1].unit)
    axis = f"{shown[0][1].metric} loss,{measure.suffix or ' ' + shown[0][1].unit}"

    def loss(q: Quality) -> tuple[float, float, float]:
        low, value, high = (measure.forward(v) for v in (q.lower, q.loss, q.upper))
        return low, value, high

    def speed(a: Measured) -> tuple[float, float, float]:
        e = a.metrics["decode_tokens_per_second"]
        return e.lower, e.value, e.upper

    sizes = [Point(a.name, (a.size_bytes / 1e6,) * 3, loss(q)) for a, q in shown]
    return [
        _panel("Quality against speed", [Point(a.name, speed(a), loss(q)) for a, q in shown], "decode, tokens/s", axis,
               "better: right and down"),
        _panel("Quality against size", sizes, "size, MB", axis, "better: left and down"),
    ]  # fmt: skip


def _panel(title: str, points: Sequence[Point], across: str, up: str, hint: str) -> Markup:
    xs, ys = Scale.over([v for p in points for v in p.x]), Scale.over([v for p in points for v in p.y])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + xs.share(value) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - ys.share(value) * (bottom - TOP)

    parts = [element("rect", x=LEFT, y=TOP, width=right - LEFT, height=bottom - TOP, class_="frame")]
    for tick in xs.ticks:
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=TOP, y2=bottom, class_="grid"))
        parts.append(element("text", f"{tick:.6g}", x=x(tick), y=bottom + 16, text_anchor="middle"))
    for tick in ys.ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(element("line", x1=LEFT, x2=right, y1=y(tick), y2=y(tick), class_=kind))
        text = f"{tick:.6g}".replace("-", "\u2212")
        parts.append(element("text", text, x=LEFT - 7, y=y(tick) + 4, text_anchor="end"))
    parts.append(element("text", across, x=right, y=HEIGHT - 6, text_anchor="end"))
    parts.append(element("text", hint, x=LEFT, y=HEIGHT - 6))
    for p in points:
        parts += _mark(x, y, p)
    parts += _labels([(x(p.x[1]), y(p.y[1]), p.name) for p in points], right)
    described = "; ".join(f"{p.name}: {p.x[1]:.4g} {across}, {p.y[1]:.4g} {up}" for p in points)
    drawing = element(
        "svg",
        element("title", title),
        element("desc", described),
        parts,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
    )
    return element("figure", element("h2", title), element("p", up, class_="note"), drawing)


def _mark(x: Callable[[float], float], y: Callable[[float], float], p: Point) -> list[Markup]:
    at, level = x(p.x[1]), y(p.y[1])
    return [
        element("line", x1=x(p.x[0]), x2=x(p.x[2]), y1=level, y2=level, class_="bar"),
        element("line", x1=at, x2=at, y1=y(p.y[0]), y2=y(p.y[2]), class_="bar"),
        element("circle", cx=at, cy=level, r=5, class_="point"),
    ]


def _labels(places: Sequence[tuple[float, float, str]], right: float) -> list[Markup]:
    """Names beside their points, moved up or down where they would cover another, and then tied to their point."""
    found: list[Markup] = []
    taken = [(at - 6, at + 6, level + 4) for at, level, _ in places]  # left edge, right edge, baseline
    for at, level, name in sorted(places, key=lambda place: place[1]):
        width = 7.2 * len(name)
        before = at + 10 + width > right and at - 10 - width > LEFT
        start = at - 10 - width if before else at + 10

        def free(line: float, start: float = start, width: float = width) -> bool:
            return not any(start < r and a < start + width and abs(line - b) < LINE for a, r, b in taken)

        lines = [level - 7 + LINE * step * sign for step in range(len(places) + 2) for sign in (-1, 1)]
        line = next((y for y in lines if TOP + 10 < y < HEIGHT - BOTTOM and free(y)), lines[0])
        taken.append((start, start + width, line))
        anchor, edge = ("end", at - 10) if before else ("start", at + 10)
        if abs(line - level + 7) > LINE:
            found.append(element("line", x1=at, y1=level, x2=edge, y2=line - 4, class_="lead"))
        found.append(element("text", name, x=edge, y=line, text_anchor=anchor, class_="name"))
    return found


@dataclass(frozen=True)
class Scale:
    """A linear axis that holds zero."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Scale:
        """From zero (or below the least value) to beyond the largest, with some five round ticks."""
        low, high = min(0.0, *values), max(0.0, *values)
        span = (high - low) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(span / 5))
        step = magnitude * next(m for m in (1, 2, 5, 10) if m >= span / 5 / magnitude - 1e-9)
        return cls(low - 0.06 * span if low < 0 else 0.0, high + 0.06 * span, step)

    def share(self, value: float) -> float:
        """The place of a value, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round values on the axis."""
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        return [self.step * i for i in range(first, last + 1)]


def _table(found: Benchmark, metric: str) -> Markup:
    header, rows = table.cells(found, metric)
    lines = [
        element("tr", [element("th", cell, [element("small", text) for text in more]) for cell, *more in row])
        for row in rows
    ]
    top = element("tr", [element("th", text) for text in header])
    return element("table", element("thead", top), element("tbody", lines))
