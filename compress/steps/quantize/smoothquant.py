"""SmoothQuant: int8 weights and int8 inputs, once factors per channel have moved outliers from inputs to weights.

Xiao et al. 2022, arXiv:2211.10438. Departures: inputs of the output projection and of the MLP's last linear are
smoothed, too, by the linear before them, where that changes no function; statistics come from the model whose earlier
blocks are already quantized; besides one α for all, the best of a grid can be searched for each group of linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.architectures import Facts
from compress.encodings import Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.rounding import InputRounding, Scheme
from compress.steps.quantize._fields import (
    WeightQuantization,
    matched,
    refuse_encoded,
    round_to_nearest,
    selected,
)
from compress.steps.quantize._folding import fixed, fold, note_silence

if TYPE_CHECKING:
    from torch import Tensor

    from compress.blocks import Block
    from compress.model import Model

SAMPLED = 512  # tokens on which α is searched, and static scales are judged
GRID = 10  # α = 0, 1/GRID, …, 1


class SmoothQuant(WeightQuantization):
    """W8A8: linears of the blocks in int8, their inputs rounded to int8 in every forward pass.

    alpha: how much of the outliers moves to the weights, s = max|x|^α / max|w|^(1−α) per channel; "search" takes the
    α of least output error for each group of linears, or no smoothing. activations: scales of the inputs, "dynamic"
    (one per token), "static" (one for all, the largest value of calibration), or "block" (a float16 one per token and
    32 channels, as llama.cpp computes). group_size: of the weights' scales; one per row lets a runtime multiply
    integers. keep: linears in another encoding, or in int8, that
    read floats. embeddings: their inputs stay floats, too.
    """

    name: ClassVar[str] = "quantize.smoothquant"
    uses_calibration: ClassVar[bool] = True

    encoding: Literal["int8"] = "int8"
    group_size: int | Literal["channel"] = Field("channel")
    symmetric: Literal[True] = True
    alpha: float | Literal["search"] = Field(0.5)
    activations: Scheme = "dynamic"

    def check(self, facts: Facts) -> None:
        """Refuse an α outside [0, 1], and channels that blocks of inputs do not divide."""
        super().check(facts)
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise RecipeError(f'alpha={self.alpha}; expected a number from 0 to 1, or "search"')
        for linear in self.inputs(facts) if self.activations == "block" else ():
            if (m := facts.linears[linear][1]) % 32:
                raise RecipeError(
                    f"{linear} has {m} input channels, not a multiple of a block's 32; use activations: dynamic"
                )

    def inputs(self, facts: Facts) -> Mapping[str, InputRounding]:
        """The rounding of every linear taken that `keep` does not name; the scales of "static" are not known yet."""
        kept = {name for pattern in self.keep for name in matched(facts, pattern)}
        taken = selected(facts, self.layers, {}, facts.linears)
        return {name: InputRounding(self.activations) for name in taken if name not in kept}

    def apply(self, model: Model, context: Context) -> None:
        """Smooth and round every block in turn, each fed by the rounded ones before it, then the embeddings."""
        from compress.blocks import walk

        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        rounded = self.inputs(model.facts)
        for block in walk(model, context.calibration, context.progress):
            seen = _observe(block)
            for names in block.stages:
                note_silence(context, names[0], seen[names[0]].largest)
            for source, readers in model.facts.folds(block.index):
                if not rounded.keys() & set(readers):
                    continue
                if held := fixed(model, source, readers, chosen):
                    context.notes.append(f"{source}: not smoothed, since {held} is stored in an encoding already")
                    continue
                s = self._factors(model, [r for r in readers if r in rounded], seen[readers[0]], chosen)
                fold(model, source, readers, s)
                for name in readers:
                    seen[name] = seen[name].divided(s)
            for name in block.linears:
                self._round(model, f"{name}.weight", chosen)
                if name in rounded:
                    model.round_inputs(name, self._rounding(name, seen[name]))
        for tensor in [t for t in chosen if t.removesuffix(".weight") not in model.facts.linears]:
            self._round(model, tensor, chosen)

    def _round(self, model: Model, tensor: str, chosen: Mapping[str, Encoding]) -> None:
        if tensor in chosen:
            model.store(tensor, round_to_nearest(tensor, model.parameter(tensor).detach(), chosen[tensor], False))

    def _rounding(self, name: str, seen: Seen) -> InputRounding:
        if self.activations != "static":
            return InputRounding(self.activations)
        scale = float(seen.largest.max() / 127)  # a float32 number, as files hold it
        if not 0 < scale < float("inf"):
            raise NumericalError(f"{name}: its inputs reach {127 * scale} on the calibration data; no scale fits")
        return InputRounding("static", scale)

    def _factors(self, model: Model, readers: Sequence[str], seen: Seen, chosen: Mapping[str, Encoding]) -> Tensor:
        """The (m,) by which inputs are divided and weights multiplied; ones where no α fits, which rounding tells."""
        import torch

        weights = [model.parameter(f"{name}.weight").detach() for name in readers]
        heaviest = torch.stack([W.abs().amax(0) for W in weights]).amax(0)
        if not isinstance(self.alpha, str):
            return smoothing(seen.largest, heaviest, self.alpha)
        encodings = [chosen[f"{name}.weight"] for name in readers]
        best, least = torch.ones_like(heaviest), torch.inf
        for s in (best, *(smoothing(seen.largest, heaviest, i / GRID) for i in range(GRID + 1))):
            try:
                rounding = self._rounding(readers[0], seen.divided(s))
                error = sum(output_error(W, s, seen.sample, e, rounding) for W, e in zip(weights, encodings))
            except NumericalError:  # a scale beyond float16, of weights or of inputs
                continue
            if error < least:
                best, least = s, error
        return best


@dataclass(frozen=True)
class Seen:
    """What calibration showed of an input: the largest magnitude per channel, (m,), and some tokens, (t, m)."""

    largest: Tensor
    sample: Tensor

    def divided(self, s: Tensor) -> Seen:
        """The same once the input is divided by s (m,)."""
        return Seen(self.largest / s, self.sample / s)


def smoothing(largest: Tensor, heaviest: Tensor, alpha: float) -> Tensor:
    """Factors s = max|x|^α / max|w|^(1−α) per channel, (m,); eq. 4 of the paper.

    largest, heaviest: the largest magnitudes of the inputs and of the weights that read them, (m,). A silent channel
    counts as the quietest that is heard, lest what calibration did not show be blown up.
    """
    import torch

    if not bool((largest > 0).any()):
        return torch.ones_like(largest)
    x = largest.clamp(min=float(largest[largest > 0].min()))
    w = torch.where(heaviest > 0, heaviest, 1.0)
    return x.pow(alpha) / w.pow(1 - alpha)


def output_error(W: Tensor, s: Tensor, X: Tensor, encoding: Encoding, rounding: InputRounding) -> float:
    """‖Q(X / s) Q(W · s)ᵀ − X Wᵀ‖² for W (n, m), s (m,) and inputs X (t, m); Q rounds inputs and weights."""
    rounded = round_to_nearest("weight", W * s, encoding, search=False).decode()
    return float((rounding(X / s) @ rounded.T - X @ W.T).square().sum())


def _observe(block: Block) -> dict[str, Seen]:
    """What each linear of a block reads on the calibration data, by name."""
    import torch

    largest: dict[tuple[str, ...], Tensor] = {}
    samples: dict[tuple[str, ...], list[Tensor]] = {}

    def add(names: tuple[str, ...], X: Tensor) -> None:
        most = X.abs().amax(0)
        largest[names] = torch.maximum(largest[names], most) if names in largest else most
        kept = samples.setdefault(names, [])
        if missing := SAMPLED - sum(len(part) for part in kept):
            kept.append(X[:missing].clone())

    block.observe(add)
    return {name: Seen(largest[names], torch.cat(samples[names])) for names in largest for name in names}
