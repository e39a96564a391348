"""How much a change of single weights costs a language model: the diagonal of its Fisher information."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.affine import finite


def squared_gradients(x: Tensor, gradient: Tensor) -> Tensor:
    """Σ_t (∂ℓ_t/∂W)² for y = x Wᵀ, tokens taken to be independent: (n, m) float32.

    x: (tokens, m). gradient: (tokens, n), ∂ℓ/∂y. The gradient of one token is an outer product, so that the sum
    of squares is a single product of squares.
    """
    return (gradient.square().T @ x.to(gradient.dtype).square()).float()


def backward_of_sampled_tokens(
    hidden: Tensor, head: Callable[[Tensor], Tensor], generator: torch.Generator, chunk: int = 128
) -> None:
    """Accumulate behind `hidden` (tokens, width) the gradient of −ln p of tokens drawn from the model itself.

    With such labels E[∇ℓ ∇ℓᵀ] is the Fisher information, which is the curvature of KL(p_W ‖ p_{W+E}) at E = 0.
    At most `chunk` tokens' logits exist at any time. Raises NumericalError where one of them is not finite.
    """
    leaf = hidden.detach().requires_grad_()
    for start in range(0, len(leaf), chunk):
        logits = head(leaf[start : start + chunk])
        if not finite(logits.detach()):
            raise NumericalError("non-finite logits on the calibration data")
        with torch.no_grad():
            gradient = torch.softmax(logits.float(), dim=-1)
            drawn = torch.multinomial(gradient, 1, generator=generator)
            gradient.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
        torch.autograd.backward(logits, gradient.to(logits.dtype))
    torch.autograd.backward(hidden, leaf.grad)


def expected_divergence(fisher: Tensor, error: Tensor, tokens: int) -> float:
    """½ Σ F E², the second-order KL divergence in nats per token of changing a weight (n, m) by `error`.

    fisher: (n, m), squared gradients summed over `tokens`.
    LeCun, Denker & Solla 1989, with the Fisher information in place of the Hessian.
    """
    return 0.5 * float((fisher * error.square()).sum(dtype=torch.float64)) / tokens
