"""The sweep that GPTQ and SparseGPT share: columns are replaced in order, each error made up for by later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compress.numerics.products import small_products

COLUMNS_AT_ONCE = 128  # columns that are replaced before one product carries their errors on

Begin = Callable[[int, Tensor], None]
"""Given the first column of a run and the columns from there on, (columns, n), as earlier errors have changed them."""
Visit = Callable[[int, Tensor], Tensor]
"""Given a column's index and what it should hold to make up for earlier errors, (n,): what it holds instead."""


def runs(m: int, size: int = COLUMNS_AT_ONCE) -> list[tuple[int, int]]:
    """Cut m columns into runs of `size`.

    >>> runs(300)
    [(0, 128), (128, 256), (256, 300)]
    """
    return [(start, min(start + size, m)) for start in range(0, m, size)]


def sweep(W: Tensor, R: Tensor, cuts: Iterable[tuple[int, int]], begin: Begin, visit: Visit) -> Tensor:
    """W (n, m) with every column replaced by what `visit` makes of it; the argument is left as it was.

    R: (m, m), upper, RRᵀ the damped Hessian. cuts: runs of columns in order. `begin` is called before each run's first
    column, and changes nothing.

    With E = W − Ŵ the loss is ‖ER‖², and (ER)_j depends on columns up to j alone: column j loses nothing where it holds
    w_j + Σ_{i<j} e_i R_ij / R_jj. So are weights updated in Frantar et al. 2022, arXiv:2210.17323, Algorithm 1, and
    Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1, in the form of Chee et al. 2023, arXiv:2307.13304, which
    needs no inverse.
    """
    W = W.T.contiguous()  # (m, n): what is replaced together lies together
    new, errors = torch.empty_like(W), torch.empty_like(W)

    def wanted(start: int, stop: int) -> Tensor:
        columns = W[start:stop].clone()
        if start:
            lost = R[:start, start:stop].T @ errors[:start]
            columns += torch.linalg.solve_triangular(R[start:stop, start:stop].T, lost, upper=False)
        return columns

    for start, stop in cuts:
        columns = wanted(start, stop)
        begin(start, columns)
        for first in range(start, stop, COLUMNS_AT_ONCE):
            part = slice(first, min(first + COLUMNS_AT_ONCE, stop))
            columns = columns[: part.stop - first] if first == start else wanted(first, part.stop)
            with small_products():
                _replace(columns, R[part, part], first, visit, new[part])
            torch.sub(W[part], new[part], out=errors[part])
    return new.T


def _replace(columns: Tensor, R: Tensor, first: int, visit: Visit, new: Tensor) -> None:
    """Write to `new` (k, n) what `visit` makes of columns (k, n), the first of index `first`. R: (k, k), their own."""
    left = torch.empty_like(columns)  # by which each column is off, had its run no errors before it
    shares = (R / R.diagonal()).T.contiguous()
    for k, (column, share) in enumerate(zip(columns.unbind(), shares.unbind())):
        new[k] = visit(first + k, torch.addmv(column, left[:k].T, share[:k]) if k else column)
        torch.sub(column, new[k], out=left[k])
