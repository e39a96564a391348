"""Which channels of a linear's input to remove, and how the others make up for them.

W: (n, m) weights of the linear that reads the channels. H: (m, m) XXᵀ over calibration tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericalError


def channel_scores(W: Tensor, H: Tensor) -> Tensor:
    """‖W_:j‖₂ · ‖X_j‖₂, (m,): the size of what each channel adds to the output over the calibration tokens."""
    return W.square().sum(dim=0).sqrt() * H.diagonal().clamp(min=0).sqrt()


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest of the scores (m,), ascending; among equal ones the lower stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def compensated(W: Tensor, H: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Weights V (n, k) of the kept channels that come nearest to W·X: a ridge regression towards W itself.

    V = argmin ‖W X − V X_K‖² + λ‖V − W_K‖² = W_K + W_P H_PK (H_KK + λI)⁻¹, with λ = ridge · mean(diag H) and P
    the removed channels. Raises NumericalError where H_KK + λI is not positive definite.
    """
    removed = torch.ones(W.shape[1], dtype=torch.bool)
    removed[kept] = False
    H = H.double()
    damped = H[kept][:, kept]
    damped.diagonal().add_(ridge * float(H.diagonal().mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(f"H + λI is not positive definite (ridge={ridge}); raise ridge")
    moved = torch.cholesky_solve(H[kept][:, removed] @ W[:, removed].T.double(), L).T
    return W[:, kept] + moved.to(W.dtype)
