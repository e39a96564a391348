"""Scales and zero points of least ‖W − Ŵ‖_p^p with p < 1, by half-quadratic splitting.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog).
An ℓp norm with p < 1 tolerates a few large errors for many small ones, as outliers among weights demand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.affine import WEIGHTS_AT_ONCE, Grid, finite, fit, float16, inverse

BETA, KAPPA = 10.0, 1.01  # the penalty's weight β and its growth per iteration


def shrink(x: Tensor, powers: Tensor, beta: float) -> Tensor:
    """The E of least |E|^p + β/2·(E − x)², approximately: sign(x) · max(|x| − |x|^(p−1)/β, 0).

    powers: |x|^p. The source's generalized soft threshold; with p = 1 it is the exact one.
    """
    magnitude = x.abs()
    threshold = powers / torch.where(magnitude == 0, 1.0, magnitude) / beta
    return torch.where(magnitude == 0, 0.0, (magnitude - threshold).clamp_(min=0).copysign_(x))


def fit_half_quadratic(W: Tensor, low: int, high: int, symmetric: bool, p: float, iterations: int) -> Grid:
    """The grid of W (n, g, k) after alternating between the sparse error E and the grid; see `_refine`.

    Raises NumericalError for non-finite weights or scales beyond float16.
    """
    covering = fit(W, low, high, symmetric, None, search=False)
    size = max(1, WEIGHTS_AT_ONCE // W[0].numel())
    zeros = None if covering.zero_points is None else torch.split(covering.zero_points, size)
    parts = [
        _refine(rows, Grid(low, high, scales, None if zeros is None else zeros[i]), p, iterations)
        for i, (rows, scales) in enumerate(zip(torch.split(W, size), torch.split(covering.scales, size)))
    ]
    zero_points = None if symmetric else torch.cat([g.zero_points for g in parts if g.zero_points is not None])
    return Grid(low, high, torch.cat([g.scales for g in parts]), zero_points)


def _refine(W: Tensor, start: Grid, p: float, iterations: int) -> Grid:
    """Of `iterations` grids from `start` on, per group the one of least Σ |w − ŵ|^p.

    Each iteration: E = shrink(W − Ŵ); then the grid that is nearest to W − E in the least squares sense, given
    the codes c: z = mean(c − (W − E)/s), s = Σ (c − z)(w − e) / Σ (c − z)².
    Departures: z is rounded to the integer that is stored, and so hardly ever moves from that of the range; hence
    the scale, fixed in the source, is solved for too. E and β are counted in steps of the first grid, so that
    scaling W changes no code. The best iteration is kept, not the last.
    """
    unit = torch.where(start.scales == 0, 1.0, start.scales.float().abs()).unsqueeze(-1)
    grid = best = start
    least = torch.full(start.scales.shape, torch.inf)
    for i in range(iterations):
        codes = grid.round(W)
        x = (W - grid.decode(codes)) / unit
        powers = x.abs().pow_(p)
        error = powers.sum(-1)
        better = error < least
        best, least = _choose(better, grid, best), torch.where(better, error, least)
        target = W - shrink(x, powers, BETA * KAPPA**i).mul_(unit)
        grid = _nearest(target, codes, grid)
    return best


def _nearest(target: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """The grid whose decoded `codes` lie nearest to `target` (n, g, k), zero points first, then scales."""
    zeros, centred = None, codes
    if grid.zero_points is not None:
        zeros = (codes - target * inverse(grid.scales).unsqueeze(-1)).mean(-1).round_().clamp_(grid.low, grid.high)
        centred, zeros = codes - zeros.unsqueeze(-1), zeros.to(torch.uint8)
    squares = centred.square().sum(-1)
    ratio = (target * centred).sum(-1) / torch.where(squares == 0, 1.0, squares)
    return Grid(grid.low, grid.high, float16(torch.where(squares == 0, grid.scales.float(), ratio)), zeros)


def _choose(first: Tensor, a: Grid, b: Grid) -> Grid:
    """Per group the grid a where `first` (n, g) is true, else b."""
    zeros = None
    if a.zero_points is not None and b.zero_points is not None:
        zeros = torch.where(first, a.zero_points, b.zero_points)
    return Grid(a.low, a.high, torch.where(first, a.scales, b.scales), zeros)


@dataclass(frozen=True)
class Offsets:
    """Scales and offsets (n, g) float16 of codes in [0, high]: w = code · scale + offset, as in GGUF's q4_1, q5_1."""

    high: int
    scales: Tensor
    offsets: Tensor

    def round(self, W: Tensor) -> Tensor:
        """Nearest codes of W (n, g, k) as float32 integers."""
        codes = (W - self.offsets.float().unsqueeze(-1)) * inverse(self.scales).unsqueeze(-1)
        return codes.round_().clamp_(0, self.high)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 weights (n, g, k) of codes (n, g, k)."""
        return codes * self.scales.float().unsqueeze(-1) + self.offsets.float().unsqueeze(-1)


def fit_offsets(W: Tensor, high: int, p: float, iterations: int) -> Offsets:
    """Scales that cover the range of W (n, g, k), and offsets of least Σ |w − ŵ|^p, found as in `fit_half_quadratic`.

    As in the source, scales stay what they begin as, zero points are real numbers, of which the first is whole, and E
    is counted in the weights' own unit: errors below some .17 count as none of it, so that the offset is their mean.
    Raises NumericalError for non-finite weights or what does not fit float16.
    """
    if not finite(W):
        raise NumericalError("non-finite weights")
    size = max(1, WEIGHTS_AT_ONCE // W[0].numel())
    parts = [_fit_offsets(rows, high, p, iterations) for rows in torch.split(W, size)]
    return Offsets(high, torch.cat([g.scales for g in parts]), torch.cat([g.offsets for g in parts]))


def _fit_offsets(W: Tensor, high: int, p: float, iterations: int) -> Offsets:
    least, most = torch.aminmax(W, dim=-1)
    scales = float16((most - least) / high)
    step = scales.float()
    level = (least * inverse(scales)).round_()
    grid = Offsets(high, scales, float16(torch.where(step == 0, least, level * step)))
    best, lowest = grid.offsets, torch.full(step.shape, torch.inf)
    for i in range(iterations):
        codes = grid.round(W)
        x = W - grid.decode(codes)
        powers = x.abs().pow_(p)
        error = powers.sum(-1)
        best, lowest = torch.where(error < lowest, grid.offsets, best), torch.minimum(error, lowest)
        target = W - shrink(x, powers, BETA * KAPPA**i)
        grid = Offsets(high, scales, float16((target - codes * step.unsqueeze(-1)).mean(-1)))
    return Offsets(high, scales, best)
