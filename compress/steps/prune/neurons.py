"""Narrower MLPs: inner channels that add least are removed, and the output projection makes up for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model


class Neurons(Step):
    """Remove, in every block alike, at most the `fraction` of the MLP's inner channels that add least.

    A channel's worth is ‖W_:j‖₂ · ‖X_j‖₂, with W the output projection (down_proj) and X its inputs over the
    calibration tokens. Blocks are narrowed in order, each fed by the narrowed ones before it.
    round_to: the width left is a multiple of it, rounded up, as group sizes and kernels need.
    update: the output projection's other weights are set by least squares to come nearest to its old output,
    with a ridge towards their old values. ridge: λ as a fraction of the mean diagonal of the inputs' second moments.
    """

    name: ClassVar[str] = "prune.neurons"
    reshapes: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    fraction: float = Field(ge=0, lt=1, allow_inf_nan=False)
    round_to: int = Field(32, ge=1)
    update: bool = True
    ridge: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)

    def check(self, facts: Facts) -> None:
        """Refuse a fraction that removes no channel; 0 is allowed, and changes nothing."""
        width = facts.sizes["mlp"]
        if self.fraction > 0 and self._width(facts) == width:
            raise RecipeError(
                f"fraction={self.fraction} of {width} channels removes none, as those that stay are rounded up to a "
                f"multiple of round_to={self.round_to}; raise fraction or lower round_to"
            )

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with narrower MLPs."""
        return replace(facts, sizes={**facts.sizes, "mlp": self._width(facts)})

    def apply(self, model: Model, context: Context) -> None:
        """Narrow every block in place, then the config."""
        from compress.blocks import walk
        from compress.steps.prune._structure import refuse_unready

        self.check(model.facts)
        before, width = model.facts.sizes["mlp"], self._width(model.facts)
        if width == before:
            return
        refuse_unready(model, context, self.name)
        for block in walk(model, context.calibration, context.progress):
            self._narrow(model, block, width)
        model.module.config.intermediate_size = width
        model.reshaped()
        context.notes.append(f"{self.name}: {width} of {before} MLP channels remain in each block")

    def _width(self, facts: Facts) -> int:
        from compress.numerics.counts import kept_width

        return kept_width(self.fraction, facts.sizes["mlp"], self.round_to)

    def _narrow(self, model: Model, block: Block, width: int) -> None:
        """Choose channels by the inputs of the linear that reads them, then cut every linear of the MLP."""
        from compress.numerics.hessian import Hessian
        from compress.steps.prune._structure import select_channels

        arch = model.facts.architecture
        axes = {block.linears[f"{arch.blocks}.{block.index}.{name}"]: axis for name, axis in arch.linears.items()}
        (reader,) = [name for name, linear in block.linears.items() if axes[linear][1] == "mlp"]
        W = block.linears[reader].weight.detach()
        hessian = Hessian(W.shape[1])
        block.observe(lambda names, X: hessian.add(X) if reader in names else None)
        kept, V = self._choose(f"{reader}.weight", W, hessian.matrix, width)
        for linear, (outputs, inputs) in axes.items():
            if "mlp" in (outputs, inputs):
                select_channels(linear, kept, 0 if outputs == "mlp" else 1)
        block.linears[reader].weight.data.copy_(V)
        part: Any  # transformers keeps the width a second time
        for part in block.module.modules():
            if hasattr(part, "intermediate_size"):
                part.intermediate_size = width

    def _choose(self, tensor: str, W: Tensor, H: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Positions of the channels that stay, and the reading linear's weights for them."""
        from compress.numerics.neurons import channel_scores, compensated, highest
        from compress.steps.prune._record import require_finite

        kept = highest(require_finite(channel_scores(W, H), tensor, self.name), width)
        if not self.update:
            return kept, W[:, kept]
        try:
            return kept, require_finite(compensated(W, H, kept, self.ridge), tensor, self.name)
        except NumericalError as error:
            raise NumericalError(f"{tensor}: {error}") from None
