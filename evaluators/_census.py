"""What evaluators that read a fixed set whole have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.interfaces import Evaluator


class Census(Evaluator):
    """Base of evaluators over a fixed set that stands for nothing but itself: no sampling, so no interval.

    The fields of a sample are kept, at the only value that is true here.
    """

    statistic: ClassVar[Literal["mean", "betting", "census", "exact"]] = "census"
    minimum_examples: ClassVar[int] = 1

    confidence: float = Field(1.0, ge=1.0, le=1.0)
    max_documents: None = None
