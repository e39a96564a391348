"""The sweep that GPTQ and SparseGPT share: columns are replaced in order, each error carried into later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

COLUMNS_AT_ONCE = 128  # columns whose errors are carried inside a run before one product updates the rest

Visit = Callable[[int, Tensor], Tensor]
"""Given a column's index and its run from there on as updated by now, (columns, n): the column's new values (n,)."""


def runs(m: int, size: int = COLUMNS_AT_ONCE) -> list[tuple[int, int]]:
    """Cut m columns into runs of `size`.

    >>> runs(300)
    [(0, 128), (128, 256), (256, 300)]
    """
    return [(start, min(start + size, m)) for start in range(0, m, size)]


def sweep(W: Tensor, U: Tensor, cuts: Iterable[tuple[int, int]], visit: Visit) -> Tensor:
    """W (n, m) with every column replaced by what `visit` makes of it; the argument is left as it was.

    U: (m, m) upper factor of the damped inverse Hessian. After column j, its error / U_jj times the rest of
    row j of U is taken from the columns after it.
    Frantar et al. 2022, arXiv:2210.17323, Algorithm 1; Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1.
    """
    W = W.clone()
    for start, stop in cuts:
        Wb = W[:, start:stop].T.contiguous()  # (columns, n): a column of W is then contiguous
        errors = Wb.clone()
        for i, j in enumerate(range(start, stop)):
            new = visit(j, Wb[i:])
            errors[i] = (Wb[i] - new) / U[j, j]
            Wb[i] = new
            Wb[i + 1 :] -= U[j, j + 1 : stop].unsqueeze(1) * errors[i]
        W[:, start:stop] = Wb.T
        W[:, stop:] -= errors.T @ U[start:stop, stop:]
    return W
