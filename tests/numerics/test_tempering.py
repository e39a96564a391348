import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.tempering import LADDER, crossing, curves, deviation

STEPS = np.array(LADDER, dtype=np.float64)


def random_rows(seed, rows=21, vocabulary=300, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def slow(logits, targets, b):
    """(NLL, KL) of softmax((1 + b)·x) against softmax(x), summed over the vocabulary as they are defined."""
    log_p = torch.log_softmax(logits.double(), 1)
    log_q = torch.log_softmax((1 + b) * logits.double(), 1)
    rows = torch.arange(len(logits))
    nll = (log_p - log_q)[rows, targets].mean().item()
    return nll, (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


@pytest.mark.parametrize("points", [1, 2, 3, len(LADDER)])
def test_curves_are_the_losses_by_their_definitions(points):
    logits, targets = random_rows(0)
    found = curves(logits, targets, 0.05, points)
    b = 0.05 * STEPS[:points]
    want = np.array([slow(logits, targets, x) for x in b])
    # atol: float32 keeps ln Z, of the order of 1, to about 1e-6
    np.testing.assert_allclose(found.nll(b), want[:, 0], rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(found.kl(b), want[:, 1], rtol=1e-4, atol=3e-6)


def test_curves_of_windows_add_up():
    (a, t), (c, u) = random_rows(1, rows=5), random_rows(2, rows=12)
    together = curves(torch.cat([a, c]), torch.cat([t, u]), 0.1)
    parts = curves(a, t, 0.1) + curves(c, u, 0.1)
    np.testing.assert_allclose(parts.log_z, together.log_z, rtol=1e-6)
    assert (parts.rows, parts.target) == (17, pytest.approx(together.target, rel=1e-6))
    assert parts.mean == pytest.approx(together.mean, rel=1e-6)


def test_a_small_loss_is_half_the_squared_deviation():
    logits, targets = random_rows(3, rows=200)
    b = 0.02 / deviation(logits)
    assert curves(logits, targets, b, 1).kl(np.array([b]))[0] == pytest.approx(0.02**2 / 2, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.002, 0.05, 0.15, 0.8]), st.sampled_from(["nll", "kl"]))
def test_the_crossing_makes_the_loss_that_was_asked_for(seed, loss, kind):
    logits, targets = random_rows(seed, scale=3.0)
    targets = torch.where(torch.rand(len(targets)) < 0.5, logits.argmax(1), targets)  # better than guessing
    unit = math.sqrt(2 * loss) / deviation(logits) / 4
    b = crossing(unit * STEPS, getattr(curves(logits, targets, unit), kind)(unit * STEPS), loss)
    assert b is not None and b > 0
    assert slow(logits, targets, b)[kind == "kl"] == pytest.approx(loss, rel=0.02)  # interpolation


def test_a_loss_that_is_never_reached_has_no_crossing():
    sure = torch.full((4, 10), -30.0)
    sure[:, 3] = 30.0
    always_right = curves(sure, torch.full((4,), 3), 0.1)
    assert crossing(0.1 * STEPS, always_right.nll(0.1 * STEPS), 0.05) is None
    assert crossing(STEPS, np.full(len(STEPS), math.nan), 0.05) is None
