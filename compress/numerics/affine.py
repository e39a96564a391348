"""Affine quantization: choosing scales and zero points per group, and rounding to codes.

Weights are (n, m) float32, n outputs by m inputs; each row is cut into groups that share a float16 scale and,
if asymmetric, an integer zero point. Scales are rounded to float16 *before* codes are chosen: what is stored
is what decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericalError

CANDIDATES = 19  # scales tried per group in a range search, around the one that just covers the range
WEIGHTS_AT_ONCE = 2**18  # a search passes over its weights some hundred times: keep them in the cache


@dataclass(frozen=True)
class Grid:
    """Scales (n, g) float16 and zero points (n, g) uint8 (None if symmetric), for codes in [low, high]."""

    low: int
    high: int
    scales: Tensor
    zero_points: Tensor | None = None

    @property
    def zero(self) -> Tensor:
        """The code of weight 0 as float32: (n, g, 1), or a scalar if symmetric."""
        return torch.zeros(()) if self.zero_points is None else self.zero_points.float().unsqueeze(-1)

    def round(self, W: Tensor) -> Tensor:
        """Nearest codes of W (n, g, k) as float32 integers in [low, high]; a zero scale gives the zero code."""
        codes = (W * inverse(self.scales).unsqueeze(-1)).round_()
        if self.zero_points is not None:
            codes += self.zero_points.float().unsqueeze(-1)
        return codes.clamp_(self.low, self.high)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 weights (n, g, k) of codes (n, g, k)."""
        if self.zero_points is not None:
            codes = codes - self.zero_points.float().unsqueeze(-1)
        return codes * self.scales.float().unsqueeze(-1)


def fit(W: Tensor, low: int, high: int, symmetric: bool, importance: Tensor | None, search: bool) -> Grid:
    """Scales (and zero points) for W (n, g, k), k weights to a group.

    Without `search`, the range of each group is covered exactly (min-max). With it, `CANDIDATES` scales
    around that one are tried, each refitted in closed form to its own codes, s = Σ h·w·c / Σ h·c², and the one
    of least error Σ h·(w − s·c)² is kept; h is `importance`, (g, k) or broadcastable (ones if None), e.g. the
    diagonal of the Hessian. Raises NumericalError for non-finite weights or scales beyond float16.
    """
    if not torch.isfinite(W).all():
        raise NumericalError("non-finite weights")
    parts = list(_fit_rows(W, low, high, symmetric, importance, search))
    zero_points = None if symmetric else torch.cat([p.zero_points for p in parts if p.zero_points is not None])
    return Grid(low, high, torch.cat([p.scales for p in parts]), zero_points)


def _fit_rows(
    W: Tensor, low: int, high: int, symmetric: bool, importance: Tensor | None, search: bool
) -> Iterator[Grid]:
    for rows in torch.split(W, max(1, WEIGHTS_AT_ONCE // W[0].numel())):
        best = _cover(rows, low, high, symmetric, 0.0)
        if search:
            best = _search(rows, best, symmetric, importance)
        yield best


def _search(W: Tensor, covering: Grid, symmetric: bool, importance: Tensor | None) -> Grid:
    """The best of the covering grid and of `CANDIDATES` refitted ones around it.

    A candidate is judged by the codes that it was refitted to, so that each is rounded once; rounding to
    the chosen scale afterwards can only lower its error.
    """
    W = W.movedim(-1, 0).contiguous()  # (k, n, g): sums over k then run along memory
    h = None if importance is None else importance.movedim(-1, 0).reshape(len(W), 1, -1)  # (k, 1, g)
    hW = W if h is None else h * W
    scales, zero_points = covering.scales, covering.zero_points
    least = torch.full(scales.shape, torch.inf)
    for step in (None, *torch.linspace(-0.9, 0.9, CANDIDATES).tolist()):
        grid = covering if step is None else _cover(W, covering.low, covering.high, symmetric, step, dim=0)
        codes = (W * inverse(grid.scales)).round_()
        if grid.zero_points is None:
            codes.clamp_(grid.low, grid.high)
        else:  # c − z lies in [low − z, high − z]
            z = grid.zero_points.float()
            codes.clamp_(grid.low - z, grid.high - z)
        fitted = grid.scales
        if step is not None:
            squares = (codes.square() if h is None else codes.square().mul_(h)).sum(0)
            ratio = (hW * codes).sum(0) / torch.where(squares == 0, 1.0, squares)
            fitted = float16(torch.where(squares == 0, grid.scales.float(), ratio))
        residual = torch.addcmul(W, codes, fitted.float(), value=-1).square_()
        error = (residual if h is None else residual.mul_(h)).sum(0)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, fitted, scales)
        if zero_points is not None and grid.zero_points is not None:
            zero_points = torch.where(better, grid.zero_points, zero_points)
    return Grid(covering.low, covering.high, scales, zero_points)


def _cover(W: Tensor, low: int, high: int, symmetric: bool, step: float, dim: int = -1) -> Grid:
    """The grid whose range covers each group (along `dim`), its code range first widened by `step` codes.

    Symmetric and signed (low = -high - 1): the weight of largest magnitude gets code `low`, whatever its
    sign, so that the scale may be negative; this is the rule of GGUF's q4_0.
    """
    least, most = W.amin(dim), W.amax(dim)
    if symmetric:
        top = torch.where(-least >= most, least, most)
        return Grid(low, high, float16(top / (low - step) if low < -high else top / (high + step)))
    least, most = least.clamp(max=0), most.clamp(min=0)
    scales = float16((most - least) / (high - low + step))
    safe = torch.where(scales == 0, 1.0, scales.float())
    zero_points = (low - least / safe).round().clamp(low, high).to(torch.uint8)
    return Grid(low, high, scales, zero_points)


def inverse(scales: Tensor) -> Tensor:
    """1 / s in float32, and 0 for a zero scale: its weights all take the zero code."""
    s = scales.float()
    return torch.where(s == 0, 0.0, 1.0 / s)


def float16(scales: Tensor) -> Tensor:
    """Scales as they are stored; raises NumericalError where one is beyond float16."""
    rounded = scales.half()
    if torch.isinf(rounded).any():
        raise NumericalError(f"a scale of {scales.abs().max():.3g} does not fit float16 (largest 65504)")
    return rounded
