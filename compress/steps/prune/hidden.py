"""A narrower residual stream: the channels that its readers use least are removed from the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.architectures import Facts
    from compress.model import Model
    from compress.steps.prune._width import Reading


class Hidden(Step):
    """Remove at most the `fraction` of the residual stream's channels: of embedding, head, norms and every linear.

    A channel's worth is the sum over the norms of its share in ‖W_:j‖₂ · ‖X_j‖₂, with W the linears that read the
    norm's output X (for the last norm the head), measured on the model as it is. A norm over fewer channels divides by
    another root mean square: its gains are multiplied by the ratio of the two over the calibration tokens.
    round_to: the width left is a multiple of it, rounded up. update: the reading linears' other weights and biases are
    set by least squares to come nearest to their old outputs, with a ridge towards the old weights; a head tied to the
    embedding stays as it is. ridge: λ as a fraction of the mean diagonal of the inputs' second moments.
    After the width pruning of Muralidharan et al. 2024, arXiv:2407.14679.
    """

    name: ClassVar[str] = "prune.hidden"
    version: ClassVar[int] = 2
    reshapes: ClassVar[bool] = True
    classifiers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    fraction: float = Field(ge=0, lt=1, allow_inf_nan=False)
    round_to: int = Field(32, ge=1)
    update: bool = True
    ridge: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)

    def check(self, facts: Facts) -> None:
        """Refuse a fraction that removes no channel; 0 is allowed, and changes nothing."""
        from compress.steps.prune._structure import refuse_split_width

        if self.fraction > 0:
            refuse_split_width(facts, self.name)
        if self.fraction > 0 and facts.architecture.scaled_embedding:
            raise RecipeError(
                f"{self.name}: a {facts.architecture.model_type} multiplies its embedding by the root of the width, "
                "which would change; use prune.neurons, prune.heads or prune.layers"
            )
        width = facts.sizes["residual"]
        if self.fraction > 0 and self._width(facts) == width:
            raise RecipeError(
                f"fraction={self.fraction} of {width} channels removes none, as those that stay are rounded up to a "
                f"multiple of round_to={self.round_to}; raise fraction or lower round_to"
            )

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """Of every norm of the residual stream, at once."""
        if self.facts_after(facts) == facts:
            return {}
        arch, width = facts.architecture, facts.sizes["residual"]
        blocks = {f"{arch.blocks}.{i}.{norm}": width for i in range(facts.layers) for norm in arch.block_norms}
        return {**blocks, arch.final_norm: width}

    def solved(self, facts: Facts) -> Mapping[str, int]:
        """None without an update: the others only measure."""
        return self.hessians(facts) if self.update else {}

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with a narrower residual stream."""
        return replace(facts, sizes={**facts.sizes, "residual": self._width(facts)})

    def apply(self, model: Model, context: Context) -> None:
        """Narrow the model in place, then the config."""
        from compress.numerics.neurons import highest
        from compress.steps.prune._record import require_finite
        from compress.steps.prune._structure import refuse_unready
        from compress.steps.prune._width import narrow, readings, worth

        self.check(model.facts)
        before, width = model.facts.sizes["residual"], self._width(model.facts)
        if width == before:
            return
        refuse_unready(model, context, self.name)
        found = readings(model, context.calibration, context.progress)
        kept = highest(require_finite(worth(model, found), "the residual stream", self.name), width)
        for reading in found:
            self._adapt(model, reading, kept)
        narrow(model, kept)
        context.notes.append(f"{self.name}: {width} of {before} residual channels remain")

    def _width(self, facts: Facts) -> int:
        from compress.numerics.counts import kept_width

        return kept_width(self.fraction, facts.sizes["residual"], self.round_to)

    def _adapt(self, model: Model, reading: Reading, kept: Tensor) -> None:
        """Write, at full width still, what the kept channels of a norm and of its readers are to hold."""
        from compress.steps.prune._removal import refit

        model.parameter(f"{reading.norm}.weight").data.mul_(reading.energy[kept].mean().sqrt())
        if not self.update or not reading.free:
            return
        sums = reading.hessian.matrix, None
        for name in reading.readers:
            refit(self.name, name, model.module.get_submodule(name), sums, kept, self.ridge)
