"""Narrower MLPs: inner channels that add least are removed, and the output projection makes up for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.prune._removal import Criterion, Removal, Sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model


class Neurons(Removal):
    """Remove, in every block alike, at most the `fraction` of the MLP's inner channels that add least.

    The output projection (down_proj) reads the channels: `criterion`, `update` and what follows speak of it.
    Blocks are narrowed in order, each fed by the narrowed ones before it. They stay equally wide, since a transformers
    config and onnxruntime-genai hold one width for all.
    round_to: the width left is a multiple of it, rounded up, as group sizes and kernels need.
    """

    name: ClassVar[str] = "prune.neurons"
    version: ClassVar[int] = 9

    criterion: Criterion = "fisher"
    ridge: float = Field(0.1, gt=0, lt=1, allow_inf_nan=False)
    random_tokens: float = Field(0.125, ge=0, le=1, allow_inf_nan=False)
    inverse_frequency: float = Field(0.2, ge=0, le=1, allow_inf_nan=False)
    fraction: float = Field(ge=0, lt=1, allow_inf_nan=False)
    round_to: int = Field(32, ge=1)

    def check(self, facts: Facts) -> None:
        """Refuse a fraction that removes no channel; 0 is allowed, and changes nothing."""
        self.check_update(facts)
        width = facts.sizes["mlp"]
        if self.fraction > 0 and self._width(facts) == width:
            raise RecipeError(
                f"fraction={self.fraction} of {width} channels removes none, as those that stay are rounded up to a "
                f"multiple of round_to={self.round_to}; raise fraction or lower round_to"
            )

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """That of the linear that is set anew."""
        return {} if self.update == "none" or self.facts_after(facts) == facts else facts.inputs("mlp")

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with narrower MLPs."""
        return replace(facts, sizes={**facts.sizes, "mlp": self._width(facts)})

    def apply(self, model: Model, context: Context) -> None:
        """Narrow every block in place, then the config."""
        from compress.steps.prune._removal import summed
        from compress.steps.prune._structure import reader_of, refuse_unready

        self.check(model.facts)
        before, width = model.facts.sizes["mlp"], self._width(model.facts)
        if width == before:
            return
        refuse_unready(model, context, self.name)
        reader = reader_of(model.facts.architecture, "mlp")
        felt = self.felt(model, context, reader)
        for block, name, sums in summed(model, context, self, reader):
            self._narrow(model, block, name, sums, width, felt[block.index])
        setattr(model.module.config, model.facts.architecture.keys["mlp"], width)
        model.reshaped()
        context.notes.append(f"{self.name}: {width} of {before} MLP channels remain in each block")

    def _width(self, facts: Facts) -> int:
        from compress.numerics.counts import kept_width

        return kept_width(self.fraction, facts.sizes["mlp"], self.round_to)

    def _narrow(self, model: Model, block: Block, name: str, sums: Sums, width: int, felt: Tensor | None) -> None:
        """Choose channels by the moments of the inputs of the linear that reads them, then cut those of the MLP."""
        from compress.numerics.neurons import highest
        from compress.steps.prune._record import require_finite
        from compress.steps.prune._removal import refit
        from compress.steps.prune._structure import select_axis

        linear = block.linears[name]
        scores = self.scores(linear.weight.detach(), sums[0], felt)
        kept = highest(require_finite(scores, f"{name}.weight", self.name), width)
        if self.update != "none":
            refit(self.name, name, linear, sums, kept, self.ridge)
        select_axis(model.facts, block.module, {"mlp": kept})
        part: Any  # transformers keeps the width a second time
        for part in block.module.modules():
            if hasattr(part, "intermediate_size"):
                part.intermediate_size = width
