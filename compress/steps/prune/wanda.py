"""Wanda: pruning by weights and activations, without retraining."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.interfaces import Context
from compress.steps.prune._fields import WeightPruning

if TYPE_CHECKING:
    from compress.model import Model


class Wanda(WeightPruning):
    """Drop, in each output row, the weights with the smallest |W_ij| · ‖X_j‖₂.

    ‖X_j‖₂ is the norm of input channel j over the calibration tokens. Blocks are pruned in order, and each
    sees the activations that the pruned blocks before it produce; the linears of one block are all measured
    before any of them is pruned. Counts are exact per row: sparsity · in_features, rounded down.
    Sun et al. 2023, arXiv:2306.11695, Algorithm 1.
    """

    name: ClassVar[str] = "prune.wanda"
    version: ClassVar[int] = 2
    classifiers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> None:
        """Prune in place; each mask lands in `model.masks`."""
        from compress.blocks import walk
        from compress.numerics.masks import keep, wanda_scores
        from compress.steps.prune._record import channel_norms, record_mask, require_finite, sparsity_notes

        targets = self.allocated(model, context)
        dead = 0
        for block in walk(model, context.calibration, context.progress):
            norms = channel_norms(block)
            for module, linear in block.linears.items():
                tensor = f"{module}.weight"
                if not targets[tensor]:
                    continue
                dead += int((norms[module] == 0).sum())
                scores = require_finite(wanda_scores(linear.weight.detach(), norms[module]), tensor, self.name)
                record_mask(model, tensor, keep(scores, targets[tensor], model.masks.get(tensor)))
        context.notes.extend(sparsity_notes(model, targets, self.name))
        if dead:
            context.notes.append(f"{self.name}: {dead} input channels were zero on all calibration tokens")
