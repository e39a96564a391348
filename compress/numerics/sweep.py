"""The sweep that GPTQ and SparseGPT share: columns are replaced in order, each error carried into later ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 128  # columns whose errors are carried inside a run before one product updates the rest

Visit = Callable[[int, Tensor], Tensor]
"""Given a column's index and the columns from there on, (columns, n): the column's new values, (n,).

Columns of the same run are as updated by now; the later ones are so where the column begins a run.
"""


def runs(m: int, size: int = COLUMNS_AT_ONCE) -> list[tuple[int, int]]:
    """Cut m columns into runs of `size`.

    >>> runs(300)
    [(0, 128), (128, 256), (256, 300)]
    """
    return [(start, min(start + size, m)) for start in range(0, m, size)]


def sweep(W: Tensor, U: Tensor, cuts: Sequence[tuple[int, int]], visit: Visit) -> Tensor:
    """W (n, m) with every column replaced by what `visit` makes of it; the argument is left as it was.

    U: (m, m) upper factor of the damped inverse Hessian. After column j, its error / U_jj times the rest of
    row j of U is taken from the columns after it.
    Frantar et al. 2022, arXiv:2210.17323, Algorithm 1; Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1.
    """
    W = W.T.clone(memory_format=torch.contiguous_format)  # (m, n): what is replaced together lies together
    errors = W.new_empty(max((stop - start for start, stop in cuts), default=0), W.shape[1])
    for start, stop in cuts:
        for j in range(start, stop):
            new = visit(j, W[j:])
            error = torch.sub(W[j], new).div_(U[j, j])
            errors[j - start], W[j] = error, new
            W[j + 1 : stop] -= U[j, j + 1 : stop].unsqueeze(1) * error
        W[stop:].addmm_(U[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return W.T
