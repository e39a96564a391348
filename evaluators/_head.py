"""Models with a classification head, asked for the logits of their classes instead of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.errors import RecipeError
from compress.interfaces import LanguageModel
from compress.labels import labels_of


@dataclass(frozen=True)
class Head:
    """How a classifier turns a text into tokens, and the classes that it tells apart."""

    encode: Callable[[str], list[int]]
    labels: tuple[str, ...]

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.encode(text)

    def choices(self, text: str, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The text's tokens once per class, each followed by the class' place in the head instead of a token."""
        tokens = self.encode(text)
        return tuple((*tokens, place) for place in places(self.labels, names))


def encoder(model: LanguageModel) -> Callable[[str], list[int]]:
    """The model's own `encode`, as a `Head` where it has one."""
    labels = labels_of(model)
    return Head(model.encode, labels) if labels else model.encode


def places(labels: Sequence[str], names: Sequence[str]) -> list[int]:
    """Where each class stands in the head, named as the head does or by its number; raises RecipeError.

    Every class of the head must be named: the probability of one left out would be shared among the others.

    >>> places(["bad", "good"], ["1", "bad"])
    [1, 0]
    """
    known = {**{str(i): i for i in range(len(labels))}, **{name: i for i, name in enumerate(labels)}}
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"labels: {unknown[0]!r} is no class of the model; it has {', '.join(labels)}")
    found = [known[name] for name in names]
    if sorted(found) != list(range(len(labels))):
        raise RecipeError(
            f"labels: expected each class of the model once ({', '.join(labels)}), found {', '.join(names)}"
        )
    return found
