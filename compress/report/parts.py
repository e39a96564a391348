"""Pieces that the sections of the page share: figures, verdicts, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compress.report import figures, prose
from compress.report.charts import css_class, glyph
from compress.report.markup import Child, Markup, element


def typeset(text: str) -> str:
    """Figures for print: real minus and multiplication signs, numbers kept with their units."""
    text = re.sub(r"(?<![\w.\-])-(?=\d)", "\u2212", text)
    text = re.sub(r"(?<=\d)x(?= smaller)", "\u00d7", text)
    return re.sub(r"(?<=\d) (?=(?:%|pp|nats|bits|[kMGT]?B|s|min|h)\b|%)", "\u202f", text)


def figure(text: str, kind: str = "") -> Markup:
    """A number that never wraps."""
    return element("span", typeset(text), class_=f"figure {kind}".strip())


def muted(*children: Child) -> Markup:
    """Small print."""
    return element("small", children)


def verdict(verdict: str, absent: str = "not gated") -> Markup:
    """A verdict as a shape and a word."""
    word = verdict or absent
    return element("span", glyph(verdict), element("b", word), class_=f"verdict {css_class(verdict)}")


def section(title: str, identifier: str, *children: Child) -> Markup:
    """A section of the page under its heading."""
    heading = element("h2", title, id=identifier)
    return element("section", heading, children, aria_labelledby=identifier)


def table(head: Sequence[Child], rows: Iterable[Markup], kind: str, label: str, columns: Sequence[str] = ()) -> Markup:
    """A table that keeps its roles when narrow screens turn its rows into blocks."""
    names = columns or [""] * len(head)
    cells = [_heading(h, n) for h, n in zip(head, names, strict=True)]
    top = element("thead", element("tr", cells, role="row"), role="rowgroup")
    body = element("tbody", rows, role="rowgroup")
    return element("table", element("caption", label), top, body, class_=kind, role="table")


def _heading(content: Child, kind: str) -> Markup:
    if content == "":  # a column that this table leaves empty
        return element("td", role="cell", class_=kind or None)
    return element("th", content, scope="col", role="columnheader", class_=kind or None)


def row(cells: Sequence[tuple[str, Child]], kind: str | None = None, labels: Sequence[str] | None = None) -> Markup:
    """A row of (class, content); the first cell heads it. labels: the column's words for narrow screens."""
    first, *rest = cells
    head = element("th", first[1], scope="row", role="rowheader", class_=first[0] or None)
    words = labels[1:] if labels else [None] * len(rest)
    others = [
        element("td", content, role="cell", class_=name or None, data_label=word)
        for (name, content), word in zip(rest, words, strict=True)
    ]
    return element("tr", head, others, role="row", class_=kind)


def named(metric: str) -> str:
    """A metric as a heading."""
    return prose.capital(metric.replace("_", " "))


def digest(digest: str) -> Markup | str:
    """The first digits of a digest, all of them on hover."""
    if not digest:
        return figures.NOTHING
    bare = digest.removeprefix("sha256:")
    return element("code", bare[:12] + ("\u2026" if len(bare) > 12 else ""), title=digest)


def short(text: str, limit: int) -> str:
    """A text cut to a length."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\u2026"
