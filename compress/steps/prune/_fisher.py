"""Which errors of a linear's output the loss feels: the directions of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.batching import first_holding
from compress.errors import NumericalError
from compress.steps.prune._taylor import gradients

if TYPE_CHECKING:
    from compress.interfaces import Progress
    from compress.model import Model

TOKENS_PER_CHANNEL = 28  # of the output: enough for its second moments


def output_fisher(
    model: Model,
    windows: Sequence[Tensor],
    linear: str,
    progress: Progress = lambda label, fraction: None,
    seed: int = 0,
) -> list[Tensor]:
    """Mean of g gᵀ / ‖g‖² over tokens per block, (n, n) float32, with g the loss's gradient by the linear's output.

    linear: its name within a block. windows: (tokens,) int64 each, of which the first are read, those that hold 28
    tokens per channel of the output, or all. The loss, and seed, are those of `taylor_scores`. Without ‖g‖², and with
    targets that are drawn from a language model, too, instead of its texts' own next tokens, these are the factors for
    outputs of Martens & Grosse 2015, arXiv:1503.05671; tokens count alike here, as the few that the loss depends on
    most would decide for all. Raises NumericalError naming the block or the linear where states or gradients are not
    finite, or where there are no gradients.
    """
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    n = blocks[0].get_submodule(linear).out_features
    found = [torch.zeros(n, n) for _ in blocks]
    read = windows[: first_holding(TOKENS_PER_CHANNEL * n, map(len, windows))]
    tokens = sum(map(len, read))
    with closing(gradients(model, read, linear, progress, seed, of_output=True)) as passes:
        for index, _, g in passes:
            size = g.norm(dim=1, keepdim=True)
            g = g / torch.where(size == 0, 1.0, size)
            found[index].addmm_(g.T, g, alpha=1 / tokens)
    for index, G in enumerate(found):
        if not G.any():
            name = f"{model.facts.architecture.blocks}.{index}.{linear}"
            raise NumericalError(f"{name}: no gradient reaches its output on the calibration data")
    return found
