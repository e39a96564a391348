import pytest
import torch

from compress.errors import NumericalError
from compress.numerics.hessian import Hessian, damped_inverse_cholesky


def test_hessian_is_the_sum_of_outer_products():
    X = torch.randn(70, 12, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(12)
    hessian.add(X[:30].contiguous())
    hessian.add(X[30:].contiguous())
    expected = sum(torch.outer(x, x) for x in X.double())
    assert hessian.tokens == 70
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hessian.matrix, hessian.matrix.T)


def test_factor_reproduces_the_damped_inverse():
    X = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    H = X.T @ X
    U = damped_inverse_cholesky(H, 0.01)
    inverse = torch.linalg.inv(H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(8, dtype=torch.float64))
    assert torch.equal(U, U.triu())
    torch.testing.assert_close((U.T @ U).double(), inverse, rtol=1e-4, atol=1e-7)


def test_indefinite_and_non_finite_are_refused():
    with pytest.raises(NumericalError, match="not positive definite"):
        damped_inverse_cholesky(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01)
    hessian = Hessian(2)
    hessian.add(torch.tensor([[float("inf"), 1.0]]))
    with pytest.raises(NumericalError, match="non-finite"):
        _ = hessian.matrix
