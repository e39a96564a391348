"""Second moments of a linear's inputs, and the factor that GPTQ and SparseGPT solve with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError


class Hessian:
    """H = Σ xxᵀ over calibration tokens, (m, m) float32 for m input channels.

    Only one triangle is accumulated (BLAS syrk, half the work of a full product).
    """

    def __init__(self, in_features: int):
        self.tokens = 0
        self._triangle = np.zeros((in_features, in_features), dtype=np.float32, order="F")

    def add(self, X: Tensor) -> None:
        """Add the tokens of X, (tokens, m) float32."""
        from scipy.linalg.blas import ssyrk

        self.tokens += len(X)
        # X is C-ordered: its transpose is the Fortran-ordered (m, tokens) that BLAS reads without a copy.
        self._triangle = ssyrk(1.0, X.numpy().T, beta=1.0, c=self._triangle, overwrite_c=1)

    @property
    def matrix(self) -> Tensor:
        """H, symmetric (m, m) float32; raises NumericalError where it is not finite."""
        upper = torch.from_numpy(np.triu(self._triangle))
        H: Tensor = upper + upper.T - torch.diag(upper.diagonal())
        if not torch.isfinite(H).all():
            raise NumericalError("non-finite Hessian")
        return H


def damped_inverse_cholesky(H: Tensor, dampening: float) -> Tensor:
    """Upper factor U of (H + λI)⁻¹ = UᵀU, with λ = dampening · mean(diag H).

    H: (m, m) float32, XᵀX over calibration tokens, m input channels.
    Raises NumericalError if H + λI is not positive definite.
    Frantar et al. 2022, arXiv:2210.17323, Algorithm 1.
    """
    damped = H.clone()
    damped.diagonal().add_(dampening * float(H.diagonal().mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(f"H + λI is not positive definite (dampening={dampening}); raise dampening")
    U: Tensor
    U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
    if int(failed):
        raise NumericalError(f"(H + λI)⁻¹ is not positive definite (dampening={dampening}); raise dampening")
    return U
