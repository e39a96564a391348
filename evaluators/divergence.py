"""Divergence: how far the model's predictions are from the reference's, whatever the right answer was."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from compress.errors import GateInconclusive
from compress.interfaces import Example, LanguageModel, Score
from evaluators._windows import WindowEvaluator, flatten

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}


class Divergence(WindowEvaluator):
    """Mean KL(reference‖model) per token, with Jensen–Shannon divergence and top-1 agreement beside it."""

    name: ClassVar[str] = "divergence"
    takes_pairs: ClassVar[bool] = True
    version: ClassVar[int] = 2  # more percentiles since 2
    unit: ClassVar[str] = "nats per token"
    definition: ClassVar[str] = (
        "mean KL(reference‖model) of the next-token distributions over the same windows as perplexity; "
        "asymptotic, since the mean of an unbounded quantity has no distribution-free bound."
    )
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_mean"})
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "kl"
    minimum_examples: ClassVar[int] = 100
    relative: ClassVar[bool] = True

    max_mean: float = Field(gt=0, allow_inf_nan=False)

    @property
    def margin(self) -> float:
        """Largest mean divergence, in nats per token."""
        return self.max_mean

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Summed KL in nats per document, and the values per token; row t is about token t + 1.

        The last row of a window predicts a token that is not scored, and is left out as in perplexity. Raises
        GateInconclusive for vocabularies of other sizes.
        """
        from compress.numerics.divergence import divergence

        if reference is None:
            raise TypeError("divergence compares with a reference model, and none was given")
        if model.vocabulary_size != reference.vocabulary_size:
            sizes = f"{model.vocabulary_size} and the reference's {reference.vocabulary_size}"
            raise GateInconclusive(f"vocabularies of {sizes} tokens do not compare")
        windows = flatten(model, batch)
        pairs = zip(reference.logits(windows), model.logits(windows), strict=True)
        scores = []
        for example in batch:
            kl, js, agree = array("f"), 0.0, 0.0
            total = 0.0
            for _ in example.payload:
                p, q = next(pairs)
                d = divergence(p[:-1], q[:-1])
                kl.extend(d.kl.tolist())
                total += d.kl.sum().item()
                js, agree = js + d.js.sum().item(), agree + d.agree.sum().item()
            scores.append(Score(example.id, total, len(kl), {"js": js, "top1": agree}, kl))
        return scores

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Mean Jensen–Shannon divergence, top-1 agreement, and percentiles of KL over tokens, in nats.

        p50 is the typical token, p999 (99.9 %) the rare one at which a generation may leave its path.
        """
        import numpy as np

        tokens = sum(s.weight for s in scores)
        kl = np.concatenate([np.asarray(s.positions, dtype=np.float32) for s in scores])
        means = {name: sum(s.extra[name] for s in scores) / tokens for name in ("js", "top1")}
        return means | dict(zip(PERCENTILES, map(float, np.percentile(kl, list(PERCENTILES.values())))))
