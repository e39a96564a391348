"""What evaluators that measure perplexity have in common: a margin in percent over nats per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from compress.interfaces import Evaluator, Score
from evaluators._windows import Percent


class PerplexityIncrease(Evaluator):
    """Base of evaluators whose loss is an increase of perplexity, as a difference in nats per token."""

    unit: ClassVar[str] = "nats per token"
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_increase", "max_gain"})

    max_increase: Percent
    max_gain: Percent = 0.1  # a fall of perplexity that is proven to be larger needs a review

    @property
    def margin(self) -> float:
        """ln(1 + max_increase), in nats per token."""
        return math.log1p(self.max_increase)

    @property
    def plausible_gain(self) -> float:
        """-ln(1 − max_gain), in nats per token."""
        return -math.log1p(-self.max_gain) if self.max_gain < 1 else math.inf

    def display(self, loss: float) -> str:
        """The loss as a relative change of perplexity, e.g. "+3.2 %"."""
        return f"{_exponential(loss) * 100 - 100:+.1f} %"

    def value(self, scores: Sequence[Score]) -> float:
        """Perplexity: exp of the summed nats per scored token."""
        return _exponential(super().value(scores))


def _exponential(nats: float) -> float:
    """exp, infinite where the result is no float: math.exp raises there, and such a perplexity is no error of ours."""
    return math.exp(nats) if nats < 709 else (math.inf if nats == nats else math.nan)
