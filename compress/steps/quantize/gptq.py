"""GPTQ: rounding column by column, each error carried into the columns not yet rounded.

Frantar et al. 2022, arXiv:2210.17323. Departures: group scales are searched with the importance of each
input channel (the diagonal of the Hessian) instead of taken from the range; linears that share an input are
solved together; half of what earlier rounding did to the inputs is made up for, but not within the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError
from compress.interfaces import Context
from compress.steps.quantize._fields import (
    WeightQuantization,
    coded,
    fit_grid,
    join_rows,
    refuse_encoded,
    round_to_nearest,
)
from compress.steps.quantize._folding import note_silence
from compress.steps.quantize._refinement import refine

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model
    from compress.numerics.affine import Grid
    from compress.numerics.codebook import CodebookGrid

READ_AS_IT_IS = 0.3  # of the mean of H's diagonal: what a row weighs as the embedding of its token, where it is tied
ROWS_AT_ONCE = 16_384  # of the output head
CARRIED = 28  # tokens per channel that the unquantized model reads: fewer blur what is made up for, more hardly help


class Gptq(WeightQuantization):
    """Hessian-based rounding on calibration data; each linear is fed by the quantized ones before it.

    dampening: λ as a fraction of the mean diagonal of the Hessian. range: "minmax" or "mse" as in quantize.rtn,
    weighted by the Hessian's diagonal under "mse". static_groups: fit all scales beforehand, on weights that no
    rounding has changed yet, not each when its group is reached. act_order: round the channels of largest second
    moment first, always with static groups, since groups of reordered channels are none that a runtime of ours reads.
    error_propagation: the share of what earlier rounding did to the inputs that
    each linear makes up for (QEP, Arai & Ichikawa 2025, arXiv:2504.09629), save those that read the MLP's inner
    channels; above 0 a second pass carries the inputs of the unquantized model along, over the first batches of the
    calibration data (28 tokens per channel of the widest of these inputs, or all), and 0 is plain GPTQ.
    refinement: how often, afterwards, the scales of a row are solved for together and each column then takes its best
    codes given all others, as in coordinate descent (Behdin et al. 2023, arXiv:2309.01885), with the scales solved for
    once more at the end. embeddings: an output head of fewer than 8 bits is solved for as well, a tied one with some
    weight on its rows themselves; others are rounded to nearest.
    """

    name: ClassVar[str] = "quantize.gptq"
    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True
    version: ClassVar[int] = 7
    uses_calibration: ClassVar[bool] = True

    dampening: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)
    range: Literal["minmax", "mse"] = "mse"
    static_groups: bool = False
    act_order: bool = False
    error_propagation: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    refinement: int = Field(0, ge=0)

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """That of the widest input that is solved for: the stages of a block take turns, and the head comes last."""
        chosen = self.encodings(facts)
        found = facts.inputs_of(coded(chosen))
        if (head := _solved_head(facts, chosen)) is not None:
            found[head.removesuffix(".weight")] = facts.sizes["residual"]
        widest = max(found, key=found.__getitem__, default="")
        return {widest: found[widest]} if found else {}

    def state_bytes(self, facts: Facts, tokens: float) -> float:
        """A block's states and the inputs of its stages, and for the tokens carried the same of the model as it was."""
        residual, q, mlp = (facts.sizes[axis] for axis in ("residual", "q", "mlp"))
        # And a tenth, measured, lies free between them.
        return 1.1 * 4 * ((2 * residual + q + mlp) * tokens + (3 * residual + q) * min(tokens, self._carried(facts)))

    def apply(self, model: Model, context: Context) -> None:
        """Quantize every selected linear of each block, then the embeddings."""
        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        search = self.range == "mse"
        head = _solved_head(model.facts, chosen)
        left = self._quantize_blocks(model, chosen, context)
        if head is None:
            left.clear()
        for name in sorted(chosen.keys() - {f"{linear}.weight" for linear in model.facts.linears}):
            context.progress(f"rounding {name}", 1.0)
            if name == head:
                self._quantize_head(model, name, chosen[name], left, context)
            else:
                model.store(name, round_to_nearest(name, model.parameter(name).detach(), chosen[name], search))

    def _quantize_blocks(self, model: Model, chosen: Mapping[str, Encoding], context: Context) -> list[Tensor]:
        """Quantize the linears; what leaves the last block, per batch."""
        from compress.blocks import walk

        left: list[Tensor] = []
        for block in walk(model, context.calibration, context.progress, originals=self._carried(model.facts)):
            self._quantize_block(model, block, chosen, context)
            left = block.advance()
        return left

    def _carried(self, facts: Facts) -> int:
        """Tokens that the model as it was reads, too."""
        widest = max(facts.sizes["residual"], facts.sizes["q"])  # of the inputs that are made up for
        return CARRIED * widest if self.error_propagation > 0 else 0

    def _quantize_head(
        self, model: Model, tensor: str, encoding: Encoding, left: Sequence[Tensor], context: Context
    ) -> None:
        """Solve the output head, some rows at a time. left: what leaves the last block, per batch."""
        import torch

        from compress.numerics.hessian import Hessian
        from compress.numerics.products import working_type

        norm = model.module.get_submodule(model.facts.architecture.final_norm)
        W = model.parameter(tensor).detach()
        hessian = Hessian(W.shape[1], tensor)
        with torch.inference_mode():
            for states in left:
                hessian.add(norm(states).flatten(0, -2).to(working_type()))
        H = hessian.matrix
        note_silence(context, tensor.removesuffix(".weight"), H.diagonal())
        if model.facts.tied:
            H.diagonal().add_(READ_AS_IT_IS * float(H.diagonal().mean()))
        try:
            parts = [self._solved(rows, Moments(H), encoding, None) for rows in torch.split(W, ROWS_AT_ONCE)]
        except NumericalError as error:
            raise NumericalError(f"{tensor}: {error}") from None
        model.store(tensor, join_rows(parts))

    def _quantize_block(self, model: Model, block: Block, chosen: Mapping[str, Encoding], context: Context) -> None:
        from compress.numerics.hessian import Hessian

        solved = coded(chosen)
        for names, inputs in block.stages_in_turn(last=True):
            if not any(f"{name}.weight" in solved for name in names):
                self._quantize_stage(model, names, chosen, None)
                continue
            hessian, before = Hessian(block.linears[names[0]].in_features, names[0]), block.originals.pop(names[0], [])
            for X in inputs[: len(before)]:
                hessian.add(X)
            seen = hessian.matrix if 0 < len(before) < len(inputs) else None
            for X in inputs[len(before) :]:
                hessian.add(X)
            H, tokens = hessian.matrix, hessian.tokens
            note_silence(context, names[0], H.diagonal())
            if tokens < len(H) and block.index == 0:
                context.notes.append(f"{names[0]}: {tokens} calibration tokens for {len(H)} input channels")
            drift = _drift(before, inputs[: len(before)]).mul_(self.error_propagation) if before else None
            del before, hessian
            self._quantize_stage(model, names, chosen, Moments(H, drift, seen))

    def _quantize_stage(
        self, model: Model, names: tuple[str, ...], chosen: Mapping[str, Encoding], moments: Moments | None
    ) -> None:
        """Solve linears that share an input and an encoding as one stacked matrix; moments: None if none is coded."""
        import torch

        by_encoding: dict[Encoding, list[str]] = {}
        for tensor in (f"{name}.weight" for name in names):
            if tensor in chosen:
                by_encoding.setdefault(chosen[tensor], []).append(tensor)
        for encoding, tensors in by_encoding.items():
            weights = [model.parameter(t).detach() for t in tensors]
            if moments is None or not encoding.is_coded:
                for t, W in zip(tensors, weights):
                    model.store(t, round_to_nearest(t, W, encoding, search=False))
                continue
            mask = None
            if any(t in model.masks for t in tensors):
                kept = [model.masks.get(t, torch.ones_like(W, dtype=torch.bool)) for t, W in zip(tensors, weights)]
                mask = torch.cat(kept)
            try:
                solved = self._solved(torch.cat(weights), moments, encoding, mask)
            except NumericalError as error:
                raise NumericalError(f"{tensors[0]}: {error}") from None
            for t, part in zip(tensors, _split_rows(solved, [len(W) for W in weights])):
                model.store(t, part)

    def _solved(self, W: Tensor, moments: Moments, encoding: Encoding, mask: Tensor | None) -> EncodedTensor:
        search, ordered, static = self.range == "mse", self.act_order, self.static_groups
        return solve(W, moments, encoding, self.dampening, search, mask, ordered, self.refinement, static)


class Moments(NamedTuple):
    """What a linear with m inputs is solved against.

    H: XXᵀ over the calibration tokens, (m, m) float32. drift: (X₀ − X)Xᵀ, (m, m) float32, with X₀ the inputs in the
    model as it was, or None to keep W·X rather than W·X₀. seen: XXᵀ over the tokens that drift was summed over, (m, m)
    float32, or None where these are all.
    """

    H: Tensor
    drift: Tensor | None = None
    seen: Tensor | None = None


def solve(
    W: Tensor,
    moments: Moments,
    encoding: Encoding,
    dampening: float,
    search: bool,
    mask: Tensor | None = None,
    act_order: bool = False,
    refinement: int = 0,
    static_groups: bool = False,
) -> EncodedTensor:
    """Codes of W (n, m) that keep W·X; Algorithm 1 with groups, then `refinement` passes over the whole row.

    mask: (n, m) bool, True = kept: a pruned weight takes the code of zero and its error is carried on.
    Group scales are fitted when the group's first column is reached, on the weights as updated by then; under
    act_order or static_groups beforehand. Raises NumericalError for a non-finite or indefinite Hessian.
    """
    import torch

    from compress.numerics.hessian import damped_factor, times_inverse
    from compress.numerics.sweep import runs, sweep

    n, m = W.shape
    size, static = m // encoding.groups(m), act_order or static_groups
    dead = moments.H.diagonal() == 0
    H = _revived(moments.H)
    back = torch.arange(m)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else back

    def ordered(A: Tensor) -> Tensor:
        return A[order][:, order] if act_order else A

    R = damped_factor(ordered(H), dampening)
    W = W.masked_fill(dead, 0.0)[:, order]  # a channel that never fires contributes nothing (as in the paper's code)
    if moments.drift is not None:
        seen = R if moments.seen is None else damped_factor(ordered(_revived(moments.seen)), dampening)
        W += times_inverse(W, ordered(moments.drift), seen)
        del seen
    kept = None if mask is None else mask.T[order]
    grids = _Grids(encoding, H.diagonal(), search, size)
    if static:
        back = torch.argsort(order)
        grids.fit_all((W if kept is None else W * kept.T)[:, back])
    codes = torch.empty(m, n, dtype=torch.int8 if encoding.signed else torch.uint8)
    channels, places = order.tolist(), codes.view(m, n, 1, 1).unbind()

    def begin(start: int, columns: Tensor) -> None:
        if not static:  # a run is a group
            grids.fit(columns if kept is None else columns * kept[start : start + size], start)

    def visit(j: int, column: Tensor) -> Tensor:
        channel = channels[j]
        grid = grids[channel]
        code = grid.round(column.view(n, 1, 1))
        if kept is not None:
            code = torch.where(kept[j].view(n, 1, 1), code, grid.zero)
        places[channel].copy_(code)
        return grid.decode(code).view(n)

    sweep(W, R, runs(m) if static else runs(m, size), begin, visit)
    found = EncodedTensor(encoding, codes.T.contiguous(), *grids.joined())
    if refinement:
        H = H.clone()
        H.diagonal().add_(dampening * float(moments.H.diagonal().mean()))
        found = refine(W[:, back], H, found, mask, refinement)
    return found


def _revived(H: Tensor) -> Tensor:
    """H (m, m) with ones on the diagonal for channels that never fire; itself where there is none."""
    import torch

    dead = H.diagonal() == 0
    return H + torch.diag(dead.float()) if dead.any() else H


class _Grids:
    """The grids of a matrix's groups of `size` input channels, fitted one by one or all beforehand."""

    def __init__(self, encoding: Encoding, importance: Tensor, search: bool, size: int):
        self._encoding, self._importance, self._search, self._size = encoding, importance, search, size
        self._found: list[Grid | CodebookGrid] = []

    def fit(self, columns: Tensor, first: int) -> None:
        """Fit the next group: columns (size, n), the first of them input channel `first`."""
        importance = self._importance[first : first + self._size]
        group = columns.T.unsqueeze(1)
        self._found.append(fit_grid(group, self._encoding, importance.unsqueeze(0), self._search))

    def fit_all(self, W: Tensor) -> None:
        """Fit every group of W (n, m), channels in their own order."""
        for first in range(0, W.shape[1], self._size):
            self.fit(W[:, first : first + self._size].T, first)

    def __getitem__(self, channel: int) -> Grid | CodebookGrid:
        return self._found[channel // self._size]

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of all groups, (n, g) each."""
        import torch

        zeros = [g.zero_points for g in self._found if g.zero_points is not None]
        return torch.cat([g.scales for g in self._found], dim=1), torch.cat(zeros, dim=1) if zeros else None


def _drift(originals: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """(X₀ − X)Xᵀ over batches of (tokens, m) in one type: (m, m) float32.

    Products of bfloat16 are rounded to it, which a correction bears and a Hessian does not.
    """
    parts = ((X0 - X).T @ X for X0, X in zip(originals, inputs, strict=True))
    total = next(parts).float()
    for part in parts:
        total += part
    return total


def _solved_head(facts: Facts, chosen: Mapping[str, Encoding]) -> str | None:
    """The tensor that gives the logits of a language model, where it is solved for and not rounded to nearest."""
    head = facts.embedding_tensor if facts.tied else f"{facts.architecture.head}.weight"
    return head if head in coded(chosen) and chosen[head].bits < 8 and not facts.labels else None


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
