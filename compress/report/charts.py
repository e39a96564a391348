"""Drawings as SVG in percentages of their width: they stretch with the column, text and strokes do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.report import figures
from compress.report.markup import Markup, element
from compress.report.prose import sentence
from compress.report.view import Check, Stage

HEIGHT = 30
SYMBOLS = {  # 16 px glyphs: verdicts differ in shape as well as in colour
    "pass": "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zM6.9 11.4 3.8 8.3l1.2-1.2 1.9 1.9 4.1-4.2 1.2 1.2z",
    "fail": "M8 .4 15.6 8 8 15.6.4 8zM5.3 6.5 6.8 8 5.3 9.5l1.2 1.2L8 9.2l1.5 1.5 1.2-1.2L9.2 8l1.5-1.5"
    "-1.2-1.2L8 6.8 6.5 5.3z",
    "inconclusive": "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zm0 1.6v10.8A5.4 5.4 0 0 1 8 2.6z",
    "invalid": "M1.5 1.5h13v13h-13zm1.6 1.6v9.8h9.8V3.1zM4.5 7.2h7v1.6h-7z",
    "none": "M8 5.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5z",
}


def css_class(verdict: str) -> str:
    """The class of a verdict; words that are not verdicts get the neutral one."""
    return verdict.lower() if verdict.lower() in SYMBOLS else "none"


def glyph(verdict: str) -> Markup:
    """The verdict's shape, for beside its word."""
    path = element("path", d=SYMBOLS[css_class(verdict)], fill_rule="evenodd")
    return element("svg", path, class_="glyph", width=16, height=16, viewBox="0 0 16 16", aria_hidden="true")


@dataclass(frozen=True)
class Axis:
    """A shared horizontal axis from `low` to `high`, in the metric's additive loss."""

    low: float
    high: float
    measure: figures.Measure

    @classmethod
    def over(cls, checks: Sequence[Check]) -> Axis:
        """An axis holding zero, every margin and every bound, cut where outliers would squeeze the margins.

        One attempt that failed a hundredfold must not hide whether the others pass.
        """
        margins = [c.margin for c in checks if c.margin is not None]
        points = [v for c in checks for v in (c.loss, c.lower, c.upper) if v is not None]
        low, high = min([0.0, *margins, *points]), max([0.0, *margins, *points])
        if margins and max(margins) > 0:
            low, high = max(low, -1.5 * max(margins)), min(high, 2.6 * max(margins))
        span = (high - low) or 1.0
        measure = checks[0].measure if checks else figures.measure("", "")
        return cls(low if low == 0 else low - 0.04 * span, high + 0.06 * span, measure)

    def position(self, loss: float) -> float:
        """Percent from the left edge, clipped to the axis."""
        return 100 * min(1.0, max(0.0, (loss - self.low) / (self.high - self.low)))

    def ticks(self) -> list[float]:
        """Losses whose shown value is round."""
        low, high = self.measure.forward(self.low), self.measure.forward(self.high)
        step = _nice((high - low) / 6)
        first = math.ceil(low / step - 1e-9)
        return [self.measure.inverse(i * step) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _nice(raw: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return magnitude * next(m for m in (1, 2, 5, 10) if m >= raw / magnitude - 1e-9)


def percent(value: float) -> str:
    """A length in percent, for attributes.

    >>> percent(33.3333), percent(50.0)
    ('33.33%', '50%')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def axis_header(axis: Axis, signed: bool = True) -> Markup:
    """Tick labels, to stand above a column of interval plots."""
    labels = []
    for tick in axis.ticks():
        at = axis.position(tick)
        anchor = "start" if at < 2 else "middle"
        shown = axis.measure.forward(tick)
        text = "0" if abs(shown) < 1e-12 else f"{shown:{'+' if signed else ''}.6g}".replace("-", "\u2212")
        labels.append(element("text", text, x=percent(at), y=11, text_anchor=anchor))
        labels.append(element("line", x1=percent(at), x2=percent(at), y1=15, y2=20, class_="tick"))
    return element("svg", labels, class_="axis", width="100%", height=20, aria_hidden="true")


def interval(axis: Axis, check: Check, name: str, grid: bool = True) -> Markup:
    """Measured loss and confidence bounds against the margin; what lies beyond the axis ends in an arrow.

    grid: upright lines at the ticks, for plots that share an axis.
    """
    back: list[Markup] = []
    if check.margin is not None:
        edge = axis.position(check.margin)
        back.append(element("rect", x="0%", y=0, width=percent(edge), height="100%", class_="allowed"))
    back += [_upright(axis.position(tick), "grid") for tick in axis.ticks()] if grid else []
    back.append(_upright(axis.position(0.0), "zero"))
    if check.margin is not None:
        back.append(_upright(axis.position(check.margin), "margin"))
    front = _bar(axis, check)
    if check.loss is None:
        text = "not measured" if check.lower is None and check.upper is None else "no finite estimate"
        front.append(element("text", text, x="50%", y=4, text_anchor="middle", class_="missing"))
    elif axis.low <= check.loss <= axis.high:
        front.append(_mark(axis.position(check.loss), check.verdict))
    return element(
        "svg",
        element("title", f"{name}: {check.verdict or 'not gated'}"),
        element("desc", sentence(check)),
        back,
        element("svg", front, y="50%", overflow="visible"),  # its y = 0 is the middle, however high the row is
        class_=f"plot {css_class(check.verdict)}",
        width="100%",
        height=HEIGHT,
        role="img",
        aria_label=f"{name}: {sentence(check)}: {check.verdict or 'not gated'}",
    )


def _upright(at: float, kind: str) -> Markup:
    return element("line", x1=percent(at), x2=percent(at), y1=0, y2="100%", class_=kind)


def _bar(axis: Axis, check: Check) -> list[Markup]:
    if check.exact or check.fixed or (check.lower is None and check.upper is None):
        return []
    lower = axis.low if check.lower is None else check.lower
    upper = axis.high if check.upper is None else check.upper
    left, right = axis.position(lower), axis.position(upper)
    if lower > axis.high:
        left = 94.0  # wholly beyond: without a stem the arrow would look like a mark
    if upper < axis.low:
        right = 6.0
    parts = [element("line", x1=percent(left), x2=percent(right), y1=0, y2=0, class_="bar")]
    for bound in (check.lower, check.upper):
        if bound is not None and axis.low <= bound <= axis.high:
            at = percent(axis.position(bound))
            parts.append(element("line", x1=at, x2=at, y1=-5, y2=5, class_="cap"))
    if upper > axis.high:
        parts.append(_placed(100, element("path", d="M-9 -6l9 6l-9 6z", class_="arrow")))
    if lower < axis.low:
        parts.append(_placed(0, element("path", d="M9 -6l-9 6l9 6z", class_="arrow")))
    return parts


def _placed(at: float, drawing: Markup) -> Markup:
    # Paths know no percentages: a nested svg carries them to their place.
    return element("svg", drawing, x=percent(at), overflow="visible")


def _mark(at: float, verdict: str) -> Markup:
    if verdict == "FAIL":
        return _placed(at, element("path", d="M0 -6.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z", class_="point"))
    if verdict == "INVALID":
        return _placed(at, element("rect", x=-5, y=-5, width=10, height=10, class_="point hollow"))
    hollow = "" if verdict == "PASS" else " hollow"
    return element("circle", cx=percent(at), cy=0, r=5, class_=f"point{hollow}")


def size_bar(size_bytes: float, largest: float, name: str) -> Markup:
    """A size on a scale that starts at zero and ends at the largest."""
    text = f"{name}: {figures.size(size_bytes)}"
    width = 100 * min(1.0, size_bytes / largest) if largest > 0 else 0.0
    return element(
        "svg",
        element("title", text),
        element("desc", f"{width:.0f} % of the largest, {figures.size(largest)}"),
        element("rect", x="0%", y=0, width="100%", height=8, class_="rail"),
        element("rect", x="0%", y=0, width=percent(width), height=8, class_="amount"),
        class_="sizebar",
        width="100%",
        height=8,
        role="img",
        aria_label=text,
    )


def gutter(stage: Stage, first: bool, last: bool, stem: bool) -> Markup:
    """One row of the chain's graph: a spine of accepted models, branches to attempts and artifacts.

    first, last: the spine begins or ends in this row. stem: the spine exists here at all.
    """
    spine, side, middle = 15, 41, 25
    parts: list[Markup] = []
    branch = stage.kind in {"rejected", "export"}
    if stem:
        top, bottom = (middle if first else 0), (middle if last and not branch else "100%")
        if not (branch and last):
            parts.append(element("line", x1=spine, x2=spine, y1=top, y2=bottom, class_="spine"))
    if branch:
        dashed = " dead" if stage.kind == "rejected" else ""
        curve = f"M{spine} 0C{spine} {middle} {spine + 6} {middle} {side - 9} {middle}"
        parts.append(element("path", d=curve, class_=f"spine{dashed}"))
    x = side if branch else spine
    if stage.kind == "baseline":
        parts.append(element("circle", cx=x, cy=middle, r=6, class_="origin"))
    else:
        shape = element("path", d=SYMBOLS[css_class(stage.verdict)], fill_rule="evenodd")
        parts.append(element("circle", cx=x, cy=middle, r=11, class_="clearing"))
        parts.append(
            element("svg", shape, x=x - 9, y=middle - 9, width=18, height=18, viewBox="0 0 16 16", class_="node")
        )
    return element("svg", parts, class_=f"graph {css_class(stage.verdict)}", aria_hidden="true")
