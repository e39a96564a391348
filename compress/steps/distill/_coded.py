"""Linears that hold codes, as training sees them: those that learn, their scales, and weights behind their codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.encodings import EncodedTensor
from compress.numerics.affine import Grid
from compress.numerics.codebook import CodebookGrid
from compress.numerics.fake_quantization import straight_through
from compress.steps.quantize._fields import encode

if TYPE_CHECKING:
    from compress.model import Model


def learnable(model: Model) -> dict[str, EncodedTensor]:
    """The linears' tensors that hold codes with float16 scales, by name."""
    found = {f"{name}.weight": model.encoded.get(f"{name}.weight") for name in model.facts.linears}
    return {n: e for n, e in found.items() if e is not None and e.scales is not None and e.scales.dtype == torch.half}


def rescaled(tensor: EncodedTensor, theta: Tensor) -> EncodedTensor:
    """The same codes and zero points under scales exp(θ) s, rounded to float16; theta: (n, groups) float32."""
    assert tensor.scales is not None
    scales = (tensor.scales.float() * theta.detach().exp()).half()
    return EncodedTensor(tensor.encoding, tensor.codes, scales, tensor.zero_points)


@dataclass
class Latent:
    """A float32 weight W = u · unit behind the codes of a tensor, and the logarithm θ of what its scales grow by.

    start: the codes at the beginning. unit: (n, g, 1), the mean distance of neighbouring codes under their scales. u:
    (n, g, k), so that one learning rate fits weights of all sizes: a step of 1 is the distance to the next code.
    """

    start: EncodedTensor
    unit: Tensor
    u: nn.Parameter
    theta: nn.Parameter

    @classmethod
    def behind(cls, start: EncodedTensor, origin: Tensor | None) -> Latent:
        """A weight that rounds to the codes of `start`: that of `origin` where it does, else what they decode to."""
        assert start.scales is not None
        grid = _grid(start, start.scales)
        decoded = start.decode().view(*start.scales.shape, -1)
        low, high = _ends(start, grid)
        W = decoded
        if origin is not None:
            nearby = origin.view(decoded.shape).clamp(low, high)
            W = torch.where(grid.decode(grid.round(nearby)) == decoded, nearby, decoded)
        unit = (high - low) / (2**start.encoding.bits - 1)
        u = torch.where(unit == 0, 0.0, W / unit)
        return cls(start, unit, nn.Parameter(u), nn.Parameter(torch.zeros(start.scales.shape)))

    @torch.no_grad()
    def encoded(self) -> EncodedTensor:
        """The codes and float16 scales that W and θ stand for now."""
        scales = rescaled(self.start, self.theta).scales
        assert scales is not None
        W = (self.u * self.unit).view(self.start.shape)
        return encode(W, self.start.encoding, _grid(self.start, scales))

    @torch.no_grad()
    def take(self, gradient: Tensor, now: EncodedTensor) -> None:
        """Turn the gradient (n, m) of the decoded weight, whose codes are `now`, into those of u and θ."""
        assert now.scales is not None
        shape = self.u.shape
        low, high = _ends(now, _grid(now, now.scales))
        own, theta = straight_through(gradient.view(shape), self.u * self.unit, now.decode().view(shape), low, high)
        self.u.grad, self.theta.grad = own.mul_(self.unit), theta


def _grid(tensor: EncodedTensor, scales: Tensor) -> Grid | CodebookGrid:
    """The grid of a whole tensor under these scales."""
    if tensor.encoding.is_codebook:
        return CodebookGrid(tensor.encoding.name, scales)
    return Grid(*tensor.encoding.code_range, scales, tensor.zero_points)


def _ends(tensor: EncodedTensor, grid: Grid | CodebookGrid) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight that each group's codes hold, (n, g, 1) each; a negative scale swaps them."""
    shape = (*grid.scales.shape, 1)
    a, b = (grid.decode(torch.full(shape, float(code))) for code in tensor.encoding.code_range)
    return torch.minimum(a, b), torch.maximum(a, b)


def latents(coded: Mapping[str, EncodedTensor], origins: Mapping[str, Tensor]) -> dict[str, Latent]:
    """A weight behind each coded tensor, from the tensor of that name and shape in `origins` where there is one."""
    found = {}
    for name, tensor in coded.items():
        origin = origins.get(name)
        fits = origin is not None and tuple(origin.shape) == tensor.shape
        found[name] = Latent.behind(tensor, origin if fits else None)
    return found
