"""Gradients through rounding against autograd on the formulas of the paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.fake_quantization import straight_through


class Round(torch.autograd.Function):
    """Rounding with the identity as its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([(-2, 1), (-4, 3), (0, 7)]), st.booleans())
def test_they_are_autograd_s_on_a_clamp_and_a_rounding_that_lets_through(seed, ends, negative):
    generator = torch.Generator().manual_seed(seed)
    low, high = ends
    scale = (0.1 + torch.rand(5, 2, 1, generator=generator).double()) * (-1 if negative else 1)
    W = (3 * torch.randn(5, 2, 8, generator=generator).double()).requires_grad_()
    theta = (0.2 * torch.randn(5, 2, generator=generator).double()).requires_grad_()
    zero = 3 if low == 0 else 0
    s = scale * theta.exp().unsqueeze(-1)
    decoded = s * (Round.apply((W / s + zero).clamp(low, high)) - zero)
    gradient = torch.randn(5, 2, 8, generator=generator).double()
    (decoded * gradient).sum().backward()
    a, b = ((s * (end - zero)).detach() for end in ends)
    found = straight_through(gradient, W.detach(), decoded.detach(), torch.minimum(a, b), torch.maximum(a, b))
    torch.testing.assert_close(found[0], W.grad)
    torch.testing.assert_close(found[1], theta.grad)


@pytest.mark.parametrize("W,expected", [(0.4, (1.0, -0.4)), (0.6, (1.0, 0.4)), (9.0, (0.0, 3.0)), (-9.0, (0.0, -4.0))])
def test_the_scale_s_gradient_is_that_of_equation_3(W, expected):
    weight, one = torch.tensor([[[W]]]), torch.ones(1, 1, 1)
    decoded = weight.round().clamp(-4, 3)
    through, theta = straight_through(one, weight, decoded, -4 * one, 3 * one)
    assert (float(through), float(theta)) == pytest.approx(expected)
