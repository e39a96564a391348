"""SparseGPT: pruning with the Hessian, the weights that stay making up for those that go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.errors import NumericalError
from compress.interfaces import Context
from compress.steps.prune._fields import WeightPruning

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model
    from compress.numerics.masks import Target


class Sparsegpt(WeightPruning):
    """Drop the weights that cost least once the others are updated, by the calibration's second moments.

    Blocks are pruned in order, each fed by the pruned ones before it; the linears of one block are all measured
    before any of them is pruned. Counts are exact per row, as in prune.wanda.
    Sensitivity, if asked for, is measured with Wanda's masks and no update, which costs a pass and not a factorization.
    dampening: λ as a fraction of the mean diagonal of the Hessian.
    Frantar & Alistarh 2023, arXiv:2301.00774.
    """

    name: ClassVar[str] = "prune.sparsegpt"
    version: ClassVar[int] = 3
    classifiers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    dampening: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """Of every input of a block that a linear with a target reads, at once."""
        return facts.inputs_of(self.masked(facts))

    def apply(self, model: Model, context: Context) -> None:
        """Prune and update in place; each mask lands in `model.masks`."""
        from compress.blocks import walk
        from compress.steps.prune._record import sparsity_notes

        targets = self.allocated(model, context)
        dead = sum(
            self._prune_block(model, block, targets) for block in walk(model, context.calibration, context.progress)
        )
        context.notes.extend(sparsity_notes(model, targets, self.name))
        if dead:
            context.notes.append(f"{self.name}: {dead} input channels were zero on all calibration tokens")

    def _prune_block(self, model: Model, block: Block, targets: dict[str, Target]) -> int:
        """Prune the linears of one block; returns how many of their input channels are dead."""
        from compress.numerics.hessian import Hessian

        dead = 0
        wanted = {names: [t for t in (f"{name}.weight" for name in names) if targets[t]] for names in block.stages}
        hessians = {names: Hessian(block.linears[names[0]].in_features, names[0]) for names in wanted if wanted[names]}
        block.observe(lambda names, X: hessians[names].add(X) if names in hessians else None)
        for names, hessian in hessians.items():
            H = hessian.matrix
            dead += int((H.diagonal() == 0).sum()) * len(wanted[names])
            for tensor in wanted[names]:
                self._prune(model, tensor, H, targets[tensor])
        return dead

    def _prune(self, model: Model, tensor: str, H: Tensor, target: Target) -> None:
        from compress.numerics.sparsegpt import sparsify
        from compress.steps.prune._record import record_mask, require_finite

        W = require_finite(model.parameter(tensor).detach(), tensor, self.name)
        try:
            new, mask = sparsify(W, H, target, self.dampening, model.masks.get(tensor))
        except NumericalError as error:
            raise NumericalError(f"{tensor}: {error}") from None
        model.parameter(tensor).data.copy_(require_finite(new, tensor, self.name))
        model.touch()
        record_mask(model, tensor, mask)
