"""Fewer blocks: those that the model misses least are removed, and the blocks before them make up for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.architectures import Facts
    from compress.model import Model


class Layers(Step):
    """Remove the `count` blocks that the model misses least.

    criterion: `influence`, 1 − E[cos(x, y)] with x entering a block and y leaving it, on the model as it is before
    any block goes (Men et al. 2024, arXiv:2403.03853, eq. 1); or `divergence`, the mean KL to the whole model's
    logits without the block, measured anew after each removal on the first `tokens` of the calibration. Among equals
    the later block goes.
    update: with `stream`, the last linear of the block before each gap is set by least squares, its bias included, to
    come nearest to the residual stream behind the gap. ridge: towards its old weights, as in prune.neurons.
    """

    name: ClassVar[str] = "prune.layers"
    version: ClassVar[int] = 4
    reshapes: ClassVar[bool] = True
    classifiers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    count: int = Field(ge=0)
    criterion: Literal["influence", "divergence"] = "influence"
    tokens: int = Field(2048, ge=2)
    update: Literal["none", "stream"] = "none"
    ridge: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)

    @property
    def twins(self) -> bool:  # type: ignore[override]
        """Whether the model as it was says what the stream should be."""
        return self.update == "stream"

    def check(self, facts: Facts) -> None:
        """Refuse to remove every block, and an update that a norm makes meaningless."""
        from compress.steps.prune._structure import refuse_post_norms

        if self.update == "stream":
            refuse_post_norms(facts, self.name)
        if self.count >= facts.layers:
            remedy = f"use at most {facts.layers - 1}" if facts.layers > 1 else "leave the step out"
            raise RecipeError(f"count={self.count} leaves none of {facts.layers} blocks; {remedy}")

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """That of the linear that is set anew."""
        return {} if self.update == "none" or self.facts_after(facts) == facts else facts.inputs("mlp")

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with fewer blocks."""
        mixed = facts.kinds is None or len(set(facts.kinds)) > 1  # which kinds will go is not known yet
        left = facts.layers - self.count
        kinds = facts.kinds and facts.kinds[:left]
        return replace(facts, layers=left, kinds=None if mixed and self.count else kinds)

    def apply(self, model: Model, context: Context) -> None:
        """Remove the blocks in place, then adapt the config."""
        from compress.steps.prune._structure import refuse_unready

        self.check(model.facts)
        if self.count == 0:
            return
        refuse_unready(model, context, self.name)
        removed = self._least_missed(model, context)
        kept = [i for i in range(model.facts.layers) if i not in removed]
        before = model.facts.layers
        if self.update == "stream":
            self._bridge(model, context, kept)
        else:
            _keep_blocks(model, kept)
        listed = ", ".join(f"{i} ({removed[i]:.4f})" for i in sorted(removed))
        context.notes.append(f"{self.name}: removed blocks {listed}, by {self.criterion}, of {before}")

    def _least_missed(self, model: Model, context: Context) -> dict[int, float]:
        """The blocks to remove, each with what it was judged by."""
        from compress.classifier import texts_of
        from compress.steps.prune._depth import block_influence, by_divergence

        if self.criterion == "divergence":
            texts = texts_of(model, context.calibration)
            count = max(1, self.tokens * len(texts) // sum(map(len, texts)))
            return dict(by_divergence(model, texts[:count], self.count, context.progress))
        influence = block_influence(model, context.calibration, context.progress)
        order = sorted(range(len(influence)), key=lambda i: (influence[i], -i))
        return {i: influence[i] for i in order[: self.count]}

    def _bridge(self, model: Model, context: Context, kept: Sequence[int]) -> None:
        """Remove the blocks, and let each block before a gap aim at what left the last block of the gap."""
        import torch

        from compress.blocks import walk
        from compress.steps.prune._removal import moments, refit
        from compress.steps.prune._structure import reader_of, twin_of

        twins = walk(twin_of(model), context.calibration)
        behind = [i - 1 for i in [*kept[1:], model.facts.layers]]  # the block whose place each kept one takes
        arch = model.facts.architecture
        reader = reader_of(arch, "mlp")
        _keep_blocks(model, kept)
        for block, last in zip(walk(model, context.calibration, context.progress), behind, strict=True):
            target = next(twin for twin in twins if twin.index == last)
            if last == kept[block.index]:
                continue
            name = f"{arch.blocks}.{block.index}.{reader}"
            wanted = (after for _, _, after in target.around(f"{arch.blocks}.{last}.{reader}", last=True))
            sums = moments(block, name, wanted)
            if norm := arch.sum_norms.get(reader):  # from here on it reads the sum that the removed block's did
                block.module.get_submodule(norm).load_state_dict(target.module.get_submodule(norm).state_dict())
            linear = block.linears[name]
            refit(self.name, name, linear, sums, torch.arange(linear.in_features), self.ridge)
        model.touch()


def _keep_blocks(model: Model, kept: Sequence[int]) -> None:
    """Leave the blocks at the positions `kept`, each numbered by its new place in the cache."""
    from torch import nn

    parent, _, name = model.facts.architecture.blocks.rpartition(".")
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    setattr(model.module.get_submodule(parent), name, nn.ModuleList(blocks[i] for i in kept))
    for index, old in enumerate(kept):
        for part in blocks[old].modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    config = model.module.config
    if getattr(config, "layer_types", None):  # full or sliding attention, per block
        config.layer_types = [config.layer_types[i] for i in kept]
    setattr(config, model.facts.architecture.keys["layers"], len(kept))
    model.reshaped()
