"""Label divergence: how far a classifier's probabilities are from the reference's, whatever the right class is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Documents, Evaluator, Example, LanguageModel, Score


class LabelDivergence(Evaluator):
    """Mean KL(reference‖model) per text of the evaluation sources, over the classes of a classification head.

    Needs no labels. Jensen–Shannon divergence and the share of texts with the same likeliest class stand beside it.
    """

    name: ClassVar[str] = "label_divergence"
    unit: ClassVar[str] = "nats per text"
    definition: ClassVar[str] = (
        "mean over texts of KL(reference‖model) of the classes' probabilities; asymptotic, since the mean of an "
        "unbounded quantity has no distribution-free bound."
    )
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_mean"})
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "kl"
    minimum_examples: ClassVar[int] = 100
    relative: ClassVar[bool] = True
    classifiers: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    max_mean: float = Field(gt=0, allow_inf_nan=False)
    max_documents: int | None = Field(2000, ge=100)

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse a model without classes."""
        if not labels:
            raise RecipeError("compares the classes of a classification head, and this model has none; use divergence")

    @property
    def margin(self) -> float:
        """Largest mean divergence, in nats per text."""
        return self.max_mean

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per document; its payload is its tokens, as many as the model reads."""
        return [Example(name, name, tuple(encode(text))) for name, text in data.documents]

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """KL in nats of each text."""
        from compress.numerics.divergence import divergence

        if reference is None:
            raise TypeError("label_divergence compares with a reference model, and none was given")
        windows = [example.payload for example in batch]
        scores = []
        for example, p, q in zip(batch, reference.logits(windows), model.logits(windows), strict=True):
            d = divergence(p, q)
            extra = {"js": float(d.js), "top1": float(d.agree)}
            scores.append(Score(example.id, float(d.kl), 1.0, extra))
        return scores

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Mean Jensen–Shannon divergence in nats, and the share of texts whose likeliest class is the same."""
        return {name: sum(s.extra[name] for s in scores) / len(scores) for name in ("js", "top1")}
