"""The diagonal of the Fisher information, against its definition."""

import pytest
import torch
from torch.nn.functional import log_softmax

from compress.errors import NumericalError
from compress.numerics.sensitivity import backward_of_sampled_tokens, expected_divergence, squared_gradients


def test_squared_gradients_are_those_of_each_token():
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(9, 6, generator=generator), torch.randn(9, 4, generator=generator)
    plain = sum(torch.outer(g, row).square() for g, row in zip(gradient, x))
    assert torch.allclose(squared_gradients(x, gradient), plain, rtol=1e-5)
    found = squared_gradients(x, gradient.bfloat16())
    assert found.dtype == torch.float32 and torch.allclose(found, plain, rtol=0.05)  # 8 bits, squared


def test_labels_are_drawn_from_the_model_and_the_mean_gradient_vanishes():
    """E[∇ −ln p] = 0 and E[∇∇ᵀ] = diag(p) − ppᵀ when labels come from p itself."""
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0])
    hidden = logits.repeat(40_000, 1).requires_grad_()
    backward_of_sampled_tokens(hidden, lambda h: h * 1.0, torch.Generator().manual_seed(0), chunk=10_000)
    p = logits.softmax(0)
    assert hidden.grad.mean(0).abs().max() < 0.01  # 4 standard errors of 40,000 draws
    expected = torch.diag(p) - torch.outer(p, p)
    assert (hidden.grad.T @ hidden.grad / len(hidden) - expected).abs().max() < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    hidden = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(NumericalError, match="non-finite logits on the calibration data"):
        backward_of_sampled_tokens(hidden, lambda h: h * torch.tensor([1.0, 1.0, value, 1.0]), torch.Generator())


def test_the_expectation_is_the_divergence_of_a_small_independent_change():
    """Errors of random sign see the diagonal alone of x xᵀ ⊗ (diag p − ppᵀ), the Fisher matrix of a softmax layer."""
    generator = torch.Generator().manual_seed(1)
    x, W = torch.randn(300, 12, generator=generator), torch.randn(20, 12, generator=generator) / 3
    fisher = torch.zeros(20, 12)
    for seed in range(30):
        hidden = (x @ W.T).detach().requires_grad_()
        backward_of_sampled_tokens(hidden, lambda h: h * 1.0, torch.Generator().manual_seed(seed))
        fisher += squared_gradients(x, hidden.grad)
    ratios = []
    log_p = log_softmax(x @ W.T, -1)
    for seed in range(20):
        E = 0.02 * torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
        log_q = log_softmax(x @ (W + E).T, -1)
        measured = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        ratios.append(expected_divergence(fisher, E, 30 * 300) / measured)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)
