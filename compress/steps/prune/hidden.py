"""A narrower residual stream: the channels that its readers use least are removed from the whole model."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model
    from compress.steps.prune._width import Norm, Reading


class Hidden(Step):
    """Remove at most the `fraction` of the residual stream's channels: of embedding, head, norms and every linear.

    A channel's worth is the sum over the norms of its share in ‖W_:j‖₂ · ‖X_j‖₂, with W the linears that read the
    norm's output X (for the last norm the head, or an encoder's pooler), measured on the model as it is. A norm over
    fewer channels divides by another root mean square, or deviation: its gains are multiplied by the ratio of the two,
    that of deviations about the mean of all channels, over the calibration tokens.
    round_to: the width left is a multiple of it, rounded up. update: the reading linears' other weights and biases are
    set by least squares to come nearest to their old outputs, with a ridge towards the old weights; a head tied to the
    embedding stays as it is. ridge: λ as a fraction of the mean diagonal of the inputs' second moments.
    Where a config has no size of a head (GPT-2, encoders), the width left is a multiple of that size, too, and as many
    whole heads stay in every block as fill it: those that `prune.heads` keeps by `criterion: activation`, block by
    block and before the channels are judged. The linear that reads them is set by least squares in the same way.
    An encoder's pooler keeps as many outputs as channels stay, those of which its head makes most. For pooler and head,
    the first tokens of texts count as much as all others together.
    After the width pruning of Muralidharan et al. 2024, arXiv:2407.14679.
    """

    name: ClassVar[str] = "prune.hidden"
    version: ClassVar[int] = 3
    reshapes: ClassVar[bool] = True
    classifiers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    fraction: float = Field(ge=0, lt=1, allow_inf_nan=False)
    round_to: int = Field(32, ge=1)
    update: bool = True
    ridge: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)

    def check(self, facts: Facts) -> None:
        """Refuse a fraction that removes no channel; 0 is allowed, and changes nothing."""
        width, multiple = facts.sizes["residual"], self._multiple(facts)
        if self.fraction > 0 and self._width(facts) == width:
            reason = f"round_to={self.round_to}"
            if multiple != self.round_to:
                reason = f"{multiple}, for whole heads of {facts.head_size} channels and {reason}"
            bound = facts.architecture.splits_width and multiple == facts.head_size
            remedy = "raise fraction" if bound else "raise fraction or lower round_to"
            raise RecipeError(
                f"fraction={self.fraction} of {width} channels removes none, as those that stay are rounded up to a "
                f"multiple of {reason}; {remedy}"
            )

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """Of every norm of the residual stream that linears read, and of an encoder's pooler, at once."""
        if self.facts_after(facts) == facts:
            return {}
        found = dict.fromkeys(facts.readers, facts.sizes["residual"])
        return {**found, facts.architecture.head: facts.sizes["pooled"]} if "pooled" in facts.sizes else found

    def solved(self, facts: Facts) -> Mapping[str, int]:
        """None without an update: the others only measure."""
        return self.hessians(facts) if self.update else {}

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with a narrower residual stream."""
        width = self._width(facts)
        if width == facts.sizes["residual"]:
            return facts
        sizes = {**facts.sizes, "residual": width}
        if "pooled" in sizes:
            sizes["pooled"] = width
        if not facts.architecture.splits_width:
            return replace(facts, sizes=sizes)
        heads = width // facts.head_size
        return replace(facts, sizes={**sizes, "q": width, "kv": width}, heads=heads, kv_heads=heads)

    def apply(self, model: Model, context: Context) -> None:
        """Narrow the model in place, then the config."""
        from compress.numerics.neurons import highest
        from compress.steps.prune._record import require_finite
        from compress.steps.prune._structure import refuse_unready
        from compress.steps.prune._width import keep_embedding_scale, narrow, read, worth

        self.check(model.facts)
        before, after = model.facts, self.facts_after(model.facts)
        if after == before:
            return
        refuse_unready(model, context, self.name)
        if before.architecture.splits_width:
            self._remove_heads(model, context, after)
        width = after.sizes["residual"]
        found, head = read(model, context.calibration, context.progress)
        kept = highest(require_finite(worth(model, found), "the residual stream", self.name), width)
        for norm in found:
            self._adapt(model, norm, kept)
        pooled = None if head is None else self._pooled(model, head, width)
        keep_embedding_scale(model, width)
        narrow(model, after, kept, pooled)
        context.notes.append(f"{self.name}: {width} of {before.sizes['residual']} residual channels remain")
        if after.heads != before.heads:
            context.notes.append(f"{self.name}: {after.heads} of {before.heads} heads remain in each block")

    def _multiple(self, facts: Facts) -> int:
        return lcm(self.round_to, facts.head_size) if facts.architecture.splits_width else self.round_to

    def _width(self, facts: Facts) -> int:
        from compress.numerics.counts import kept_width

        return kept_width(self.fraction, facts.sizes["residual"], self._multiple(facts))

    def _remove_heads(self, model: Model, context: Context, after: Facts) -> None:
        """Leave as many heads in each block as the new width has room for; the stream is still as wide as it was."""
        from compress.blocks import walk
        from compress.steps.prune._structure import reader_of

        reader = reader_of(after.architecture, "q")
        for block in walk(model, context.calibration, context.progress):
            self._cut(model.facts, after, block, f"{after.architecture.blocks}.{block.index}.{reader}")

    def _cut(self, before: Facts, after: Facts, block: Block, name: str) -> None:
        """Choose heads by the moments of the inputs of the linear that reads them, then cut those of the attention."""
        from compress.numerics.neurons import channel_scores, together
        from compress.steps.prune._record import require_finite
        from compress.steps.prune._removal import moments, refit
        from compress.steps.prune._structure import kept_heads, remember, select_axis

        linear, sums = block.linears[name], moments(block, name, None)
        channels = linear.in_features
        single = channel_scores(linear.weight.detach(), sums[0][:channels, :channels])
        worth = require_finite(together(single.view(before.heads, -1), False), f"{name}.weight", self.name)
        kept = kept_heads(before, after, worth, False)
        if self.update:
            refit(self.name, name, linear, sums, kept["q"], self.ridge)
        select_axis(before, block.module, kept)
        wide = {**after.sizes, "residual": before.sizes["residual"]}  # as the stream still is
        remember(block.module, replace(after, sizes=wide))

    def _adapt(self, model: Model, norm: Norm, kept: Tensor) -> None:
        """Write, at full width still, what the kept channels of a norm and of its readers are to hold."""
        from compress.steps.prune._width import scale_gain

        scale_gain(model, norm.name, norm.ratio(kept))
        if norm.reading is not None and norm.reading.free:
            self._refit(model, norm.reading, kept)

    def _pooled(self, model: Model, head: Reading, width: int) -> Tensor:
        """The outputs of an encoder's pooler that stay; what its head is to make of them is written there."""
        from compress.numerics.neurons import highest
        from compress.steps.prune._record import require_finite
        from compress.steps.prune._width import scores

        (name,) = head.readers
        pooled = highest(require_finite(scores(model, head), f"{name}.weight", self.name), width)
        self._refit(model, head, pooled)
        return pooled

    def _refit(self, model: Model, reading: Reading, kept: Tensor) -> None:
        from compress.steps.prune._removal import refit

        if self.update:
            sums = reading.hessian.matrix, None
            for name in reading.readers:
                refit(self.name, name, model.module.get_submodule(name), sums, kept, self.ridge)
