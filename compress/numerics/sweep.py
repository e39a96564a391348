"""The sweep that GPTQ and SparseGPT share: columns are replaced in order, each error made up for by later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from compress.numerics.products import small_products

COLUMNS_AT_ONCE = 128  # of a run, where the caller knows no better
TOGETHER = 64  # columns that are replaced before one product carries their errors on

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

    for start, stop, begun in _parts(cuts):
        columns, part = wanted(start, stop), slice(start, stop)
        if begun and begun[0][1] > stop:
            begin(start, wanted(*begun.pop()))
        _replace(columns, R[part, part], start, begun, begin, visit, new[part])
        torch.sub(W[part], new[part], out=errors[part])
    return new.T


def _parts(cuts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Columns that are replaced together, and the runs that begin among them: short ones whole, a long one in pieces.

    >>> list(_parts([(0, 32), (32, 64), (64, 164)]))
    [(0, 64, [(0, 32), (32, 64)]), (64, 128, [(64, 164)]), (128, 164, [])]
    """
    begun: list[tuple[int, int]] = []
    for start, stop in cuts:
        if begun and stop - begun[0][0] > TOGETHER:
            yield begun[0][0], start, begun
            begun = []
        begun.append((start, stop))
        if stop - start > TOGETHER:
            for first in range(start, stop, TOGETHER):
                yield first, min(first + TOGETHER, stop), [(start, stop)] if first == start else []
            begun = []
    if begun:
        yield begun[0][0], begun[-1][1], begun


def _replace(
    columns: Tensor, R: Tensor, first: int, runs: list[tuple[int, int]], begin: Begin, visit: Visit, new: Tensor
) -> None:
    """Write to `new` (k, n) what `visit` makes of columns (k, n), the first of index `first`. R: (k, k), their own.

    runs: those that begin and end here, or none, of a longer one's part.
    """
    left = torch.empty_like(columns)  # by which each column is off, had those before it here no errors
    shares = (R / R.diagonal()).T.contiguous().unbind()
    rows = list(zip(columns, left, new))
    for start, stop in runs or [(first, first + len(columns))]:
        run = slice(start - first, stop - first)
        if runs:
            with small_products():
                lost = R[: run.start, run].T @ left[: run.start]
                wanted = columns[run] + torch.linalg.solve_triangular(R[run, run].T, lost, upper=False)
            begin(start, wanted)
        with small_products():
            for k in range(run.start, run.stop):
                column, off, found = rows[k]
                wanted = torch.addmv(column, left[:k].T, shares[k][:k]) if k else column
                found.copy_(visit(first + k, wanted))
                torch.sub(column, found, out=off)
