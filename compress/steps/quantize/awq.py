"""AWQ: rounding to nearest after salient input channels were scaled up, at the cost of what precedes them.

Lin et al. 2023, arXiv:2306.00978. Departures: activation magnitudes are root mean squares, not means; the error
of a scale is that of the linears' outputs over all calibration tokens, tr(E H Eᵀ) with H = Σ xxᵀ, not of the
enclosing module's over a sample; instead of clipping by output error, the range of each group is searched as in
quantize.rtn, weighted by the inputs' second moments.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.encodings import Encoding
from compress.errors import NumericalError
from compress.interfaces import Context
from compress.steps.quantize._fields import WeightQuantization, coded, fit_grid, refuse_encoded, round_to_nearest
from compress.steps.quantize._folding import fixed, fold, note_silence

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model


class Awq(WeightQuantization):
    """Activation-aware scales, folded into the preceding norm or linear, then rounding to nearest.

    alphas: how many exponents α in [0, 1) are tried for s = rms(x)^α, α = 0 (no scaling) among them. range: of
    the final rounding, "minmax" or "mse", weighted by the squared inputs.
    """

    name: ClassVar[str] = "quantize.awq"
    version: ClassVar[int] = 2
    uses_calibration: ClassVar[bool] = True

    alphas: int = Field(20, ge=1)
    range: Literal["minmax", "mse"] = "mse"

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """Of every input of a block that a linear to get codes reads, at once."""
        return facts.inputs_of(coded(self.encodings(facts)))

    def apply(self, model: Model, context: Context) -> None:
        """Scale and round every block in turn, each fed by the rounded ones before it, then the embeddings."""
        from compress.blocks import walk

        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        for block in walk(model, context.calibration, context.progress):
            moments = _second_moments(block, context, coded(chosen))
            for source, readers in model.facts.folds(block.index):
                if readers[0] not in moments:
                    continue
                if held := fixed(model, source, readers, chosen):
                    context.notes.append(f"{source}: not scaled, since {held} is stored in an encoding already")
                    continue
                s = self._best_scales(model, readers, moments[readers[0]], chosen)
                if bool((s == 1).all()):  # a gain with an offset would lose bits for nothing
                    continue
                fold(model, source, readers, s)
                for name in readers:
                    moments[name] = moments[name] / s.outer(s)
            for name in block.linears:
                self._round(model, f"{name}.weight", chosen, moments[name].diagonal() if name in moments else None)
        for tensor in [t for t in chosen if t.removesuffix(".weight") not in model.facts.linears]:
            self._round(model, tensor, chosen, None)

    def _round(self, model: Model, tensor: str, chosen: Mapping[str, Encoding], importance: Tensor | None) -> None:
        if tensor in chosen:
            W = model.parameter(tensor).detach()
            model.store(tensor, round_to_nearest(tensor, W, chosen[tensor], self.range == "mse", importance))

    def _best_scales(self, model: Model, readers: Sequence[str], H: Tensor, chosen: Mapping[str, Encoding]) -> Tensor:
        """Of s = rms(x)^α for each α, the (m,) of least output error over the readers that are to hold codes.

        Ones where no α fits, or not all weights are finite: rounding then names the tensor.
        """
        import torch

        those = [(t, chosen[t]) for t in (f"{name}.weight" for name in readers) if t in coded(chosen)]
        best, least = torch.ones(len(H)), torch.inf
        for i in range(self.alphas if those else 0):
            s = channel_scales(H, i / self.alphas)
            error = sum(output_error(model.parameter(t).detach(), s, H, encoding) for t, encoding in those)
            if error < least:
                best, least = s, error
        return best


def channel_scales(H: Tensor, alpha: float) -> Tensor:
    """Scales rms(x)^α per input channel, (m,), with reciprocal extremes; silent channels take the smallest.

    H: (m, m) = Σ xxᵀ. Eq. 5 of the paper, normalized as in the authors' code.
    """
    import torch

    squares = H.diagonal()
    heard = squares[squares > 0]
    if not len(heard):
        return torch.ones_like(squares)
    # Relative to the largest first: a power of the raw sum could leave float32's range.
    s: Tensor = (squares.clamp(min=float(heard.min())) / heard.max()).pow(alpha / 2)
    return s / (s.max() * s.min()).sqrt()


def output_error(W: Tensor, s: Tensor, H: Tensor, encoding: Encoding) -> float:
    """Σ ‖(Ŵ − W)x‖² over the tokens of H, (m, m) = Σ xxᵀ, where Ŵ = Q(W · s) / s; eq. 4 of the paper.

    Q rounds W (n, m) to nearest, over the range of each group. Infinite where no grid fits W · s.
    """
    scaled = (W * s).view(len(W), encoding.groups(W.shape[1]), -1)
    try:
        grid = fit_grid(scaled, encoding, None, search=False)
    except NumericalError:  # a channel that is all but silent, blown up beyond float16's scales
        return float("inf")
    E = (grid.decode(grid.round(scaled)) - scaled).view(W.shape) / s
    return float((E @ H).mul_(E).sum())


def _second_moments(block: Block, context: Context, wanted: Container[str]) -> dict[str, Tensor]:
    """Σ xxᵀ over the calibration tokens, (m, m), per linear of a stage with a wanted tensor, which share one."""
    from compress.numerics.hessian import Hessian

    stages = [names for names in block.stages if any(f"{name}.weight" in wanted for name in names)]
    hessians = {names: Hessian(block.linears[names[0]].in_features, names[0]) for names in stages}
    block.observe(lambda names, X: hessians[names].add(X) if names in hessians else None)
    for names, hessian in hessians.items():
        note_silence(context, names[0], hessian.matrix.diagonal())
        if block.index == 0 and hessian.tokens < len(hessian.matrix):
            context.notes.append(
                f"{names[0]}: {hessian.tokens} calibration tokens for {len(hessian.matrix)} input channels"
            )
    return {name: H for names, hessian in hessians.items() for H in (hessian.matrix,) for name in names}
