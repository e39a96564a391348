"""What evaluators of answers share: losses in [−1, 1] in percentage points, bounded exactly at every look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.interfaces import Aspect, Evaluator, Score

MEGABYTE = 1e6  # bytes, as file managers and model cards count


class Points(Evaluator):
    """Base of evaluators whose loss is a difference of fractions per cluster, shown in points of 100."""

    unit: ClassVar[str] = "fraction"
    statistic: ClassVar[Literal["mean", "betting", "census", "exact"]] = "betting"

    max_documents: int | None = Field(2000, ge=1)  # clusters; 1,640 prove no loss within 3 points at 10 % flips

    @model_validator(mode="after")
    def _decidable(self) -> Self:
        if self.max_documents is not None and self.max_documents < self.minimum_examples:
            raise ValueError(f"max_documents={self.max_documents} can never decide: {self.minimum_examples} are needed")
        return self

    def display(self, loss: float) -> str:
        """The loss in points: a rise of what is counted."""
        return f"{100 * loss + 0.0:+.2f} points"


class Drop(Points):
    """Base of those that are right or good in part: a score's total is what is missing, the loss is the fall."""

    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_drop"})

    max_drop: float = Field(gt=0, le=50, allow_inf_nan=False)  # points of 100

    @property
    def margin(self) -> float:
        """Largest fall, as a fraction."""
        return self.max_drop / 100

    def display(self, loss: float) -> str:
        """The loss in points of 100, as a fall.

        >>> from evaluators.accuracy import Accuracy
        >>> Accuracy(max_drop=3.0).display(0.0125)
        '-1.25 points'
        """
        return f"{-100 * loss + 0.0:+.2f} points"

    def value(self, scores: Sequence[Score]) -> float:
        """The mean of what is there: accuracy, or a mean metric."""
        return 1 - super().value(scores)

    def earned(self, reference: Sequence[Score]) -> str:
        """Doubt where the reference earns too little for a loss beyond the margin to be seen, or an empty text."""
        earned = self.value(reference)
        if earned > 3 * self.margin:
            return ""
        return f"the reference itself earns {100 * earned:.1f} points, and more than three margins are needed"


class Rise(Points):
    """Base of those that count what is unwelcome: an example is 0 or 1, the loss is the rise of the share of 1."""

    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_rise"})
    counted: ClassVar[str]  # what an example of 1 is, e.g. "biased"

    max_rise: float = Field(gt=0, le=50, allow_inf_nan=False)  # percentage points

    @property
    def margin(self) -> float:
        """Largest rise, as a fraction."""
        return self.max_rise / 100

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference on which nearly every example counts leaves no room for a rise beyond the margin."""
        share = self.value(reference)
        if 1 - share > self.margin:
            return ""
        return f"the reference itself is {self.counted} on {share:.0%}: no rise could be seen"


class Stored(Evaluator):
    """Base of those that measure the stored files, of whatever kind of model, and have no sampling error."""

    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True
    aspect: ClassVar[Aspect] = "efficiency"
    statistic: ClassVar[Literal["mean", "betting", "census", "exact"]] = "exact"
