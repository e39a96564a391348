"""Fewer blocks: those that change the hidden state least are removed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context, Progress, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.architectures import Facts
    from compress.model import Model


class Layers(Step):
    """Remove the `count` blocks with the least influence 1 − E[cos(x, y)], x entering a block and y leaving it.

    The mean is over the calibration tokens, on the model as it is before any block goes. Among equal influences the
    later block goes.
    Men et al. 2024, arXiv:2403.03853, eq. 1.
    """

    name: ClassVar[str] = "prune.layers"
    reshapes: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    count: int = Field(ge=0)

    def check(self, facts: Facts) -> None:
        """Refuse to remove every block."""
        if self.count >= facts.layers:
            raise RecipeError(
                f"count={self.count} leaves none of {facts.layers} blocks; use at most {facts.layers - 1}"
            )

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with fewer blocks."""
        return replace(facts, layers=facts.layers - self.count)

    def apply(self, model: Model, context: Context) -> None:
        """Remove the blocks in place, then adapt the config."""
        from compress.steps.prune._structure import refuse_unready

        self.check(model.facts)
        if self.count == 0:
            return
        refuse_unready(model, context, self.name)
        influence = block_influence(model, context.calibration, context.progress)
        order = sorted(range(len(influence)), key=lambda i: (influence[i], -i))
        removed = sorted(order[: self.count])
        _keep_blocks(model, [i for i in range(len(influence)) if i not in removed])
        listed = ", ".join(f"{i} ({influence[i]:.4f})" for i in removed)
        context.notes.append(f"{self.name}: removed blocks {listed}, by influence, of {len(influence)}")


def block_influence(
    model: Model, windows: Sequence[Tensor], progress: Progress = lambda label, fraction: None, batch: int = 8
) -> list[float]:
    """1 − E[cos(x, y)] of each block over all tokens of the windows, (length,) int64 each.

    Raises NumericalError naming the first block where it is not finite.
    """
    import torch

    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    totals = [0.0] * len(blocks)

    def compare(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, y = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        totals[index] += float(torch.cosine_similarity(x.float(), y.float(), dim=-1).sum(dtype=torch.float64))

    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, out, i=i: compare(i, args, kwargs, out), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        # bfloat16 products are safe inside a block; the residual stream stays float32.
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            for start in range(0, len(windows), batch):
                progress("block influence", start / len(windows))
                model.module.base_model(input_ids=torch.stack(list(windows[start : start + batch])), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    influence = [1 - total / sum(map(len, windows)) for total in totals]
    if odd := [i for i, value in enumerate(influence) if not math.isfinite(value)]:
        raise NumericalError(
            f"{model.facts.architecture.blocks}.{odd[0]}: non-finite hidden states on calibration data"
        )
    return influence


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
    config.num_hidden_layers = len(kept)
    model.reshaped()
