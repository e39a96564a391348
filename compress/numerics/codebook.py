"""Codebook quantization: codes that name one of 16 fixed levels, times a scale per group.

nf4: the levels are quantiles of the normal distribution, with 0 and ±1 among them (Dettmers et al. 2023,
arXiv:2305.14314). Scales are float16, not float32 as in the paper: the same 16 bits as every other encoding
here, rounded before codes are chosen.
mxfp4: the levels are the values of e2m1, a float of 4 bits; a scale is a power of two held as its exponent plus
127 in 8 bits (e8m0), one per 32 weights (OCP Microscaling Formats 1.0, 2023).
iq4_nl: llama.cpp's levels, finer near zero and without it, times a signed float16 scale, one per 32 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.affine import WEIGHTS_AT_ONCE, float16, inverse

FRACTIONS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05)  # of the scale that just covers the range, tried beside it
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "mxfp4": (*_MAGNITUDES, 0.0, *(-x for x in _MAGNITUDES[1:])),  # bit 3 of a code is its sign
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}


@dataclass(frozen=True)
class CodebookGrid:
    """A codebook with its scales (n, g): float16 for nf4 and iq4_nl, uint8 exponents plus 127 for mxfp4.

    The counterpart of `affine.Grid`, for codes in [0, 15].
    """

    name: str
    scales: Tensor

    @property
    def zero_points(self) -> None:
        """None: codebooks have none, unlike affine grids."""
        return None

    @property
    def zero(self) -> Tensor:
        """The code of weight 0, a scalar; iq4_nl has only one near it."""
        levels = LEVELS[self.name]
        return torch.tensor(float(levels.index(min(levels, key=abs))))

    def round(self, W: Tensor) -> Tensor:
        """Nearest codes of W (n, g, k) as float32 integers; a zero scale gives the zero code.

        Halfway between two levels, mxfp4 takes the one nearer to 0 (as ggml does), the others the lower
        one (as bitsandbytes does).
        """
        if self.name == "mxfp4":
            scaled = W / exponents_to_float(self.scales).unsqueeze(-1)  # exact: a power of two
            codes = torch.bucketize(scaled.abs().contiguous(), _midpoints(_MAGNITUDES), out_int32=True)
            return (codes + 8 * ((scaled < 0) & (codes > 0))).float()
        scaled = W * inverse(self.scales).unsqueeze(-1)
        return torch.bucketize(scaled.contiguous(), _midpoints(LEVELS[self.name]), out_int32=True).float()

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 weights (n, g, k) of codes (n, g, k)."""
        scales = exponents_to_float(self.scales) if self.name == "mxfp4" else self.scales.float()
        return self.levels(codes).mul_(scales.unsqueeze(-1))

    def levels(self, codes: Tensor) -> Tensor:
        """Float32 levels of codes, of their shape."""
        return (
            torch.tensor(LEVELS[self.name], dtype=torch.float32)
            .index_select(0, codes.flatten().int())
            .view(codes.shape)
        )


def fit(W: Tensor, name: str, importance: Tensor | None, search: bool) -> CodebookGrid:
    """Scales for W (n, g, k), k weights to a group.

    Without `search`, nf4 maps the largest magnitude of a group to level 1, iq4_nl to level -127, and mxfp4 takes
    the exponent of the power of two below it, less 2, so that magnitudes above 6 steps saturate (all as in their
    sources). With it, further scales are tried around that one, and the one of least error Σ h·(w − ŵ)² is kept: of nf4
    and iq4_nl `FRACTIONS`, each refitted in closed form to its own codes, of iq4_nl also those that map the largest
    magnitude to level 113; of mxfp4 the two exponents beside it. importance h:
    (g, k) or broadcastable, ones if None. Raises NumericalError for non-finite weights or scales beyond float16.
    """
    if not torch.isfinite(W).all():
        raise NumericalError("non-finite weights")
    parts = []
    for rows in torch.split(W, max(1, WEIGHTS_AT_ONCE // W[0].numel())):
        tried = _exponents(rows) if name == "mxfp4" else _ranges(rows, LEVELS[name])
        parts.append(_best(rows, name, tried, importance) if search else next(tried))
    return CodebookGrid(name, torch.cat(parts))


def _ranges(W: Tensor, levels: tuple[float, ...]) -> Iterator[Tensor]:
    """Float16 scales (n, g): one that just covers the range, then fractions of it.

    Where the levels reach farther down than up, the largest magnitude is put there first, whatever its sign, so that
    the scale may be negative, and then at the other end.
    """
    least, most = torch.aminmax(W, dim=-1)
    ends = [most.maximum(-least) / levels[-1]]
    if -levels[0] > levels[-1]:
        top = torch.where(-least >= most, least, most)
        ends = [top / levels[0], top / levels[-1]]
    yield from (float16(end * fraction) for end in ends for fraction in (1.0, *FRACTIONS))


def _exponents(W: Tensor) -> Iterator[Tensor]:
    """Exponents plus 127 (n, g) uint8: ⌊log2 max⌋ − 2, the next below and the next above."""
    most = W.abs().amax(-1)
    exponent = torch.frexp(most).exponent - 1 - 2 + 127  # frexp: most = m · 2^e with m in [½, 1)
    for step in (0, -1, 1):
        # A group of zeros takes exponent 0, as ggml does; 255 means NaN.
        yield torch.where(most == 0, 0, exponent + step).clamp(0, 254).to(torch.uint8)


def _best(W: Tensor, name: str, tried: Iterator[Tensor], importance: Tensor | None) -> Tensor:
    """Per group the scale of least weighted squared error, the earliest among equals.

    A float16 scale after the first is refitted to its codes c, s = Σ h·w·l / Σ h·l² over their levels l, and
    judged by them; rounding to the scale afterwards can only lower its error.
    """
    h = torch.ones(()) if importance is None else importance
    best = next(tried)
    least = _error(W, CodebookGrid(name, best), h)
    for scales in tried:
        grid = CodebookGrid(name, scales)
        if name == "mxfp4":
            error = _error(W, grid, h)
        else:
            levels = grid.levels(grid.round(W))
            squares = (h * levels).mul_(levels).sum(-1)
            ratio = (h * W).mul_(levels).sum(-1) / torch.where(squares == 0, 1.0, squares)
            scales = float16(torch.where(squares == 0, scales.float(), ratio))
            error = torch.addcmul(W, levels, scales.float().unsqueeze(-1), value=-1).square_().mul_(h).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def _error(W: Tensor, grid: CodebookGrid, h: Tensor) -> Tensor:
    return (W - grid.decode(grid.round(W))).square_().mul_(h).sum(-1)


def exponents_to_float(exponents: Tensor) -> Tensor:
    """2^(e − 127) in float32 of uint8 e < 255, exactly.

    >>> exponents_to_float(torch.tensor([127, 129, 0], dtype=torch.uint8)).tolist()
    [1.0, 4.0, 5.877471754111438e-39]
    """
    # The bits of a float32; 2^-127 lies below its normal range.
    bits = torch.where(exponents == 0, 0x00400000, exponents.int() << 23)
    return bits.view(torch.float32)


def _midpoints(levels: tuple[float, ...]) -> Tensor:
    ordered = torch.tensor(levels, dtype=torch.float32)
    return (ordered[:-1] + ordered[1:]) / 2
