"""Refinement against the Hessian: closed forms against slow plain versions, and losses that only fall."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.refine import descend, losses, refit_scales


def problem(seed: int, n: int = 5, g: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (n, m), a Hessian (m, m) of correlated inputs, and integer levels (n, m)."""
    generator = torch.Generator().manual_seed(seed)
    m = g * size
    X = torch.randn(200, m // 2, generator=generator) @ torch.randn(m // 2, m, generator=generator)
    X += 0.5 * torch.randn(200, m, generator=generator)
    W = torch.randn(n, m, generator=generator)
    return W, X.T @ X, (W * 2).round().clamp(-8, 7)


def decode(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return levels * scales.repeat_interleave(levels.shape[1] // scales.shape[1], dim=1)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_no_other_scales_lose_less(seed):
    W, H, levels = problem(seed)
    found = refit_scales(W, H, levels, torch.full((5, 3), 0.5))
    for row in range(5):  # least squares in float64 over the Cholesky factor of H
        L = torch.linalg.cholesky(H.double())
        columns = torch.stack([(torch.eye(3)[a].repeat_interleave(8) * levels[row]).double() @ L for a in range(3)], 1)
        expected = torch.linalg.lstsq(columns, (W[row].double() @ L).unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=1e-4)


def test_a_group_of_zeros_keeps_its_scale():
    W, H, levels = problem(1)
    levels[2, 8:16] = 0
    found = refit_scales(W, H, levels, torch.full((5, 3), 0.25))
    assert found[2, 1] == 0.25 and (found[2, [0, 2]] != 0.25).all() and torch.isfinite(found).all()
    assert torch.equal(refit_scales(W, H, torch.zeros_like(levels), found), found)


def slow_descent(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Every code in turn tried at all 16 values, in float64; scales of ½."""
    Q = Q.double().clone()
    values = torch.arange(-8, 8, dtype=torch.float64) / 2
    for row in range(len(W)):
        for j in range(W.shape[1]):
            tried = Q[row].repeat(16, 1)
            tried[:, j] = values
            E = W[row].double() - tried
            Q[row, j] = values[((E @ H.double()) * E).sum(1).argmin()]
    return Q


def test_descent_takes_the_best_of_all_codes_column_by_column():
    W, H, levels = problem(2, g=20)  # 160 columns: more than one run
    Q = levels / 2
    found = descend(W, Q, H, lambda j, best: (best * 2).round().clamp(-8, 7) / 2)
    expected = slow_descent(W, Q, H)
    assert (found.double() != expected).float().mean() < 0.01  # ties fall on either side in float32
    assert (losses(W, found, H) <= losses(W, Q, H) * (1 + 1e-5)).all()


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_both_only_lower_the_loss(seed):
    W, H, levels = problem(seed)
    scales = torch.full((5, 3), 0.5)
    refitted = refit_scales(W, H, levels, scales)
    first = losses(W, decode(levels, scales), H)
    second = losses(W, decode(levels, refitted), H)
    assert (second <= first * (1 + 1e-4)).all()
    Q = descend(W, decode(levels, scales), H, lambda j, best: (best * 2).round().clamp(-8, 7) / 2)
    assert (losses(W, Q, H) <= first * (1 + 1e-4)).all()
