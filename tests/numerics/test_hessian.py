import pytest
import torch

from compress.errors import NumericalError
from compress.numerics.hessian import Hessian, damped_factor, times_inverse


def test_hessian_is_the_sum_of_outer_products():
    X = torch.randn(70, 12, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(12)
    hessian.add(X[:30].contiguous())
    hessian.add(X[30:].contiguous())
    expected = sum(torch.outer(x, x) for x in X.double())
    assert hessian.tokens == 70
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hessian.matrix, hessian.matrix.T)


def damped(H: torch.Tensor) -> torch.Tensor:
    return H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(len(H), dtype=torch.float64)


def test_factor_reproduces_the_damped_hessian():
    X = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    H = X.T @ X
    R = damped_factor(H, 0.01)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close((R @ R.T).double(), damped(H), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [5, 12])  # fewer than channels, and more
def test_a_product_with_the_inverse_needs_only_the_factor(rows):
    generator = torch.Generator().manual_seed(2)
    X, D = torch.randn(100, 8, generator=generator), torch.randn(8, 8, generator=generator)
    W, H = torch.randn(rows, 8, generator=generator), X.T @ X
    expected = W.double() @ D.double() @ torch.linalg.inv(damped(H))
    found = times_inverse(W, D, damped_factor(H, 0.01))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_indefinite_and_non_finite_are_refused():
    with pytest.raises(NumericalError, match="not positive definite"):
        damped_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01)
    hessian = Hessian(2)
    hessian.add(torch.tensor([[float("inf"), 1.0]]))
    with pytest.raises(NumericalError, match="non-finite"):
        _ = hessian.matrix
