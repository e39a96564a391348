"""Which weights to prune: exact counts of the lowest scores, with ties broken by position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compress.numerics.counts import pruned_count

Target = float | tuple[int, int]
"""What a matrix is to lose: a fraction of its weights, or all but N of every M consecutive input channels."""


def keep_highest(scores: Tensor, sparsity: float, kept: Tensor | None = None) -> Tensor:
    """Mask (n, m), True = kept, that drops the lowest `pruned_count(sparsity, m)` scores of each row.

    scores: (n, m) float, finite. kept: (n, m) bool, an earlier mask: what it dropped stays dropped and counts
    towards the sparsity, so a row loses more than the count only where it had lost more already.
    Among equal scores the lower column is dropped first.
    """
    return _drop_lowest(scores, pruned_count(sparsity, scores.shape[1]), kept)


def _drop_lowest(scores: Tensor, count: int, kept: Tensor | None) -> Tensor:
    """`keep_highest` with the number of weights that each row loses."""
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool) if kept is None else kept.clone()
    threshold = _order_statistic(scores, count - 1)
    dropped = scores < threshold
    missing = count - dropped.sum(dim=1)  # how many of those at the threshold go too, per row
    row, column = (scores == threshold).nonzero(as_tuple=True)
    first = torch.searchsorted(row, torch.arange(len(scores)))  # where each row starts in the sorted list
    chosen = torch.arange(len(row)) - first[row] < missing[row]
    dropped[row[chosen], column[chosen]] = True
    return ~dropped if kept is None else ~dropped & kept


def keep_n_of_m(scores: Tensor, n: int, m: int, kept: Tensor | None = None) -> Tensor:
    """Mask (rows, columns), True = kept, with the n highest of every m consecutive scores of a row.

    scores: (rows, columns) float, finite; m divides the columns. kept: an earlier mask; what it dropped stays
    dropped and counts. Among equal scores the lower column is dropped first.
    Zhou et al. 2021, arXiv:2102.04010.
    """
    mask = _drop_lowest(scores.reshape(-1, m), m - n, None if kept is None else kept.reshape(-1, m))
    return mask.view(scores.shape)


def keep(scores: Tensor, target: Target, kept: Tensor | None = None) -> Tensor:
    """Mask of the target, row by row: `keep_highest` for a fraction, `keep_n_of_m` for a pattern."""
    if isinstance(target, tuple):
        return keep_n_of_m(scores, *target, kept)
    return keep_highest(scores, target, kept)


def keep_highest_of_all(scores: Sequence[Tensor], sparsity: float, kept: Sequence[Tensor | None]) -> list[Tensor]:
    """One mask per score tensor, with the lowest scores of all tensors together dropped.

    The count is exact over the sum of their sizes; among equal scores the earlier tensor, then the lower
    flat position, is dropped first. `kept` is as in `keep_highest`.
    """
    flat = torch.cat([s.flatten() if k is None else s.masked_fill(~k, -torch.inf).flatten()
                      for s, k in zip(scores, kept, strict=True)])  # fmt: skip
    masks = torch.split(keep_highest(flat[None], sparsity)[0], [s.numel() for s in scores])
    return [
        mask.view(s.shape) if k is None else mask.view(s.shape) & k
        for mask, s, k in zip(masks, scores, kept, strict=True)
    ]


def wanda_scores(W: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂, (n, m).

    W: (n, m) weights. norms: (m,) Euclidean norm of each input channel over all calibration tokens.
    Sun et al. 2023, arXiv:2306.11695, eq. 1.
    """
    return W.abs() * norms.to(W.dtype)


def _order_statistic(scores: Tensor, index: int) -> Tensor:
    """The value at `index` of each sorted row, (n, 1)."""
    ordered = np.partition(scores.numpy(), index, axis=1)  # selects in linear time; sorting does not
    return torch.from_numpy(ordered[:, index : index + 1])
