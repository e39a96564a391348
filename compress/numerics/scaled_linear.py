"""A linear whose weight is fixed but for one positive factor per group, and that factor's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScaledLinear(torch.autograd.Function):
    """y = x Wᵀ, where W_ik = exp(θ_ig) V_ik for k in group g and V is fixed; gradients for x and θ alone.

    x: (..., m). W: (n, m), already multiplied by exp(θ). theta: (n, groups) float32; it enters through its
    gradient only, ∂L/∂θ_ig = Σ_{k ∈ g} ∂L/∂W_ik · W_ik, so that ∂L/∂W lives for one product at a time and
    neither V nor a copy of W in float32 is kept. Products are computed in W's dtype, the sum in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, theta: Tensor) -> Tensor:
        """The product, in W's dtype."""
        ctx.groups = theta.shape[1]
        x = x.to(W.dtype)
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        """Gradients of x and theta."""
        x, W = ctx.saved_tensors
        (y,) = gradients
        rows = y.reshape(-1, len(W))
        product = (rows.T @ x.reshape(-1, W.shape[1])).mul_(W)
        theta = product.view(len(W), ctx.groups, -1).sum(-1, dtype=torch.float32)
        return y @ W, None, theta
