"""How much of each part to prune, where parts are not alike and the total is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def outlier_share(scores: list[Tensor], multiple: float) -> float:
    """Fraction of the scores, of any shapes, that exceed `multiple` times their mean.

    Yin et al. 2023, arXiv:2310.05175, eq. 3, over the scores of a block's linears together.
    """
    total, count = sum(float(s.double().sum()) for s in scores), sum(s.numel() for s in scores)
    threshold = multiple * total / count
    return sum(int((s > threshold).sum()) for s in scores) / count


def spread_sparsity(worth: list[float], sparsity: float, spread: float) -> list[float]:
    """A sparsity per part that falls linearly with its worth, with mean `sparsity`, over a range of 2 · spread at most.

    The range shrinks where it would leave [0, 1), so that the mean is kept; equal worths get equal sparsities.
    Yin et al. 2023, arXiv:2310.05175, section 3.3, where every sparsity also lies within `spread` of the mean: here,
    as in their code, the range is 2 · spread and the mean is exact.

    >>> spread_sparsity([1.0, 2.0, 4.0, 5.0], 0.5, 0.1)
    [0.6, 0.55, 0.45, 0.4]
    """
    values = torch.tensor(worth, dtype=torch.float64)
    width = float(values.max() - values.min())
    if width == 0:
        return [sparsity] * len(worth)
    offsets = (values.mean() - values) * (2 * spread / width)
    highest, lowest = float(offsets.max()), float(offsets.min())
    shrink = min(1.0, 0.999 * (1 - sparsity) / highest, sparsity / -lowest)
    return [round(sparsity + shrink * offset, 9) for offset in offsets.tolist()]


def highest_within(total: Callable[[float], int], budget: int, low: float, high: float) -> float:
    """The highest level from low to high, nearly, whose total is within the budget; low where none is.

    total: never falls as the level rises.

    >>> round(highest_within(lambda level: int(10 * level), 7, 0.0, 2.0), 9)
    0.8
    """
    if total(high) <= budget:
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return low
