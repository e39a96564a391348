"""Training in several processes (torchrun): each reads its share of a batch, and all take the same optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn


def place() -> tuple[int, int]:
    """Rank and number of the processes that train together: (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share(windows: Sequence[Tensor]) -> Sequence[Tensor]:
    """The windows of this process, every n-th; there may be none."""
    rank, size = place()
    return windows[rank::size]


def total(value: float) -> float:
    """The sum over all processes, in float64."""
    if place()[1] == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(found)
    return float(found)


@torch.no_grad()
def combine(parameters: Iterable[nn.Parameter], loss: float) -> float:
    """Sum gradients over all processes, in place, and the loss."""
    if place()[1] == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
    return total(loss)
