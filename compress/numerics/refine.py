"""Refining a quantized matrix against the Hessian of its inputs: scales in closed form, codes column by column.

What a row w loses, stored as q, is (w − q) H (w − q)ᵀ with H = XXᵀ: a quadratic in its scales for given codes, and in
each of its codes for given others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.numerics.sweep import runs

RIDGE = 1e-6  # of a row's largest moment, so that groups of equal levels leave the system solvable


def losses(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """(n,): what each row of W (n, m) loses, stored as Q."""
    E = W - Q
    return ((E @ H) * E).sum(1)


def refit_scales(W: Tensor, H: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """Scales (n, g) of least loss, all groups of a row solved together, since H couples them.

    W: (n, m). H: (m, m) symmetric. levels: (n, m), what the scales multiply. scales: (n, g), kept where a group's
    levels are all zero. All float32. The normal equations of a row: Σ_b (l_a H_ab l_bᵀ) s_b = l_a (w H)_aᵀ.
    """
    n, m = W.shape
    g = scales.shape[1]
    size = m // g
    products = torch.empty(n, g, g)
    for a in range(g):
        channels = slice(a * size, (a + 1) * size)
        products[:, a] = ((levels[:, channels] @ H[channels]) * levels).view(n, g, size).sum(-1)
    right = ((W @ H) * levels).view(n, g, size).sum(-1)
    diagonal = products.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    diagonal += RIDGE * diagonal.amax(1, keepdim=True) + empty
    found: Tensor = torch.linalg.solve(products, right)
    return torch.where(empty, scales, found)


def descend(W: Tensor, Q: Tensor, H: Tensor, visit: Callable[[int, Tensor], Tensor]) -> Tensor:
    """One pass of coordinate descent: every column of Q (n, m) in turn takes its best values, given all others.

    visit: given a column's index and the values of least loss, (n,), the values it takes instead. H: (m, m), with a
    positive diagonal. Rounding to a grid is exact here, for the loss is symmetric about those values.
    """
    W, Q = W.T.contiguous(), Q.T.clone(memory_format=torch.contiguous_format)  # (m, n)
    pulls = H @ (W - Q)
    diagonal = H.diagonal()
    for start, stop in runs(len(W)):
        before = Q[start:stop].clone()
        for j in range(start, stop):
            new = visit(j, Q[j] + pulls[j] / diagonal[j])
            change = new - Q[j]
            Q[j] = new
            pulls[j + 1 : stop] -= H[j, j + 1 : stop].unsqueeze(1) * change
        pulls[stop:].addmm_(H[stop:, start:stop], Q[start:stop] - before, alpha=-1)
    return Q.T
