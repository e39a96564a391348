"""Perplexity: how much worse the model predicts held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from compress.interfaces import Example, LanguageModel, Score
from evaluators._perplexity import PerplexityIncrease
from evaluators._windows import WindowEvaluator, summed_nll


class Perplexity(WindowEvaluator, PerplexityIncrease):
    """Increase of perplexity over the reference, checked as a mean difference in nats per token."""

    name: ClassVar[str] = "perplexity"
    takes_pairs: ClassVar[bool] = True
    definition: ClassVar[str] = (
        "exp of the mean negative log-likelihood per token, documents cut into windows that never cross "
        "documents, every token but the first of a window scored; the loss is the paired difference in nats."
    )
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "nll"

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Summed negative log-likelihood in nats over scored tokens, per document."""
        summed = summed_nll(model, batch)
        return [Score(example.id, total, tokens) for example, (total, tokens) in zip(batch, summed, strict=True)]
