"""Perplexity: how much worse the model predicts held-out documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from compress.interfaces import Example, LanguageModel, Score
from evaluators._windows import Percent, WindowEvaluator, exponential, flatten


class Perplexity(WindowEvaluator):
    """Increase of perplexity over the reference, checked as a mean difference in nats per token."""

    name: ClassVar[str] = "perplexity"
    unit: ClassVar[str] = "nats per token"
    definition: ClassVar[str] = (
        "exp of the mean negative log-likelihood per token, documents cut into windows that never cross "
        "documents, every token but the first of a window scored; the loss is the paired difference in nats."
    )
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_increase"})
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "nll"

    max_increase: Percent

    @property
    def margin(self) -> float:
        """ln(1 + max_increase), in nats per token."""
        return math.log1p(self.max_increase)

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Summed negative log-likelihood in nats over scored tokens, per document."""
        import torch

        from compress.numerics.divergence import token_nll

        logits = model.logits(flatten(model, batch))
        scores = []
        for example in batch:
            total, weight = 0.0, 0
            for window in example.payload:
                nll = token_nll(next(logits)[:-1], torch.tensor(window[1:]))
                total, weight = total + nll.sum().item(), weight + len(nll)
            scores.append(Score(example.id, total, weight))
        return scores

    def display(self, loss: float) -> str:
        """The loss as a relative change of perplexity.

        >>> Perplexity(max_increase=0.05).display(0.0315)
        '+3.2 %'
        """
        return f"{exponential(loss) * 100 - 100:+.1f} %"

    def value(self, scores: Sequence[Score]) -> float:
        """Perplexity: exp of the summed nats per scored token."""
        return exponential(super().value(scores))
