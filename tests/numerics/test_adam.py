"""Adam with moments in bfloat16 against torch's, and the rounding that makes it possible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.adam import AT_ONCE, LeanAdam, stochastic_bfloat16

BETAS = (0.9, 0.95)


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([1e-30, 1e-6, 1.0, 1e6]))
def test_rounding_goes_to_a_neighbour_and_keeps_the_mean(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(64, generator=generator)
    low, high = (stochastic_bfloat16(x, torch.full((64,), n, dtype=torch.int32)) for n in (0, 65535))
    noise = torch.randint(2**16, (2000, 64), generator=generator, dtype=torch.int32)
    drawn = stochastic_bfloat16(x.expand(2000, 64).contiguous(), noise)
    assert ((drawn == low) | (drawn == high)).all() and drawn.dtype == torch.bfloat16
    step = (high.float() - low.float()).abs()
    assert (step <= 2.0**-7 * x.abs()).all()
    # five standard errors of a mean of 2,000 draws between two neighbours
    assert ((drawn.double().mean(0) - x).abs() <= 5 * 0.5 * step / 2000**0.5 + 1e-12 * size).all()
    exact = low.float()
    assert torch.equal(stochastic_bfloat16(exact, noise[0]), low)


def descend(kind: str, steps: int, rate: float = 1e-2) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """Weights after some steps on noisy gradients of a bowl."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(300, 7, generator=generator)
    weights = torch.nn.Parameter(torch.zeros(300, 7))
    groups = [{"params": [weights], "lr": rate}]
    optimizer = LeanAdam(groups, BETAS, seed=1) if kind == "lean" else torch.optim.Adam(groups, betas=BETAS)
    for _ in range(steps):
        weights.grad = weights.detach() - target + 0.3 * torch.randn(300, 7, generator=generator)
        optimizer.step()
    return weights.detach(), optimizer


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_it_follows_torch_s_adam(steps):
    plain, _ = descend("plain", steps)
    lean, optimizer = descend("lean", steps)
    # each step is off by at most a bfloat16 step (2^-8) of the moments' ratio, and the errors have mean zero
    assert (lean - plain).norm() <= 0.01 * plain.norm() and (steps > 1 or torch.allclose(lean, plain, rtol=1e-5))
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16 and int(state["step"]) == steps


def test_moments_decay_where_nearest_rounding_would_hold_them():
    weights = torch.nn.Parameter(torch.zeros(4096))
    optimizer = LeanAdam([{"params": [weights], "lr": 0.0}], (0.9, 0.999), seed=0)
    weights.grad = torch.ones(4096)
    optimizer.step()
    weights.grad = torch.zeros(4096)
    for _ in range(500):
        optimizer.step()
    square = optimizer.state[weights]["exp_avg_sq"].float().mean()
    nearest = torch.tensor(0.001).bfloat16()
    for _ in range(500):
        nearest = (nearest.float() * 0.999).bfloat16()
    assert float(square) == pytest.approx(0.001 * 0.999**500, rel=0.03)
    assert float(nearest) > 0.00099  # it never moved


def test_parameters_longer_than_a_chunk_and_without_gradient():
    long, idle = (torch.nn.Parameter(torch.zeros(n)) for n in (AT_ONCE + 5, 3))
    optimizer = LeanAdam([{"params": [long, idle], "lr": 0.1}], BETAS, seed=0)
    long.grad = torch.ones_like(long)
    optimizer.step()
    torch.testing.assert_close(long.detach(), torch.full_like(long, -0.1))
    assert not idle.any() and idle not in optimizer.state
