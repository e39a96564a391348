"""What evaluators over running text share: percentages as margins, and documents cut into windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from compress.errors import RecipeError
from compress.interfaces import Documents, Evaluator, Example, LanguageModel
from compress.pairs import predicted

Windows = tuple[tuple[int, ...], ...]


def _parse_percent(value: Any) -> float:
    """A fraction from "5%" or 0.05; raises ValueError for anything that is no sensible margin.

    >>> _parse_percent("5%"), _parse_percent("0.5 %"), _parse_percent(0.05)
    (0.05, 0.005, 0.05)
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'{value!r} is no percentage; write "5%" or 0.05')
    text = value.strip() if isinstance(value, str) else repr(value)
    try:
        number = Decimal(text.removesuffix("%").strip())
    except InvalidOperation:
        raise ValueError(f'{value!r} is no percentage; write "5%" or 0.05') from None
    if isinstance(value, str) and not text.endswith("%"):
        raise ValueError(f'{value!r} has no percent sign; write "{text}%", or a fraction without quotes')
    fraction = float(number / 100) if text.endswith("%") else float(number)
    if not (math.isfinite(fraction) and fraction > 0):
        raise ValueError(f"{value!r} is no margin: a finite increase above 0 is expected, since none is provable at 0")
    if not isinstance(value, str) and fraction > 1:
        raise ValueError(f'{value!r} would be {fraction:.0%}; write "{text}%" if percent was meant')
    if fraction > 10:
        raise ValueError(f"{value!r} is above 1000%: such a margin checks nothing")
    return fraction


def _format_percent(fraction: float) -> str:
    # In decimal: 100 * 0.07 is 7.000000000000001 in floating point.
    return f"{(Decimal(repr(fraction)) * 100).normalize():f}%"


Percent = Annotated[
    float,
    BeforeValidator(_parse_percent),
    PlainSerializer(_format_percent, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\s*[0-9]*\.?[0-9]+\s*%\s*$"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ]
        }
    ),
]
"""A relative margin: "5%" in YAML, or the fraction 0.05."""


class WindowEvaluator(Evaluator):
    """Base of evaluators that score every token of a document but the first of each window.

    max_documents: per source. A clear case is decided after some 60 documents; one at its margin uses them all.
    """

    max_documents: int | None = Field(400, ge=1)

    @model_validator(mode="after")
    def _enough_documents(self) -> WindowEvaluator:
        if self.max_documents is not None and self.max_documents < self.minimum_examples:
            raise ValueError(
                f"max_documents={self.max_documents} can never decide: at least "
                f"{self.minimum_examples} documents are needed"
            )
        return self

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per document of at least two tokens; its payload is the document's windows."""
        cut = ((name, cut_windows(encode(text), data.length)) for name, text in data.documents)
        return [Example(name, name, windows) for name, windows in cut if windows]


def cut_windows(tokens: Sequence[int], length: int) -> Windows:
    """Consecutive windows of `length` tokens; a rest of one token predicts nothing and is left out.

    >>> cut_windows([1, 2, 3, 4, 5], 2)
    ((1, 2), (3, 4))
    """
    if length < 2:
        raise RecipeError(f"windows of {length} tokens predict nothing; use a length of at least 2")
    cut = (tuple(tokens[start : start + length]) for start in range(0, len(tokens), length))
    return tuple(window for window in cut if len(window) >= 2)


def flatten(model: LanguageModel, batch: Sequence[Example]) -> list[tuple[int, ...]]:
    """All windows of a batch, in order; raises RecipeError where one exceeds the model's context."""
    windows = [window for example in batch for window in example.payload]
    longest = max(map(len, windows), default=0)
    if longest > model.context_length:
        raise RecipeError(
            f"windows of {longest} tokens exceed the context of {model.context_length} tokens "
            f"({model.runtime}); use a smaller length"
        )
    return windows


def summed_nll(model: LanguageModel, batch: Sequence[Example]) -> list[tuple[float, int]]:
    """Per example, whose payload is windows: nats over every token that rows predict, and their number."""
    import torch

    from compress.numerics.divergence import token_nll

    logits = model.logits(flatten(model, batch))
    found = []
    for example in batch:
        total, tokens = 0.0, 0
        for window in example.payload:
            rows = next(logits)
            nll = token_nll(rows[:-1], torch.tensor(predicted(window, len(rows))))
            total, tokens = total + nll.sum().item(), tokens + len(nll)
        found.append((total, tokens))
    return found
