"""Scales and codes refined in turn after a rounding that chose them column by column."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.encodings import EncodedTensor
from compress.steps.quantize._fields import grid_of

if TYPE_CHECKING:
    from torch import Tensor


def refine(W: Tensor, H: Tensor, start: EncodedTensor, mask: Tensor | None, passes: int) -> EncodedTensor:
    """Scales and codes of W (n, m) that lose less than `start` under H (m, m), row by row; never more.

    mxfp4 keeps its scales, which are powers of two. mask: (n, m) bool, True = kept.
    """
    import torch

    from compress.numerics.refine import losses

    best, least = start, losses(W, start.decode(), H)
    changes = [change for _ in range(passes) for change in (_with_best_scales, _with_best_codes)]
    for change in (*changes, _with_best_scales):
        tried = change(W, H, best, mask)
        loss = losses(W, tried.decode(), H)
        better = (loss < least).unsqueeze(1)
        assert tried.scales is not None and best.scales is not None
        best = EncodedTensor(
            start.encoding,
            torch.where(better, tried.codes, best.codes),
            torch.where(better, tried.scales, best.scales),
            start.zero_points,
        )
        least = torch.minimum(loss, least)
    return best


def _with_best_scales(W: Tensor, H: Tensor, encoded: EncodedTensor, mask: Tensor | None) -> EncodedTensor:
    """The same codes under the scales of least loss, rounded to float16; a row that would not fit keeps its own."""
    import torch

    from compress.numerics.refine import refit_scales

    scales = encoded.scales
    assert scales is not None
    if scales.dtype != torch.float16:
        return encoded
    levels = EncodedTensor(encoded.encoding, encoded.codes, torch.ones_like(scales), encoded.zero_points).decode()
    refitted = refit_scales(W, H, levels, scales.float()).half()
    fits = torch.isfinite(refitted).all(1, keepdim=True)
    return EncodedTensor(encoded.encoding, encoded.codes, torch.where(fits, refitted, scales), encoded.zero_points)


def _with_best_codes(W: Tensor, H: Tensor, encoded: EncodedTensor, mask: Tensor | None) -> EncodedTensor:
    """One pass of coordinate descent over the codes, under the same scales."""
    import torch

    from compress.numerics.refine import descend

    n, m = W.shape
    grids = [grid_of(encoded, g) for g in range(encoded.encoding.groups(m))]
    codes = torch.empty(m, n, dtype=encoded.codes.dtype)

    def visit(j: int, best: Tensor) -> Tensor:
        grid = grids[j * len(grids) // m]
        code = grid.round(best.view(n, 1, 1))
        if mask is not None:
            code = torch.where(mask[:, j].view(n, 1, 1), code, grid.zero)
        codes[j] = code.view(n)
        return grid.decode(code).view(n)

    descend(W, encoded.decode(), H, visit)
    return EncodedTensor(encoded.encoding, codes.T.contiguous(), encoded.scales, encoded.zero_points)
