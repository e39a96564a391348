"""The sweep against the update of the papers, with the inverse written out, in float64."""

import pytest
import torch

from compress.numerics.hessian import damped_factor
from compress.numerics.sweep import COLUMNS_AT_ONCE, runs, sweep


def problem(m: int, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m)
    X = torch.randn(4 * m, m // 4, generator=generator) @ torch.randn(m // 4, m, generator=generator)
    X += torch.randn(4 * m, m, generator=generator)
    return torch.randn(n, m, generator=generator), X.T @ X


def step_of(left: torch.Tensor) -> torch.Tensor:
    """A step size per row that depends on all of a run's columns, (n,)."""
    return left.abs().amax(0) / 4


def slow(W: torch.Tensor, H: torch.Tensor, size: int) -> torch.Tensor:
    """After each column all later ones take its error times the first row of the inverse of what is left of H."""
    W, H, m = W.double().clone(), H.double(), W.shape[1]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    for j in range(m):
        if j % size == 0:
            step = step_of(W[:, j : j + size].T)
        inverse = torch.linalg.inv(H[j:, j:])
        new = (W[:, j] / step).round() * step
        W[:, j:] -= ((W[:, j] - new) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        W[:, j] = new
    return W


@pytest.mark.parametrize("m,size", [(48, 16), (48, 4), (160, 160), (288, 96), (300, 300), (40, 64)])
def test_equals_the_update_with_the_inverse(m, size):
    W, H = problem(m)
    before = W.clone()
    step = torch.empty(0)

    def begin(start: int, columns: torch.Tensor) -> None:
        nonlocal step
        assert len(columns) == min(size, m - start)
        step = step_of(columns)

    found = sweep(W, damped_factor(H, 0.01), runs(m, size), begin, lambda j, column: (column / step).round() * step)
    expected = slow(W, H, size)
    assert torch.equal(W, before)
    # A value near the middle of a step may fall to its other side in float32, and later columns then make up for it.
    same = (found.double() - expected).abs().amax(1) < 1e-3
    assert same.float().mean() >= 0.8
    lost, least = (float(((X - W) @ H.to(X.dtype) * (X - W)).sum()) for X in (found, expected))
    assert lost == pytest.approx(least, rel=0.02)


def test_columns_that_stay_change_nothing():
    W, H = problem(2 * COLUMNS_AT_ONCE + 7)
    found = sweep(W, damped_factor(H, 0.01), runs(W.shape[1]), lambda start, columns: None, lambda j, column: column)
    assert torch.equal(found, W)
