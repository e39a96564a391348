"""Perplexity: how much worse the model predicts held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from compress.interfaces import Example, LanguageModel, Score
from evaluators._perplexity import PerplexityIncrease
from evaluators._windows import WindowEvaluator, flatten


class Perplexity(WindowEvaluator, PerplexityIncrease):
    """Increase of perplexity over the reference, checked as a mean difference in nats per token."""

    name: ClassVar[str] = "perplexity"
    definition: ClassVar[str] = (
        "exp of the mean negative log-likelihood per token, documents cut into windows that never cross "
        "documents, every token but the first of a window scored; the loss is the paired difference in nats."
    )
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "nll"

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
