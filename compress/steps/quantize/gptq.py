"""GPTQ: rounding column by column, each error carried into the columns not yet rounded.

Frantar et al. 2022, arXiv:2210.17323. Departures: group scales are searched with the importance of each
input channel (the diagonal of the Hessian) instead of taken from the range; linears that share an input are
solved together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError
from compress.interfaces import Context
from compress.steps.quantize._fields import WeightQuantization, fit_grid, refuse_encoded, round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor

    from compress.blocks import Block
    from compress.model import Model
    from compress.numerics.affine import Grid
    from compress.numerics.codebook import CodebookGrid

COLUMNS_AT_ONCE = 64  # columns whose errors are carried inside a block before one product updates the rest


class Gptq(WeightQuantization):
    """Hessian-based rounding on calibration data; each linear is fed by the quantized ones before it.

    dampening: λ as a fraction of the mean diagonal of the Hessian. range: as in quantize.rtn, weighted by
    the Hessian's diagonal under "mse".
    """

    name: ClassVar[str] = "quantize.gptq"
    version: ClassVar[int] = 2
    uses_calibration: ClassVar[bool] = True
    codebooks: ClassVar[bool] = True

    dampening: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)
    range: Literal["minmax", "mse"] = "mse"

    def apply(self, model: Model, context: Context) -> None:
        """Quantize every selected linear of each block, then the embeddings by rounding."""
        from compress.blocks import walk

        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        search = self.range == "mse"
        for block in walk(model, context.calibration, context.progress):
            self._quantize_block(model, block, chosen, context)
        for name in chosen.keys() - {f"{linear}.weight" for linear in model.facts.linears}:
            W = model.parameter(name).detach()
            model.store(name, round_to_nearest(name, W, chosen[name], search))

    def _quantize_block(self, model: Model, block: Block, chosen: Mapping[str, Encoding], context: Context) -> None:
        from compress.numerics.hessian import Hessian

        for names, inputs in block.stages_in_turn():
            hessian = Hessian(block.linears[names[0]].in_features)
            for X in inputs:
                hessian.add(X)
            if hessian.tokens < len(hessian.matrix) and block.index == 0:
                context.notes.append(
                    f"{names[0]}: {hessian.tokens} calibration tokens for {len(hessian.matrix)} input channels"
                )
            self._quantize_stage(model, names, chosen, hessian.matrix, context)

    def _quantize_stage(
        self,
        model: Model,
        names: tuple[str, ...],
        chosen: Mapping[str, Encoding],
        H: Tensor,
        context: Context,
    ) -> None:
        """Solve linears that share an input and an encoding as one stacked matrix."""
        import torch

        by_encoding: dict[Encoding, list[str]] = {}
        for tensor in (f"{name}.weight" for name in names):
            if tensor in chosen:
                by_encoding.setdefault(chosen[tensor], []).append(tensor)
        for encoding, tensors in by_encoding.items():
            weights = [model.parameter(t).detach() for t in tensors]
            if not encoding.is_coded:
                for t, W in zip(tensors, weights):
                    model.store(t, round_to_nearest(t, W, encoding, search=False))
                continue
            mask = None
            if any(t in model.masks for t in tensors):
                kept = [model.masks.get(t, torch.ones_like(W, dtype=torch.bool)) for t, W in zip(tensors, weights)]
                mask = torch.cat(kept)
            try:
                solved = solve(torch.cat(weights), H, encoding, self.dampening, self.range == "mse", mask)
            except NumericalError as error:
                raise NumericalError(f"{tensors[0]}: {error}") from None
            if dead := int((H.diagonal() == 0).sum()):
                context.notes.append(f"{tensors[0]}: {dead} input channels are dead on the calibration data")
            for t, part in zip(tensors, _split_rows(solved, [len(W) for W in weights])):
                model.store(t, part)


def solve(
    W: Tensor, H: Tensor, encoding: Encoding, dampening: float, search: bool, mask: Tensor | None = None
) -> EncodedTensor:
    """Codes of W (n, m) that keep W·X, given H = XXᵀ (m, m); Algorithm 1 with groups.

    mask: (n, m) bool, True = kept: a pruned weight takes the code of zero and its error is carried on.
    Group scales are fitted when the group's first column is reached, on the weights as updated by then.
    Raises NumericalError for a non-finite or indefinite Hessian.
    """
    import torch

    from compress.numerics.hessian import damped_inverse_cholesky
    from compress.numerics.sweep import sweep

    n, m = W.shape
    size = m // encoding.groups(m)
    kept = None if mask is None else mask.T.contiguous()
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.float())
    importance = H.diagonal().clone()
    codes = torch.empty(m, n, dtype=torch.int8 if encoding.signed else torch.uint8)
    grids: list[Grid | CodebookGrid] = []

    def visit(j: int, left: Tensor) -> Tensor:
        if j % size == 0:
            group = left[:size] if kept is None else left[:size] * kept[j : j + size]
            grids.append(fit_grid(group.T.unsqueeze(1), encoding, importance[j : j + size].unsqueeze(0), search))
        code = grids[-1].round(left[0].view(n, 1, 1))
        if kept is not None:
            code = torch.where(kept[j].view(n, 1, 1), code, grids[-1].zero)
        codes[j] = code.view(n)
        return grids[-1].decode(code).view(n)

    # A channel that never fires contributes nothing (as in the paper's code).
    sweep(W.masked_fill(dead, 0.0), damped_inverse_cholesky(H, dampening), list(_batches(m, size)), visit)
    zeros = [g.zero_points for g in grids if g.zero_points is not None]
    scales = torch.cat([g.scales for g in grids], dim=1)
    return EncodedTensor(encoding, codes.T.contiguous(), scales, torch.cat(zeros, dim=1) if zeros else None)


def _batches(m: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `COLUMNS_AT_ONCE` columns: small groups lie whole in a run, a larger one begins a run.

    >>> list(_batches(96, 32)), list(_batches(200, 100))
    ([(0, 64), (64, 96)], [(0, 64), (64, 100), (100, 164), (164, 200)])
    """
    whole = max(size, COLUMNS_AT_ONCE // size * size)  # as many whole groups as fit, at least one
    for first in range(0, m, whole):
        last = min(first + whole, m)
        for start in range(first, last, COLUMNS_AT_ONCE):
            yield start, min(start + COLUMNS_AT_ONCE, last)


def _split_rows(encoded: EncodedTensor, rows: list[int]) -> list[EncodedTensor]:
    """A stacked encoded matrix cut into its parts again."""
    import torch

    def cut(part: Tensor) -> list[Tensor]:
        return [p.clone() for p in torch.split(part, rows)]

    nothing = [None] * len(rows)
    scales = nothing if encoded.scales is None else cut(encoded.scales)
    zero_points = nothing if encoded.zero_points is None else cut(encoded.zero_points)
    parts = zip(cut(encoded.codes), scales, zero_points)
    return [EncodedTensor(encoded.encoding, c, s, z) for c, s, z in parts]
