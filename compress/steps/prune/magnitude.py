"""Magnitude pruning: the weights nearest to zero go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from compress.interfaces import Context
from compress.steps.prune._fields import WeightPruning

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model
    from compress.numerics.masks import Target


class Magnitude(WeightPruning):
    """Drop the weights with the smallest |W_ij| in the blocks' linears.

    scope: what a sparsity compares: one matrix (`layer`), each output `row`, or all linears together
    (`global`) save those with an entry of their own under `layers`, which are pruned each by itself.
    Counts are exact: sparsity · n, rounded down, of each compared set of n weights; what an earlier step
    pruned stays pruned and counts. Equal magnitudes go in order of position.
    Han et al. 2015, arXiv:1506.02626.
    """

    name: ClassVar[str] = "prune.magnitude"
    classifiers: ClassVar[bool] = True

    scope: Literal["layer", "row", "global"] = "layer"

    @model_validator(mode="after")
    def _scope_fits(self) -> Self:
        if self.pattern is not None and self.scope != "layer":
            raise ValueError(f"scope={self.scope} with pattern={self.pattern}, which compares neighbours; drop scope")
        return self

    def apply(self, model: Model, context: Context) -> None:
        """Prune in place; each mask lands in `model.masks`."""
        from compress.steps.prune._record import record_mask, sparsity_notes

        targets = self.begin(model, context)
        groups = self._compared(model, targets)
        for i, group in enumerate(groups):
            for tensor, mask in zip(group, self._masks(model, group, targets[group[0]]), strict=True):
                record_mask(model, tensor, mask)
            context.progress(group[-1], (i + 1) / len(groups))
        context.notes.extend(sparsity_notes(model, targets, self.name))

    def _compared(self, model: Model, targets: dict[str, Target]) -> list[list[str]]:
        """Tensors in the groups within which weights compete."""
        if self.scope != "global":
            return [[tensor] for tensor in targets]
        own = self.own_targets(model.facts)
        together = [tensor for tensor in targets if tensor not in own]
        return [[tensor] for tensor in own] + ([together] if together else [])

    def _masks(self, model: Model, group: list[str], target: Target) -> list[Tensor]:
        """Masks of the tensors whose weights compete with each other."""
        from compress.numerics.masks import keep, keep_highest_of_all
        from compress.steps.prune._record import require_finite

        scores = [require_finite(model.parameter(t).detach().abs(), t, self.name) for t in group]
        kept = [model.masks.get(t) for t in group]
        if isinstance(target, tuple) or self.scope == "row":
            return [keep(s, target, k) for s, k in zip(scores, kept, strict=True)]
        return keep_highest_of_all(scores, target, kept)
