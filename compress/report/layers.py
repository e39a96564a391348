"""Where the error arises: a heat map of layers and linears, and one strip per accepted step."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from compress.report import figures, parts
from compress.report.charts import percent
from compress.report.markup import Markup, element
from compress.report.view import Report, Stage

CELL, STRIP = 22, 14  # pixels
_NAME = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
T = TypeVar("T")
Errors = Mapping[tuple[int, str], float | None]


@dataclass(frozen=True)
class Scale:
    """Errors as strength of colour: logarithmic from `low` to `high`, the same in all drawings."""

    low: float
    high: float

    @classmethod
    def over(cls, errors: Iterable[float | None]) -> Scale:
        """From the smallest error to the largest, over five decades at most."""
        found = [e for e in errors if e]
        high = max(found, default=1.0)
        return cls(max(min(found, default=high / 10), high * 1e-5), high)

    def level(self, error: float) -> float:
        """Place on the scale, in [0, 1].

        >>> Scale(1e-4, 1e-2).level(1e-3), Scale(1e-4, 1e-2).level(0.0)
        (0.5, 0.0)
        """
        if error <= self.low:
            return 0.0
        return 1.0 if error >= self.high else math.log(error / self.low) / math.log(self.high / self.low)

    def decades(self) -> list[float]:
        """The powers of ten inside."""
        exponents = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        return [10.0**e for e in exponents]


def by_place(values: Mapping[str, T]) -> dict[tuple[int, str], T]:
    """Values by layer and name within the layer; what carries no layer's number is left out.

    Where layers stand in several places, as in encoder and decoder, names begin with what tells them apart.

    >>> list(by_place({"encoder.block.0.wi": 1, "decoder.block.0.wi": 2})), list(by_place({"model.layers.3.mlp": 1}))
    ([(0, 'encoder.wi'), (0, 'decoder.wi')], [(3, 'mlp')])
    """
    matches = [(_NAME.fullmatch(name), value) for name, value in values.items()]
    found = [
        (match[1] or "", int(match[2]), match[3], value) for match, value in matches if match and len(match[2]) < 5
    ]
    several = len({stack for stack, *_ in found}) > 1
    return {(i, f"{stack.partition('.')[0]}.{name}" if several else name): value for stack, i, name, value in found}


def measured(report: Report) -> list[tuple[Stage, Errors]]:
    """The accepted steps whose layers were compared."""
    return [(stage, errors) for stage in report.attempts if (errors := by_place(stage.layer_errors))]


def summary(errors: Errors) -> tuple[float | None, float | None, str]:
    """Median and largest error, and where the largest is; an error that is not finite is the largest."""
    values = list(errors.values())
    where = max(errors, key=lambda place: math.inf if (e := errors[place]) is None else e)
    finite = [e for e in values if e is not None]
    return statistics.median(finite) if finite else None, errors[where], f"layer {where[0]} {where[1]}"


def layers(report: Report) -> Markup | None:
    """The heat map of the last accepted step, and a strip for every one."""
    steps = measured(report)
    if not steps:
        return None
    scale = Scale.over(e for _, errors in steps for e in errors.values())
    stage, errors = steps[-1]
    note = element(
        "p",
        "How far the output of each linear is from the baseline\u2019s on a few windows of the selection data: "
        "the squared error, as a share of the squared output. Each model runs on its own activations, so that "
        "a layer inherits the errors before it. For reading, not for deciding.",
        class_="note",
    )
    heat = element("div", element("h3", f"After step {stage.title}"), _map(errors, scale), class_="metric")
    strips = element("div", element("h3", "Step by step"), _strips(steps, scale), class_="metric")
    return parts.section("Where the error arises", "layers", note, _legend(scale), heat, strips)


def shortened(names: Sequence[str]) -> dict[str, str]:
    """The last part of each name, or all of each where those are not different."""
    last = [name.rpartition(".")[2] for name in names]
    return dict(zip(names, last if len(set(last)) == len(last) else names))


def _map(errors: Errors, scale: Scale) -> Markup:
    names = list(dict.fromkeys(name for _, name in errors))
    columns = sorted({layer for layer, _ in errors})
    short = shortened(names)
    rows = []
    for name in names:
        row = {layer: errors.get((layer, name)) for layer in columns if (layer, name) in errors}
        _, largest, where = summary({(layer, name): e for layer, e in row.items()})
        words = f"{name}: largest {figures.share(largest)} in {where.removesuffix(name).strip()}"
        svg = _cells(columns, row, scale, CELL, f"{words}, of {len(row)} layers", name)
        rows.append(line(short[name], svg, figures.share(largest)))
    head = line("Layer", layer_axis(columns), "largest")
    return element("div", head, rows, class_="heat")


def _strips(steps: list[tuple[Stage, Errors]], scale: Scale) -> Markup:
    rows = []
    for stage, errors in steps:
        columns = sorted({layer for layer, _ in errors})
        worst = {layer: _largest(e for (at, _), e in errors.items() if at == layer) for layer in columns}
        median, largest, where = summary(errors)
        text = f"median {figures.share(median)}, largest {figures.share(largest)} in {where}"
        svg = _cells(columns, worst, scale, STRIP, f"step {stage.title}: {text}", "worst linear")
        rows.append(line(stage.title, svg, text))
    return element("div", rows, class_="heat strips")


def _largest(errors: Iterable[float | None]) -> float | None:
    found = list(errors)
    return None if None in found else max(e for e in found if e is not None)


def line(label: str, drawing: Markup, text: str) -> Markup:
    """A row of a map: its name, its drawing and a few words."""
    return element("div", element("span", label), drawing, element("small", text))


def _cells(
    columns: list[int], errors: Mapping[int, float | None], scale: Scale, height: int, label: str, name: str
) -> Markup:
    width = cell_width(columns)
    cells = []
    for i, layer in enumerate(columns):
        if layer not in errors:
            continue
        error = errors[layer]
        box = _box(i * width, width, height, error, scale)
        cells.append(element("g", element("title", f"layer {layer}, {name}: {_words(error)}"), box))
    return element("svg", cells, width="100%", height=height, role="img", aria_label=label)


def cell_width(columns: list[int]) -> float:
    """Percent of a cell; a model of few layers does not fill the page."""
    return 100 / max(len(columns), 12)


def _box(x: float, width: float, height: int, error: float | None, scale: Scale) -> Markup:
    kind = "cell absent" if error is None else "cell" if error else "cell zero"
    strength = None if not error else 0.07 + 0.93 * scale.level(error)
    return element("rect", x=percent(x), y=0, width=percent(width), height=height, class_=kind, fill_opacity=strength)


def _words(error: float | None) -> str:
    return "not finite" if error is None else figures.share(error)


def layer_axis(columns: list[int]) -> Markup:
    """Numbers of layers above the columns, not more than fit."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10_000) if len(columns) <= 10 * s)
    width = cell_width(columns)
    labels = [
        element("text", f"{layer}", x=percent((i + 0.5) * width), y=11, text_anchor="middle")
        for i, layer in enumerate(columns)
        if layer % step == 0
    ]
    return element("svg", labels, class_="axis", width="100%", height=14, aria_hidden="true")


def _legend(scale: Scale) -> Markup:
    steps = 48
    ratio = math.log(scale.high / scale.low)
    boxes = [
        _box(100 * i / steps, 100 / steps, 10, scale.low * math.exp(ratio * (i + 0.5) / steps), scale)
        for i in range(steps)
    ]
    ticks = []
    for value in scale.decades():
        at = 100 * scale.level(value)
        if 20 < at < 88:  # the ends have their own words
            ticks.append(element("line", x1=percent(at), x2=percent(at), y1=10, y2=14, class_="tick"))
            ticks.append(element("text", figures.power(value), x=percent(at), y=25, text_anchor="middle"))
    low, high = figures.share(scale.low), figures.share(scale.high)
    ends = [
        element("text", low, x="0%", y=25, text_anchor="start"),
        element("text", high, x="100%", y=25, text_anchor="end"),
    ]
    label = f"Colour scale, logarithmic: from {low} to {high}"
    drawing = element("svg", boxes, ticks, ends, class_="axis", width="100%", height=28, role="img", aria_label=label)
    return element("div", element("small", "relative squared error"), drawing, class_="legend")
