"""Which examples are shown to people: the first flips of each direction, or what changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.interfaces import Example, Score

Change = tuple[Example, Score, Score]
"""An example, the reference's score of it, and the model's."""


def flips(new: Sequence[Score], old: Sequence[Score]) -> tuple[float, float]:
    """How many examples went from 0 to 1, and how many from 1 to 0."""
    changes = [(before.total, after.total) for before, after in zip(old, new)]
    return float(changes.count((0.0, 1.0))), float(changes.count((1.0, 0.0)))


def first_flips(
    examples: Sequence[Example],
    new: Sequence[Score],
    old: Sequence[Score],
    notes: Mapping[float, str],
    most: int,
) -> list[tuple[str, Change]]:
    """The first `most` of each kind of change, in the random order of the clusters: none is picked for its looks.

    notes: the model's total less the reference's → what that change is called; others are not shown.
    """
    found: dict[str, list[tuple[str, Change]]] = {note: [] for note in notes.values()}
    for example, after, before in zip(examples, new, old, strict=True):
        note = notes.get(after.total - before.total)
        if note is not None and len(found[note]) < most:
            found[note].append((note, (example, before, after)))
    return [change for changes in found.values() for change in changes]


def most_changed(examples: Sequence[Example], new: Sequence[Score], old: Sequence[Score], most: int) -> list[Change]:
    """Those that lost most, and then the first of those that are left."""
    changes = [(example, before, after) for example, after, before in zip(examples, new, old)]
    return sorted(changes, key=lambda c: c[1].total - c[2].total)[:most]
