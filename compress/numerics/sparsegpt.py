"""SparseGPT: which weights of a linear to drop, and how the others make up for them.

Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1. Departure: where the paper compares all weights of a run
of columns, each output row loses its own exact count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.counts import pruned_count
from compress.numerics.hessian import damped_factor
from compress.numerics.masks import Target, keep_n_of_m
from compress.numerics.sweep import COLUMNS_AT_ONCE, runs, sweep


def sparsify(
    W: Tensor, H: Tensor, target: Target, dampening: float, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """W (n, m) with what `target` asks for at zero and the rest updated to keep W·X; and its mask, True = kept.

    H: (m, m) XXᵀ over calibration tokens. kept: an earlier mask; what it dropped stays dropped and counts.
    Weights are chosen as their columns are reached, M columns at a time for a pattern and `COLUMNS_AT_ONCE`
    for a fraction, by w² / [(H + λI)⁻¹]_jj of the columns not yet passed.
    Raises NumericalError where H + λI is not positive definite.
    """
    H, dead = H.clone(), H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    R = damped_factor(H, dampening)
    weight = R.diagonal().masked_fill(dead, 0.0)  # a channel that never fires costs nothing
    mask = torch.ones_like(W, dtype=torch.bool) if kept is None else kept.clone()
    step = target[1] if isinstance(target, tuple) else COLUMNS_AT_ONCE
    choose = _Pattern(target) if isinstance(target, tuple) else _Fraction(target, mask)

    def begin(start: int, columns: Tensor) -> None:
        run = slice(start, start + len(columns))
        mask[:, run] = choose(start, (columns.T * weight[run]).square(), mask[:, run])

    def visit(j: int, column: Tensor) -> Tensor:
        return column * mask[:, j]

    return sweep(W, R, runs(W.shape[1], step), begin, visit), mask


class _Pattern:
    """Keeps n of the m scores at hand."""

    def __init__(self, pattern: tuple[int, int]):
        self._pattern = pattern

    def __call__(self, start: int, scores: Tensor, kept: Tensor) -> Tensor:
        return keep_n_of_m(scores, *self._pattern, kept)


class _Fraction:
    """Takes from each row, run by run, what it has yet to lose, spread evenly over the weights it still has."""

    def __init__(self, sparsity: float, kept: Tensor):
        m = kept.shape[1]
        self._free = kept.cumsum(dim=1)  # (n, m) weights kept so far, up to and with each column
        self._lost = (pruned_count(sparsity, m) - (m - self._free[:, -1])).clamp(min=0)  # (n,)

    def __call__(self, start: int, scores: Tensor, kept: Tensor) -> Tensor:
        """Mask of the run of columns that begins at `start`; scores, kept: (n, columns)."""
        columns = scores.shape[1]
        count = self._due(start + columns) - self._due(start)
        order = scores.masked_fill(~kept, torch.inf).argsort(dim=1, stable=True)
        survives = torch.arange(columns) >= count.unsqueeze(1)
        return torch.empty_like(kept).scatter_(1, order, survives) & kept

    def _due(self, stop: int) -> Tensor:
        """Of the weights before column `stop`, how many each row has lost by then, (n,)."""
        if stop == 0:
            return torch.zeros_like(self._lost)
        return self._lost * self._free[:, stop - 1] // self._free[:, -1].clamp(min=1)
