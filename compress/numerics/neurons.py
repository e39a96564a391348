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


def wanda_channel_scores(W: Tensor, H: Tensor) -> Tensor:
    """Σ_i |W_ij| · ‖X_j‖₂, (m,): the sum of a channel's scores in Sun et al. 2023, arXiv:2306.11695, eq. 1."""
    return W.abs().sum(dim=0) * H.diagonal().clamp(min=0).sqrt()


def fisher_channel_scores(W: Tensor, H: Tensor, G: Tensor) -> Tensor:
    """√(w_jᵀ G w_j) · ‖X_j‖₂, (m,), with w_j the columns of W: what the loss feels of each channel's removal.

    G: (n, n), second moments of the loss's gradient by the output. The Fisher matrix of W is taken for the Kronecker
    product of H and G, as in Martens & Grosse 2015, arXiv:1503.05671.
    """
    return ((G @ W) * W).sum(dim=0).clamp(min=0).sqrt() * H.diagonal().clamp(min=0).sqrt()


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest of the scores (m,), ascending; among equal ones the lower stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def together(parts: Tensor, adding: bool) -> Tensor:
    """Worth (k,) of what consists of parts, by their scores (k, parts): the sum of those that add, else the 2-norm."""
    return parts.sum(dim=1) if adding else parts.square().sum(dim=1).sqrt()


def highest_groups(scores: Tensor, groups: int, per_group: int, adding: bool = False) -> tuple[Tensor, Tensor]:
    """Of scores (groups, heads per group): positions of the `groups` groups that are worth most `together`, and of
    the `per_group` highest heads of each, counted over all groups; both ascending, and among equals the lower stay.
    """  # noqa: D205
    rows = highest(together(scores, adding), groups)
    columns = [highest(scores[row], per_group) + int(row) * scores.shape[1] for row in rows]
    return rows, torch.cat(columns)


def with_neighbours(positions: Tensor, size: int) -> Tensor:
    """Channels of the heads at `positions`, `size` each.

    >>> with_neighbours(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (positions.unsqueeze(1) * size + torch.arange(size)).flatten()


def with_constant(X: Tensor) -> Tensor:
    """Tokens of X (tokens, m) with a channel more, 1 at each of them, whose weights are a bias: (tokens, m + 1)."""
    return torch.cat([X, X.new_ones(len(X), 1)], dim=1)


def compensated(
    W: Tensor, H: Tensor, kept: Tensor, ridge: float, missing: Tensor | None = None, constant: int = 0
) -> Tensor:
    """Weights V (n, k) of the kept channels that come nearest to W·X + D: a ridge regression towards W itself.

    missing: (n, m) D Xᵀ, with D what the outputs lack besides; nothing by default. constant: how many of the last
    channels are constant, all of them kept: no ridge holds their weights, a bias, and λ leaves their moments out.
    V = argmin ‖W X + D − V X_K‖² + λ‖V − W_K‖² = W_K + (W_P H_PK + D X_Kᵀ) (H_KK + λI)⁻¹, with P the removed channels
    and λ = ridge · mean(diag H). Raises NumericalError where H_KK + λI is not positive definite.
    """
    removed = torch.ones(W.shape[1], dtype=torch.bool)
    removed[kept] = False
    H = H.double()
    lacking = W[:, removed].double() @ H[removed][:, kept]
    if missing is not None:
        lacking += missing[:, kept].double()
    damped = H[kept][:, kept]
    damped.diagonal()[: len(kept) - constant].add_(ridge * float(H.diagonal()[: len(H) - constant].mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(f"H + λI is not positive definite (ridge={ridge}); raise ridge")
    return W[:, kept] + torch.cholesky_solve(lacking.T, L).T.to(W.dtype)
