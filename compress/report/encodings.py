"""How each linear of the final model is stored: a map of layers and linears, where they differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from compress.report import layers, parts
from compress.report.charts import percent
from compress.report.markup import Markup, element
from compress.report.view import Report

Stored = Mapping[tuple[int, str], str]


def encodings(report: Report) -> Markup | None:
    """The map of the last accepted step whose linears are stored in more than one way."""
    final = report.final()
    if final is None:
        return None
    stored = layers.by_place(final.encodings)
    kinds = strengths(stored)
    if len(kinds) < 2:
        return None
    note = element(
        "p",
        f"The encoding of each linear after step {final.title}; the more bits, the stronger the colour.",
        class_="note",
    )
    drawing = element("div", _legend(stored, kinds), _map(stored, kinds), class_="metric")
    return parts.section("How each linear is stored", "encodings", note, drawing)


def strengths(stored: Stored) -> dict[str, float]:
    """Encodings by rising bits, each with the strength of its colour.

    >>> strengths({(0, "a"): "int8 g32", (1, "a"): "int4 g32", (2, "a"): "int8 g32"})
    {'int4 g32': 0.15, 'int8 g32': 1.0}
    """
    kinds = sorted(set(stored.values()), key=lambda kind: (_bits(kind), kind))
    return {kind: round(0.15 + 0.85 * i / max(len(kinds) - 1, 1), 2) for i, kind in enumerate(kinds)}


def _bits(kind: str) -> int:
    """The first number in an encoding's name, which is that of its bits."""
    found = re.search(r"\d{1,3}", kind)
    return int(found[0]) if found else 0


def _map(stored: Stored, kinds: Mapping[str, float]) -> Markup:
    names = list(dict.fromkeys(name for _, name in stored))
    columns = sorted({layer for layer, _ in stored})
    short, rows = layers.shortened(names), []
    for name in names:
        row = {layer: stored[layer, name] for layer in columns if (layer, name) in stored}
        counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(Counter(row.values()).items()))
        rows.append(layers.line(short[name], _cells(columns, row, kinds, f"{name}: {counts}", name), ""))
    return element("div", layers.line("Layer", layers.layer_axis(columns), ""), rows, class_="heat")


def _cells(columns: list[int], row: Mapping[int, str], kinds: Mapping[str, float], label: str, name: str) -> Markup:
    width = layers.cell_width(columns)
    cells = [
        element(
            "g", element("title", f"layer {layer}, {name}: {row[layer]}"), _box(i * width, width, kinds[row[layer]])
        )
        for i, layer in enumerate(columns)
        if layer in row
    ]
    return element("svg", cells, width="100%", height=layers.CELL, role="img", aria_label=label)


def _box(x: float, width: float, strength: float) -> Markup:
    return element(
        "rect", x=percent(x), y=0, width=percent(width), height=layers.CELL, class_="cell", fill_opacity=strength
    )


def _legend(stored: Stored, kinds: Mapping[str, float]) -> Markup:
    """A cell per encoding, with the number of linears that it holds."""
    counts = Counter(stored.values())
    rows = []
    for kind, strength in kinds.items():
        box = element("svg", _box(0, 100, strength), width=layers.CELL, height=layers.CELL, aria_hidden="true")
        noun = "linear" if counts[kind] == 1 else "linears"
        rows.append(element("span", box, f" {kind}: {counts[kind]} {noun} "))
    return element("p", rows, class_="kinds")
