"""How an overall sparsity is shared out among the blocks: by their outliers, or by what pruning each one costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.blocks import walk
from compress.errors import NumericalError
from compress.numerics.allocation import outlier_share
from compress.numerics.masks import keep_highest, wanda_scores
from compress.steps.prune._record import channel_norms
from compress.steps.prune._stream import Stream

if TYPE_CHECKING:
    from compress.blocks import Block
    from compress.interfaces import Progress
    from compress.model import Model

TOKENS = 2048  # of the calibration, on which sensitivity is measured: half a pass over them per block


def outlier_shares(model: Model, windows: Sequence[Tensor], multiple: float, progress: Progress) -> list[float]:
    """Per block, the fraction of its Wanda scores above `multiple` times their mean, on the model as it is.

    Yin et al. 2023, arXiv:2310.05175, eq. 3. Raises NumericalError naming a block whose scores are not finite.
    """
    shares = []
    for block in walk(model, windows, progress):
        scores = list(_scores(block).values())
        if not all(bool(torch.isfinite(s).all()) for s in scores):
            raise NumericalError(f"{model.facts.architecture.blocks}.{block.index}: non-finite scores")
        shares.append(outlier_share(scores, multiple))
    return shares


@torch.inference_mode()
def sensitivities(model: Model, windows: Sequence[Tensor], sparsity: float, progress: Progress) -> list[float]:
    """Per block, ln of the mean KL (nats per token) to the model's logits when Wanda prunes this block alone.

    Measured on the first `TOKENS` of the windows. Raises NumericalError naming a block whose KL is not finite.
    """
    masks = [
        {name: keep_highest(scores, sparsity) for name, scores in _scores(block).items()}
        for block in walk(model, windows, progress)
    ]
    used = windows[: max(1, TOKENS // len(windows[0]))]
    blocks = list(model.module.get_submodule(model.facts.architecture.blocks))
    totals = [0.0] * len(blocks)
    for done, window in enumerate(used):
        progress("sensitivity", done / len(used))
        stream = Stream(model, window)
        entering = stream.states(blocks)
        reference = stream.logits(entering[-1])
        for k in range(len(blocks)):
            with _pruned(model, masks[k]):
                totals[k] += stream.divergence(reference, stream.through(blocks[k:], entering[k]))
    means = [total / sum(map(len, used)) for total in totals]
    if odd := [k for k, mean in enumerate(means) if not math.isfinite(mean)]:
        raise NumericalError(f"{model.facts.architecture.blocks}.{odd[0]}: non-finite hidden states")
    return [math.log(max(mean, 1e-12)) for mean in means]  # a block that costs nothing still has a logarithm


def _scores(block: Block) -> dict[str, Tensor]:
    """Wanda's scores (n, m) of each linear, by module name."""
    norms = channel_norms(block)
    return {name: wanda_scores(linear.weight.detach(), norms[name]) for name, linear in block.linears.items()}


@contextmanager
def _pruned(model: Model, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The masked weights are zero inside, and as they were afterwards."""
    weights = {name: model.parameter(f"{name}.weight") for name in masks}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data.masked_fill_(~masks[name], 0.0)
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(before[name])
