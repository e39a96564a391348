"""Magnitude pruning: the weights nearest to zero go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from compress.interfaces import Context
from compress.steps.prune._fields import WeightPruning

if TYPE_CHECKING:
    from torch import Tensor

    from compress.blocks import Block
    from compress.model import Model
    from compress.numerics.masks import Target


class Magnitude(WeightPruning):
    """Drop the weights with the smallest |W_ij| in the blocks' linears.

    scope: what a sparsity compares: one matrix (`layer`), each output `row`, or all linears together
    (`global`) save those with an entry of their own under `layers`, which are pruned each by itself.
    Counts are exact: sparsity · n, rounded down, of each compared set of n weights; what an earlier step
    pruned stays pruned and counts. Equal magnitudes go in order of position. Calibration data is read only where an
    `allocation` other than uniform is chosen.
    Han et al. 2015, arXiv:1506.02626.
    """

    name: ClassVar[str] = "prune.magnitude"
    classifiers: ClassVar[bool] = True

    scope: Literal["layer", "row", "global"] = "layer"

    @model_validator(mode="after")
    def _scope_fits(self) -> Self:
        if self.pattern is not None and self.scope != "layer":
            raise ValueError(f"scope={self.scope} with pattern={self.pattern}, which compares neighbours; drop scope")
        if self.allocation != "uniform" and self.scope == "global":
            raise ValueError(f"scope=global with allocation={self.allocation}: both share the sparsity out; drop one")
        return self

    @property
    def uses_calibration(self) -> bool:  # type: ignore[override]  # a class variable of steps that always do
        """Whether blocks are compared by what they do on data."""
        return self.allocation != "uniform"

    def set_size(self, n: int, m: int) -> int:
        """Those of one output, or the whole matrix, as the scope says."""
        return m if self.scope == "row" else n * m

    def scores(self, block: Block) -> dict[str, Tensor]:
        """|W| of each linear."""
        return {f"{name}.weight": linear.weight.detach().abs() for name, linear in block.linears.items()}

    def apply(self, model: Model, context: Context) -> None:
        """Prune in place; each mask lands in `model.masks`."""
        from compress.steps.prune._record import record_mask, sparsity_notes

        targets = self.allocated(model, context)
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
        from compress.numerics.masks import keep_highest_of_all
        from compress.steps.prune._record import require_finite

        scores = [require_finite(model.parameter(t).detach().abs(), t, self.name) for t in group]
        if len(group) == 1:
            return [self._mask(model, group[0], scores[0], target)]
        assert not isinstance(target, tuple)
        return keep_highest_of_all(scores, target, [model.masks.get(t) for t in group])
