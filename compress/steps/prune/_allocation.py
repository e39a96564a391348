"""How an overall sparsity is shared out among the blocks: by their outliers, or by what pruning each one costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.blocks import walk
from compress.errors import NumericalError
from compress.numerics.allocation import outlier_share
from compress.numerics.counts import pruned_count
from compress.numerics.masks import wanda_scores
from compress.steps.prune._record import channel_norms
from compress.steps.prune._stream import Stream

if TYPE_CHECKING:
    from compress.blocks import Block
    from compress.interfaces import Progress
    from compress.model import Model

TOKENS = 2048  # of the calibration, on which sensitivity is measured: half a pass over them per block and sparsity


@dataclass(frozen=True)
class Part:
    """What shares in the sparsity of one block.

    tensors: name → how many weights of each compared set are pruned already, (sets,) int64, and a set's size.
    """

    index: int
    tensors: Mapping[str, tuple[Tensor, int]]

    @property
    def size(self) -> int:
        """Its weights."""
        return sum(len(gone) * size for gone, size in self.tensors.values())

    def pruned(self, share: float) -> int:
        """How many weights are gone once each set has lost the share, or what it had lost before if that is more."""
        return sum(int(gone.clamp(min=pruned_count(share, size)).sum()) for gone, size in self.tensors.values())


def parts(model: Model, tensors: Sequence[str], set_size: Callable[[int, int], int]) -> list[Part]:
    """The parts of the blocks that hold these tensors. set_size: weights that compete in a matrix (n, m)."""
    found: dict[int, dict[str, tuple[Tensor, int]]] = {}
    for name in tensors:
        n, m = model.facts.matrices[name]
        size = set_size(n, m)
        mask = model.masks.get(name)
        gone = torch.zeros(n * m // size, dtype=torch.int64) if mask is None else (~mask).view(-1, size).sum(dim=1)
        index = int(name.removeprefix(f"{model.facts.architecture.blocks}.").partition(".")[0])
        found.setdefault(index, {})[name] = gone, size
    return [Part(index, found[index]) for index in sorted(found)]


def outlier_shares(
    model: Model, windows: Sequence[Tensor], among: Sequence[Part], multiple: float, progress: Progress
) -> list[float]:
    """Per part, the fraction of its Wanda scores above `multiple` times their mean, on the model as it is.

    Yin et al. 2023, arXiv:2310.05175, eq. 3. Raises NumericalError naming a block whose scores are not finite.
    """
    wanted = {part.index: part for part in among}
    shares = []
    for block in walk(model, windows, progress):
        if (part := wanted.get(block.index)) is None:
            continue
        scores = [s for name, s in wanda_scores_of(block).items() if name in part.tensors]
        if not all(bool(torch.isfinite(s).all()) for s in scores):
            raise NumericalError(f"{model.facts.architecture.blocks}.{block.index}: non-finite scores")
        shares.append(outlier_share(scores, multiple))
    return shares


@torch.inference_mode()
def sensitivities(
    model: Model,
    windows: Sequence[Tensor],
    among: Sequence[Part],
    masks: Callable[[Block, Part], dict[str, Tensor]],
    progress: Progress,
) -> list[float]:
    """Per part, ln of the mean KL (nats per token) to the model's logits when it alone is pruned, per weight of it.

    masks: those of a part, by tensor name. Measured on the first `TOKENS` of the windows, at one sparsity: on
    SmolLM2-135M ln KL rises between 42 and 58 % by 5.0 to 9.3 per unit of sparsity, mean 6.8, and solving for the least
    sum of KL with each block's own slope measured twice as much for nothing (perplexity 75.5 and 74.2 for two seeds,
    instead of 74.8 and 74.9). Raises NumericalError naming a block whose KL is not finite.
    """
    wanted = {part.index: part for part in among}
    held = {
        block.index: masks(block, wanted[block.index])
        for block in walk(model, windows, progress)
        if block.index in wanted
    }
    used = windows[: max(1, TOKENS // len(windows[0]))]
    blocks = list(model.module.get_submodule(model.facts.architecture.blocks))
    totals = dict.fromkeys(held, 0.0)
    for done, window in enumerate(used):
        progress("sensitivity", done / len(used))
        stream = Stream(model, window)
        entering = stream.states(blocks)
        reference = stream.logits(entering[-1])
        for k, own in held.items():
            with _pruned(model, own):
                totals[k] += stream.divergence(reference, stream.through(blocks[k:], entering[k]))
    if odd := [k for k, total in totals.items() if not math.isfinite(total)]:
        raise NumericalError(f"{model.facts.architecture.blocks}.{odd[0]}: non-finite hidden states")
    tokens = sum(map(len, used))
    # A block that costs nothing still has a logarithm.
    return [math.log(max(totals[k] / tokens, 1e-12) / wanted[k].size) for k in totals]


def wanda_scores_of(block: Block) -> dict[str, Tensor]:
    """Wanda's scores (n, m) of each linear, by tensor name."""
    norms, linears = channel_norms(block), block.linears
    return {f"{name}.weight": wanda_scores(linears[name].weight.detach(), norms[name]) for name in linears}


@contextmanager
def _pruned(model: Model, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The masked weights are zero inside, and as they were afterwards."""
    weights = {name: model.parameter(name) for name in masks}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data.masked_fill_(~masks[name], 0.0)
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(before[name])
