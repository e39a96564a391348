"""Several continuations of one context: their logits, with the context read once where the runtime can.

A runtime that can has a method `branch_logits` of its own; for any other one, each continuation is a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Branches = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A context and its continuations, in token ids; none of them empty."""


class Reads(Protocol):
    """What windows are read by: any language model."""

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """See `LanguageModel`."""


def branch_logits(model: Reads, items: Sequence[Branches]) -> Iterator[list[Tensor]]:
    """For each item, one float32 tensor (len(continuation), vocabulary) per continuation; row t predicts its token t.

    Consume each item before asking for the next. Whoever wraps a model and changes its logits, yet has no
    `branch_logits`, is asked for windows: the lookup is in the class, past any `__getattr__`.
    """
    own: Any = getattr(type(model), "branch_logits", None)
    found: Iterator[list[Tensor]] = own(model, items) if own else by_windows(model, items)
    return found


def by_windows(model: Reads, items: Sequence[Branches]) -> Iterator[list[Tensor]]:
    """The same, each continuation with its context as a window; those that begin another one share its window."""
    cut = [_windows(context, continuations) for context, continuations in items]
    logits = model.logits([window for windows in cut for window in windows])
    for (context, continuations), windows in zip(items, cut, strict=True):
        found: list[Tensor | None] = [None] * len(continuations)
        for window in windows:
            rows = next(logits)
            for i, continuation in enumerate(continuations):
                whole = (*context, *continuation)
                if window[: len(whole) - 1] == whole[:-1]:
                    # The runtime may overwrite its own rows when the next window is asked for.
                    found[i] = rows[len(context) - 1 : len(whole) - 1].clone()
        yield [rows for rows in found if rows is not None]


def _windows(context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Sequences without their last token, less those that begin another one."""
    needed = dict.fromkeys((*context, *continuation[:-1]) for continuation in continuations)
    return [w for w in needed if not any(len(o) > len(w) and o[: len(w)] == w for o in needed)]
