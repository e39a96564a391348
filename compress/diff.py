"""What differs between two runs: every leaf of their records, matched by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HEADINGS = ("path", "metric", "old", "new", "change")
_WIDEST = 48  # characters of a value in a table


@dataclass(frozen=True)
class Row:
    """One difference: values of the two records, None on the side that has none, where `change` says so."""

    path: str
    metric: str
    old: Any
    new: Any
    change: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, values whole."""
        return asdict(self)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Row]:
    """The leaves of two records (run.json as dicts) that differ, in the order of the records.

    Entries of lists are matched by name (a step, an export, a metric on a source), a repeated name by its count.
    """
    left, right = dict(_leaves(_once(old))), dict(_leaves(_once(new)))
    rows = []
    for place in {**left, **right}:
        a, b = left.get(place), right.get(place)
        if place in left and place in right and a == b:
            continue
        change = "added" if place not in left else "removed" if place not in right else _change(a, b)
        rows.append(Row(".".join(place[:-1]), place[-1], a, b, change))
    return rows


def table(rows: Sequence[Row], markdown: bool = False) -> list[str]:
    """The rows as aligned columns of plain text, or as a Markdown table."""
    cells: list[tuple[str, ...]] = [
        HEADINGS,
        *((row.path, row.metric, _text(row.old), _text(row.new), row.change) for row in rows),
    ]
    if markdown:
        cells = [tuple(cell.replace("|", "\\|") for cell in line) for line in cells]
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        return [lines[0], "|---|---|---:|---:|---:|", *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]


def _once(run: Mapping[str, Any]) -> dict[str, Any]:
    """The record without the last attempt of each step, which is the step itself."""
    steps = [{**step, "attempts": step["attempts"][:-1]} for step in run["steps"]]
    return {**run, "steps": steps}


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*place, str(key)))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        seen: dict[str, int] = {}
        for item in value:
            label = _label(item)
            seen[label] = seen.get(label, 0) + 1
            yield from _leaves(item, (*place, label if seen[label] == 1 else f"{label}#{seen[label]}"))
    elif value not in ([], {}):
        yield place, value


def _label(item: Mapping[str, Any]) -> str:
    """What an entry of a list is called: a step's or file's name, an export's format, a metric on a source."""
    if "metric" in item:
        against = " against parent" if item.get("against") == "parent" else ""
        return f"{item['metric']} on {item['source']}{against}"
    if "role" in item:
        return f"{item['role']} {item['source']}"
    return str(item.get("name") or item["format"])


def _change(old: Any, new: Any) -> str:
    """Difference and ratio of two numbers; nothing for what has no difference."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new)):
        return ""
    ratio = f" ({new / old - 1:+.1%})" if old else ""
    return f"{new - old:+.4g}{ratio}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
