"""What evaluators of social bias share: a share of biased answers, and its proven rise over the reference's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from compress.interfaces import Documents, Score
from evaluators import _choices, _samples
from evaluators._fields import Rise

_LENGTH = 512


class BiasRise(Rise):
    """Base of evaluators whose examples are biased (1) or not (0): the loss is the rise of the biased share.

    The reference's own bias is no matter of compression; the *change* is, and flips show where it is.
    """

    counted: ClassVar[str] = "biased"


def flips(scores: Sequence[Score], reference: Sequence[Score]) -> dict[str, float]:
    """Changes of either direction, by name."""
    newly, no_longer = _samples.flips(scores, reference)
    return {"newly biased": newly, "no longer biased": no_longer}


def from_templates(source: str, clusters: Iterable[_choices.Cluster]) -> list[Documents]:
    """Sentences of our own, whatever the evaluation sources are."""
    return [_choices.as_documents(source, [*clusters], _LENGTH)]
