"""Gradients through rounding: of the weights behind codes, and of the scales that decode them."""

from __future__ import annotations

from torch import Tensor


def straight_through(gradient: Tensor, W: Tensor, decoded: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of W and of θ behind Ŵ = e^θ ŝ · level(W / (e^θ ŝ)), from those of Ŵ.

    gradient, W, decoded: (n, g, k) float32, of Ŵ, and W and Ŵ themselves, k weights to a group. low, high: (n, g, 1),
    the least and the greatest weight that the group's codes hold. Returns (n, g, k) and (n, g). Rounding counts as the
    identity within [low, high] and as constant beyond, so that ∂Ŵ/∂W = 1 or 0, and ∂Ŵ/∂θ = Ŵ − W or Ŵ.
    Esser et al. 2020, learned step size quantization, arXiv:1902.08153, equations 2 and 3, times the scale as θ is its
    logarithm; their factor 1/√(k·levels) only divides a gradient that Adam divides by its size anyway.
    """
    inside = (low <= W) & (high >= W)
    through = gradient * inside
    theta = (gradient * decoded).sub_(through * W).sum(dim=-1)
    return through, theta
