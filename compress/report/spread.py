"""How unequal a loss is over tokens: percentiles of a check, drawn on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.report import figures, parts
from compress.report.charts import percent
from compress.report.markup import Child, Markup, element
from compress.report.view import Check, Stage

PERCENTILES = {"p50": "Median", "p90": "90 %", "p99": "99 %", "p999": "99.9 %"}  # key of details → heading
_FLOOR = 1e-7  # nats: what float32 rounds away; a smaller median is drawn here
_COLUMNS = ("", "", "plotted strip", "right", "right", "right", "right")


@dataclass(frozen=True)
class LogAxis:
    """An axis over whole decades."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Sequence[float]) -> LogAxis:
        """The decades that hold all values."""
        logs = [math.log10(max(v, _FLOOR)) for v in values]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, max(high, low + 1))

    def position(self, value: float) -> float:
        """Percent from the left edge, clipped to the axis."""
        at = (math.log10(max(value, _FLOOR)) - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, at))


def percentiles(check: Check) -> dict[str, float] | None:
    """The percentiles of a check, where all are on record."""
    found = {key: figures.number(check.details.get(key)) for key in PERCENTILES}
    values = {key: value for key, value in found.items() if value is not None}
    return values if len(values) == len(PERCENTILES) else None


def spread(pairs: Sequence[tuple[Stage, Check]]) -> Markup | None:
    """A strip of percentiles for every check that has them."""
    known = [(s, c, p) for s, c in pairs if (p := percentiles(c)) is not None]
    if not known:
        return None
    axis = LogAxis.over([v for _, _, p in known for v in p.values()])
    head: list[Child] = ["Gate", "Source", [element("span", "From the median to 99.9 %"), _header(axis)]]
    labels = ["Gate", "Source", "Spread", *PERCENTILES.values()]
    rows = [_row(stage, check, found, axis, labels) for stage, check, found in known]
    caption = (
        f"How {parts.named(known[0][1].metric).lower()} is spread over tokens, in nats on a logarithmic axis: from "
        "thick to thin the strip runs from the median token to the 90th, 99th and 99.9th percentile; the circle is "
        "the mean."
    )
    return parts.table([*head, *PERCENTILES.values()], rows, "plain spread", caption, _COLUMNS)


def _row(stage: Stage, check: Check, found: dict[str, float], axis: LogAxis, labels: Sequence[str]) -> Markup:
    name = "final model" if stage.kind == "release" else stage.title
    numbers = [("right", parts.figure(figures.share(value))) for value in found.values()]
    where = f"{name}, {check.source}"
    cells: list[tuple[str, Child]] = [
        ("", name),
        ("", check.source),
        ("plotted strip", _strip(found, check, axis, where)),
    ]
    return parts.row([*cells, *numbers], stage.kind, labels)


def _strip(found: dict[str, float], check: Check, axis: LogAxis, where: str) -> Markup:
    at = {key: axis.position(value) for key, value in found.items()}
    pieces = [("p50", "p90", 10), ("p90", "p99", 5), ("p99", "p999", 2)]
    bars = [
        element("rect", x=percent(at[a]), y=9 - high / 2, width=percent(at[b] - at[a]), height=high, class_="amount")
        for a, b, high in pieces
    ]
    mean = [] if check.loss is None else [element("circle", cx=percent(axis.position(check.loss)), cy=9, r=4)]
    words = ", ".join(f"{name.lower()} {figures.share(found[key])}" for key, name in PERCENTILES.items())
    label = f"{where}: {words}, mean {figures.share(check.loss)}"
    title = element("title", label)
    return element("svg", title, _grid(axis), bars, mean, width="100%", height=18, role="img", aria_label=label)


def _grid(axis: LogAxis) -> list[Markup]:
    decades = range(axis.low, axis.high + 1)
    lines = [percent(axis.position(10.0**e)) for e in decades]
    return [element("line", x1=x, x2=x, y1=0, y2="100%", class_="grid") for x in lines]


def _header(axis: LogAxis) -> Markup:
    decades = range(axis.low, axis.high + 1)
    every = math.ceil(len(decades) / 6)
    labels = []
    for i, exponent in enumerate(decades):
        at = axis.position(10.0**exponent)
        anchor = "start" if i == 0 else "end" if exponent == axis.high else "middle"
        if i % every == 0 or exponent == axis.high:
            labels.append(element("text", figures.power(10.0**exponent), x=percent(at), y=11, text_anchor=anchor))
        labels.append(element("line", x1=percent(at), x2=percent(at), y1=15, y2=20, class_="tick"))
    return element("svg", labels, class_="axis", width="100%", height=20, aria_hidden="true")
