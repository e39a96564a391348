"""Affine quantization: choosing scales and zero points per group, and rounding to codes.

Weights are (n, m) float32, n outputs by m inputs; each row is cut into groups that share a float16 scale and,
if asymmetric, an integer zero point. Scales are rounded to float16 *before* codes are chosen: what is stored
is what decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.errors import NumericalError

CANDIDATES = 19  # scales tried per group in a range search, around the one that just covers the range
WEIGHTS_AT_ONCE = 2**18  # times candidates: a search passes over them a dozen times, so keep them in the cache


@dataclass(frozen=True)
class Grid:
    """Scales (n, g) float16 and zero points (n, g) uint8 (None if symmetric), for codes in [low, high]."""

    low: int
    high: int
    scales: Tensor
    zero_points: Tensor | None = None

    def round(self, W: Tensor) -> Tensor:
        """Nearest codes of W (n, g, k) as float32 integers in [low, high]; a zero scale gives the zero code."""
        codes = (W * self._inverses).round_()
        if self._zeros is not None:
            codes += self._zeros
        return codes.clamp_(self.low, self.high)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 weights (n, g, k) of codes (n, g, k)."""
        return (codes if self._zeros is None else codes - self._zeros) * self._floats

    @property
    def zero(self) -> Tensor:
        """The code of weight 0 as float32: (n, g, 1), or a scalar if symmetric."""
        return torch.zeros(()) if self._zeros is None else self._zeros

    @cached_property
    def _floats(self) -> Tensor:
        return self.scales.float().unsqueeze(-1)

    @cached_property
    def _inverses(self) -> Tensor:
        return inverse(self.scales).unsqueeze(-1)

    @cached_property
    def _zeros(self) -> Tensor | None:
        return None if self.zero_points is None else self.zero_points.float().unsqueeze(-1)


def fit(W: Tensor, low: int, high: int, symmetric: bool, importance: Tensor | None, search: bool) -> Grid:
    """Scales (and zero points) for W (n, g, k), k weights to a group.

    Without `search`, the range of each group is covered exactly (min-max). With it, `CANDIDATES` scales
    around that one are tried, each refitted in closed form to its own codes, s = Σ h·w·c / Σ h·c², and the one
    of least error Σ h·(w − s·c)² is kept; h is `importance`, (g, k) or broadcastable (ones if None), e.g. the
    diagonal of the Hessian. Raises NumericalError for non-finite weights or scales beyond float16.
    """
    if not finite(W):
        raise NumericalError("non-finite weights")
    parts = list(_fit_rows(W, low, high, symmetric, importance, search))
    zero_points = None if symmetric else torch.cat([p.zero_points for p in parts if p.zero_points is not None])
    return Grid(low, high, torch.cat([p.scales for p in parts]), zero_points)


def _fit_rows(
    W: Tensor, low: int, high: int, symmetric: bool, importance: Tensor | None, search: bool
) -> Iterator[Grid]:
    """Grids of some rows at a time, over weights laid out as (k, rows · g): sums over k run along memory."""
    n, g, k = W.shape
    copies = CANDIDATES + 1 if search else 1
    for rows in torch.split(W, max(1, WEIGHTS_AT_ONCE // (g * k * copies))):
        columns = rows.reshape(-1, k).T.contiguous()
        best = _cover(columns, low, high, symmetric, torch.zeros(1, 1))
        if search:
            h = None if importance is None else importance.expand(g, k).repeat(len(rows), 1).T.contiguous()
            best = _search(columns, best, symmetric, h)
        shape = (len(rows), g)
        zero_points = None if best.zero_points is None else best.zero_points.view(shape)
        yield Grid(low, high, best.scales.view(shape), zero_points)


def _search(W: Tensor, covering: Grid, symmetric: bool, h: Tensor | None) -> Grid:
    """The best of the covering grid and of `CANDIDATES` refitted ones around it, for W (k, N).

    covering: scales (1, N). h: (k, N), or None for ones. A candidate is judged by the codes that it was refitted
    to, so that each is rounded once; rounding to the chosen scale afterwards can only lower its error.
    """
    steps = torch.linspace(-0.9, 0.9, CANDIDATES).unsqueeze(1)
    tried = _cover(W, covering.low, covering.high, symmetric, steps)  # (CANDIDATES, N)
    scales = torch.cat([covering.scales, tried.scales])
    zero_points = None
    if covering.zero_points is not None and tried.zero_points is not None:
        zero_points = torch.cat([covering.zero_points, tried.zero_points])
    codes = W * inverse(scales).unsqueeze(1)
    codes.round_()
    if zero_points is None:
        codes.clamp_(covering.low, covering.high)
    else:  # c − z lies in [low − z, high − z]
        z = zero_points.float().unsqueeze(1)
        codes.clamp_(covering.low - z, covering.high - z)
    squares = _weighted(codes.square(), h)
    ratio = (codes * (W if h is None else h * W)).sum(1) / torch.where(squares == 0, 1.0, squares)
    fitted = float16(torch.where(squares == 0, scales.float(), ratio))
    fitted[0] = scales[0]
    best = _weighted(torch.addcmul(W, codes, fitted.float().unsqueeze(1), value=-1).square_(), h).argmin(0, True)
    found = None if zero_points is None else zero_points.gather(0, best)
    return Grid(covering.low, covering.high, fitted.gather(0, best), found)


def _weighted(squares: Tensor, h: Tensor | None) -> Tensor:
    """Σ h · squares over k; squares (candidates, k, N), overwritten."""
    return (squares if h is None else squares.mul_(h)).sum(1)


def _cover(W: Tensor, low: int, high: int, symmetric: bool, steps: Tensor) -> Grid:
    """Grids (C, N) whose range covers each column of W (k, N), the code range first widened by steps (C, 1) codes.

    Symmetric and signed (low = -high - 1): the weight of largest magnitude gets code `low`, whatever its
    sign, so that the scale may be negative; this is the rule of GGUF's q4_0.
    """
    least, most = torch.aminmax(W, dim=0)
    if symmetric:
        top = torch.where(-least >= most, least, most)
        return Grid(low, high, float16(top / (low - steps if low < -high else high + steps)))
    least, most = least.clamp(max=0), most.clamp(min=0)
    scales = float16((most - least) / (high - low + steps))
    safe = torch.where(scales == 0, 1.0, scales.float())
    zero_points = (low - least / safe).round().clamp(low, high).to(torch.uint8)
    return Grid(low, high, scales, zero_points)


def central(W: Tensor, percentile: float) -> Tensor:
    """W (n, g, k) with the tails of each group cut off: clamped to the range of its central `percentile` percent.

    Each tail holds (100 - percentile) / 2 percent of a group's weights, by linear interpolation between them. Raises
    NumericalError for non-finite weights.

    >>> central(torch.arange(5.0).view(1, 1, 5), 50.0).tolist()
    [[[1.0, 1.0, 2.0, 3.0, 3.0]]]
    """
    if not finite(W):
        raise NumericalError("non-finite weights")
    tail = (100 - percentile) / 200
    low, high = torch.quantile(W, torch.tensor([tail, 1 - tail]), dim=-1, keepdim=True)
    return W.clamp(low, high)


def finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, in one pass and without a copy."""
    if not x.numel():
        return True
    least, most = torch.aminmax(x)
    return bool(torch.isfinite(least) & torch.isfinite(most))


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
