"""Pairs of texts, for models that read a source and write a target: how a document, and a window, hold both.

A document's text is the source, `MARK`, and the target. A window is the source's tokens, the token that starts the
decoder, and the target's tokens; `logits` has a row for each token from that start on, and none for the source's, so
that rows count from the window's end. What is scored is the target, given the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from compress.batching import fitted
from compress.errors import RecipeError

MARK = "\x1etarget\x1e"
_PAIRS = 'JSON lines with "source" and "target"'


def paired(model: object) -> bool:
    """Whether a language model, in whatever runtime, takes pairs; it need not have the attribute."""
    found: bool = getattr(model, "paired", False)
    return found


def joined(source: str, target: str) -> str:
    """A document that holds both.

    >>> parted(joined("ein Haus", "a house"))
    ('ein Haus', 'a house')
    """
    return f"{source}{MARK}{target}"


def parted(text: str) -> tuple[str, str]:
    """Source and target of a document; raises RecipeError for any other text."""
    source, mark, target = text.partition(MARK)
    if not mark or MARK in target:
        raise RecipeError(f"this model reads a source and writes a target; expected {_PAIRS}, found {text[:40]!r}")
    return source, target


def window_of(source: Sequence[int], target: Sequence[int], start: int, limit: int) -> list[int]:
    """Both in one window, each cut to `limit` tokens; `start` elsewhere than between them is left out.

    >>> window_of([7, 8, 9, 1], [5, 0, 6, 1], start=0, limit=3)
    [7, 8, 1, 0, 5, 1]
    """
    read, written = ([token for token in ids if token != start] for ids in (source, target))
    return [*fitted(read, limit), start, *fitted(written, limit - 1)]


def split(window: Sequence[int], start: int) -> tuple[list[int], list[int]]:
    """The source of a window, and what the decoder reads, which begins with `start`; raises RecipeError."""
    tokens = list(window)
    if start not in tokens[1:]:
        raise RecipeError(
            f"a window of {len(tokens)} tokens without a source and a start of the target (token {start}); "
            "where a pair is longer than the data's `length`, raise that"
        )
    place = tokens.index(start, 1)
    return tokens[:place], tokens[place:]


def prompt_of(model: Any, window: Sequence[int]) -> list[int]:
    """What a paired model writes a target for: the source of a window, and its own `start`."""
    source, target = split(window, model.start)
    return [*source, *target[:1]]


def predicted(window: Sequence[int], rows: int) -> Sequence[int]:
    """The tokens that the first `rows` - 1 of a window's rows of logits predict; of one text, all but its first.

    >>> predicted([7, 8, 1, 0, 5, 1], 3), predicted([7, 8, 1], 3)
    ([5, 1], [8, 1])
    """
    return window[len(window) - rows + 1 :]


def mismatch(takes_pairs: bool, texts: Iterable[str]) -> str:
    """Why documents are none for a model that takes pairs, or for one that does not; empty where they are."""
    for text in texts:
        if (MARK in text) != takes_pairs:
            if takes_pairs:
                return f"the model reads a source and writes a target, and found {text[:40]!r} alone; give {_PAIRS}"
            return 'the model goes on with a text, and found a pair of source and target; give JSON lines with "text"'
    return ""


def require(takes_pairs: bool, model_is_paired: bool) -> None:
    """Raise RecipeError where a check that cannot be asked of a model with pairs is."""
    if model_is_paired and not takes_pairs:
        raise RecipeError(
            "asks how a text goes on, and this model writes a target given a source; use perplexity or divergence"
        )
