"""Which channels of a linear's input to remove, and how the others make up for them.

W: (n, m) weights of the linear that reads the channels. H: (m, m) XXᵀ over calibration tokens. λ = ridge ·
mean(diag H).
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


def least_missed(W: Tensor, H: Tensor, count: int, ridge: float) -> Tensor:
    """Positions of the `count` channels left, ascending, when the one that costs least goes, one after the other.

    A channel costs ‖W_:j‖² / [(H + λI)⁻¹]_jj once the others make up for it, which they do before the next one is
    chosen: of two channels that say the same, one stays.
    Kurtic, Frantar & Alistarh 2023, arXiv:2302.04089, section 3.1. Raises NumericalError as `compensated` does.
    """
    m = W.shape[1]
    inverse = torch.cholesky_inverse(_factor(H.double(), H, ridge))
    factors = torch.zeros(m - count, m, dtype=torch.float64)  # what is taken from the inverse, as FᵀF
    diagonal, V = inverse.diagonal().clone(), W.clone()
    gone = torch.zeros(m, dtype=torch.bool)
    for step in range(m - count):
        j = int((V.square().sum(dim=0) / diagonal).masked_fill(gone, torch.inf).argmin())
        row = inverse[j] - factors[:step, j] @ factors[:step]
        V -= torch.outer(V[:, j], (row / row[j]).to(W.dtype))
        factors[step] = row / row[j].sqrt()
        diagonal -= factors[step].square()
        gone[j] = True
    return (~gone).nonzero().flatten()


def compensated(W: Tensor, H: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Weights V (n, k) of the kept channels that come nearest to W·X: a ridge regression towards W itself.

    V = argmin ‖W X − V X_K‖² + λ‖V − W_K‖² = W_K + W_P H_PK (H_KK + λI)⁻¹, with P the removed channels.
    Raises NumericalError where H_KK + λI is not positive definite.
    """
    removed = torch.ones(W.shape[1], dtype=torch.bool)
    removed[kept] = False
    H = H.double()
    L = _factor(H[kept][:, kept], H, ridge)
    moved = torch.cholesky_solve(H[kept][:, removed] @ W[:, removed].T.double(), L).T
    return W[:, kept] + moved.to(W.dtype)


def _factor(part: Tensor, H: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factor of `part` of H, dampened by λ; float64."""
    damped = part.clone()
    damped.diagonal().add_(ridge * float(H.diagonal().mean()))
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(f"H + λI is not positive definite (ridge={ridge}); raise ridge")
    return L
