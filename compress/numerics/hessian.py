"""Second moments of a linear's inputs, and the factor that GPTQ and SparseGPT solve with."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.products import bfloat16_factors

CHANNELS_AT_ONCE = 192  # of a product that fills one triangle only, block by block: fewer waste less, and are slower


class Hessian:
    """H = Σ xxᵀ over calibration tokens, (m, m) float32 for m input channels.

    Only the blocks on and above the diagonal are accumulated. name: of what reads the inputs, for errors.
    """

    def __init__(self, in_features: int, name: str = "a linear"):
        self.tokens, self._name = 0, name
        self._sums = torch.zeros(in_features, in_features)

    def add(self, X: Tensor) -> None:
        """Add the tokens of X, (tokens, m)."""
        self.tokens += len(X)
        with bfloat16_factors(X.dtype == torch.bfloat16):
            X = X.float()
            for start, stop in _blocks(X.shape[1]):
                self._sums[start:stop, start:].addmm_(X[:, start:stop].T, X[:, start:])

    @property
    def matrix(self) -> Tensor:
        """H, symmetric (m, m) float32; raises NumericalError naming the reader where it is not finite."""
        H = self._sums.triu()
        H += self._sums.triu(1).T
        if not bool(torch.isfinite(H.sum())):
            problem = "its inputs on the calibration data are not finite, or too large for their squares to fit float32"
            raise NumericalError(f"{self._name}: non-finite Hessian; {problem}")
        return H


def _blocks(m: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHANNELS_AT_ONCE, m)) for start in range(0, m, CHANNELS_AT_ONCE)]


def damped_factor(H: Tensor, dampening: float) -> Tensor:
    """Upper R with RRᵀ = H + λI, λ = dampening · mean(diag H): the Cholesky factor from the last channel backwards.

    H: (m, m) float32, XᵀX over calibration tokens, m input channels. R⁻¹ is the factor of the inverse in Frantar et al.
    2022, arXiv:2210.17323, Algorithm 1. Raises NumericalError if H + λI is not positive definite.
    """
    damped = H.flip(0, 1)
    damped.diagonal().add_(dampening * float(H.diagonal().mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(f"H + λI is not positive definite (dampening={dampening}); raise dampening")
    R: Tensor = L.flip(0, 1).contiguous()
    return R


def times_inverse(W: Tensor, D: Tensor, R: Tensor) -> Tensor:
    """W D (RRᵀ)⁻¹ for W (n, m), D (m, m) and an upper R (m, m)."""
    first = len(W) < len(R)  # the smaller of the two is what the triangles are solved with
    right = W @ D if first else D
    below = torch.linalg.solve_triangular(R, right.T, upper=True)
    found: Tensor = torch.linalg.solve_triangular(R.T, below, upper=False).T
    return found if first else W @ found
