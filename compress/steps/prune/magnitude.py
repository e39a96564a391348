"""Unstructured magnitude pruning: the weights nearest to zero go."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.model import Model


class Magnitude(Step):
    """Drop the fraction `sparsity` of the weights with the smallest |W_ij| in the blocks' linears.

    scope: compared within a `layer` (one matrix), within each output `row`, or over all chosen layers
    together (`global`). layers: globs over module names; all linears of the blocks by default.
    Counts are exact: sparsity · n, rounded down, of each compared set of n weights; what an earlier step
    pruned stays pruned and counts. Equal magnitudes go in order of position.
    Han et al. 2015, arXiv:1506.02626.
    """

    name: ClassVar[str] = "prune.magnitude"
    masks: ClassVar[bool] = True

    sparsity: float = Field(ge=0, lt=1, allow_inf_nan=False)
    scope: Literal["layer", "row", "global"] = "layer"
    layers: list[str] | None = Field(None, min_length=1)

    def check(self, facts: Facts) -> None:
        """Refuse globs that match no linear of the blocks."""
        self._tensors(facts)

    def apply(self, model: Model, context: Context) -> None:
        """Prune in place; each mask lands in `model.masks`."""
        from compress.steps.prune._record import record_mask, refuse_encoded, sparsity_note

        tensors = self._tensors(model.facts)
        refuse_encoded(model, tensors, self.name)
        groups = [tensors] if self.scope == "global" else [[tensor] for tensor in tensors]
        for i, group in enumerate(groups):
            for tensor, mask in zip(group, self._masks(model, group), strict=True):
                record_mask(model, tensor, mask)
            context.progress(group[-1], (i + 1) / len(groups))
        context.notes.append(sparsity_note(model, tensors, self.name))

    def _masks(self, model: Model, group: list[str]) -> list[Tensor]:
        """Masks of the tensors whose weights compete with each other."""
        from compress.numerics.masks import keep_highest, keep_highest_of_all
        from compress.steps.prune._record import require_finite

        scores = [require_finite(model.parameter(t).detach().abs(), t, self.name) for t in group]
        kept = [model.masks.get(t) for t in group]
        if self.scope == "row":
            return [keep_highest(s, self.sparsity, k) for s, k in zip(scores, kept, strict=True)]
        return keep_highest_of_all(scores, self.sparsity, kept)

    def _tensors(self, facts: Facts) -> list[str]:
        """Tensor names of the chosen linears; raises RecipeError for a glob that matches none."""
        globs = self.layers if self.layers is not None else ["*"]
        for glob in globs:
            if not any(fnmatchcase(module, glob) for module in facts.linears):
                example = next(iter(facts.linears))
                raise RecipeError(f"{self.name}: layers: {glob!r} matches no linear; names look like {example}")
        chosen = (m for m in facts.linears if any(fnmatchcase(m, glob) for glob in globs))
        return [f"{module}.weight" for module in chosen]
