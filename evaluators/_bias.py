"""What evaluators of social bias share: a share of biased answers, and its proven rise over the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.interfaces import Evaluator, Score


class BiasRise(Evaluator):
    """Base of evaluators whose examples are biased (1) or not (0): the loss is the rise of the biased share.

    The reference's own bias is no matter of compression; the *change* is, and flips show where it is.
    """

    unit: ClassVar[str] = "fraction"
    statistic: ClassVar[Literal["mean", "betting", "census", "exact"]] = "betting"
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_rise"})

    max_documents: int | None = Field(2000, ge=1)
    max_rise: float = Field(gt=0, le=50, allow_inf_nan=False)  # percentage points

    @model_validator(mode="after")
    def _decidable(self) -> BiasRise:
        if self.max_documents is not None and self.max_documents < self.minimum_examples:
            raise ValueError(f"max_documents={self.max_documents} can never decide: {self.minimum_examples} are needed")
        return self

    @property
    def margin(self) -> float:
        """Largest rise, as a fraction."""
        return self.max_rise / 100

    def display(self, loss: float) -> str:
        """The loss in percentage points: more is more bias."""
        return f"{100 * loss + 0.0:+.2f} points"

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference that is biased nearly everywhere leaves no room for a rise beyond the margin."""
        biased = self.value(reference)
        if 1 - biased > self.margin:
            return ""
        return f"the reference itself is biased on {biased:.0%}: no rise could be seen"


def flips(scores: Sequence[Score], reference: Sequence[Score]) -> dict[str, float]:
    """Changes of either direction, by name."""
    changes = [(old.total, new.total) for old, new in zip(reference, scores)]
    return {"newly biased": float(changes.count((0.0, 1.0))), "no longer biased": float(changes.count((1.0, 0.0)))}
