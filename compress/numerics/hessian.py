"""Second moments of a linear's inputs, and the factor that GPTQ and SparseGPT solve with."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.products import bfloat16_factors

CHANNELS_AT_ONCE = 192  # of a product that fills one triangle only, block by block: fewer waste less, and are slower


class Hessian:
    """H = Σ xxᵀ over calibration tokens, (m, m) float32 for m input channels.

    Only the blocks on and above the diagonal are accumulated.
    """

    def __init__(self, in_features: int):
        self.tokens = 0
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
        """H, symmetric (m, m) float32; raises NumericalError where it is not finite."""
        H = self._sums.triu()
        H += self._sums.triu(1).T
        if not bool(torch.isfinite(H.sum())):
            raise NumericalError("non-finite Hessian")
        return H


def _blocks(m: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHANNELS_AT_ONCE, m)) for start in range(0, m, CHANNELS_AT_ONCE)]


def damped_inverse_cholesky(H: Tensor, dampening: float) -> Tensor:
    """Upper factor U of (H + λI)⁻¹ = UᵀU, with λ = dampening · mean(diag H).

    H: (m, m) float32, XᵀX over calibration tokens, m input channels.
    Raises NumericalError if H + λI is not positive definite.
    Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Computed without an inverse of H: the Cholesky factor of
    H + λI taken from its last channel backwards is an upper R with RRᵀ = H + λI, and U = R⁻¹.
    """
    damped = H.flip(0, 1)
    damped.diagonal().add_(dampening * float(H.diagonal().mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(f"H + λI is not positive definite (dampening={dampening}); raise dampening")
    identity = torch.eye(len(H), dtype=H.dtype)
    U: Tensor = torch.linalg.solve_triangular(L.flip(0, 1).contiguous(), identity, upper=True)
    return U
