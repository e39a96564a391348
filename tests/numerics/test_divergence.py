import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.divergence import divergence, token_nll


def random_logits(rows, vocabulary, seed, scale=3.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def plain_divergences(p_logits, q_logits):
    """KL and JS in float64, straight from their definitions."""
    p = torch.softmax(p_logits.double(), 1)
    q = torch.softmax(q_logits.double(), 1)
    m = (p + q) / 2

    def kl(x, y):
        return torch.where(x > 0, x * (x / y).log(), torch.zeros_like(x)).sum(1)

    return kl(p, q), (kl(p, m) + kl(q, m)) / 2


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33])  # around the chunk of 8 rows
def test_nll_equals_cross_entropy_in_float64(rows):
    logits, targets = random_logits(rows, 500, rows), torch.arange(rows)
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    # float32 rounding of logits less their maximum, some 10
    torch.testing.assert_close(token_nll(logits, targets), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("noise", [0.01, 0.3, 5.0])
def test_divergences_equal_their_definitions_in_float64(rows, noise):
    p = random_logits(rows, 3000, rows)
    q = p + random_logits(rows, 3000, rows + 1, noise)
    found = divergence(p, q)
    kl, js = plain_divergences(p, q)
    torch.testing.assert_close(found.kl, kl, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found.js, js, atol=2e-6, rtol=2e-6)
    assert torch.equal(found.agree, p.argmax(1) == q.argmax(1))


def test_direction_is_from_reference_to_model():
    p, q = torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    a = 1 / (1 + math.exp(4))
    forward = a * math.log(2 * a) + (1 - a) * math.log(2 * (1 - a))
    backward = -0.5 * math.log(2 * a) - 0.5 * math.log(2 * (1 - a))
    assert divergence(p, q).kl.item() == pytest.approx(forward, rel=1e-6)
    assert divergence(q, p).kl.item() == pytest.approx(backward, rel=1e-6)


@settings(max_examples=50, deadline=None)  # shared processors: time is no property
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 300), st.floats(0.01, 50))
def test_properties(seed, rows, vocabulary, scale):
    p, q = random_logits(rows, vocabulary, seed, scale), random_logits(rows, vocabulary, seed + 1, scale)
    same = divergence(p, p.clone())
    assert (same.kl == 0).all()
    assert (same.js <= 1e-5).all() and same.agree.all()
    found, back = divergence(p, q), divergence(q, p)
    assert (found.kl >= 0).all() and (found.js >= 0).all() and (found.js <= math.log(2)).all()
    torch.testing.assert_close(found.js, back.js, atol=1e-5, rtol=0)
    shifted = divergence(p + 2.0, q - 1.0)  # softmax knows no offset
    torch.testing.assert_close(shifted.kl, found.kl, atol=1e-4, rtol=1e-4)
    assert (token_nll(p, torch.zeros(rows, dtype=torch.long)) >= 0).all()


def test_disjoint_distributions_reach_ln_2():
    p, q = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    found = divergence(p, q)
    assert found.js.item() == pytest.approx(math.log(2), abs=1e-7)
    assert found.kl.item() == pytest.approx(200, rel=1e-6)
    assert not found.agree.item()


def test_extreme_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4, 0.0]])
    assert token_nll(logits, torch.tensor([1])).item() == 6e4
    assert divergence(logits, logits.clone()).kl.item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_logit_that_is_not_finite_shows_in_its_row_alone(bad, side):
    pair = [random_logits(12, 50, 0), random_logits(12, 50, 1)]
    pair[side][9, 3] = bad
    found = divergence(*pair)
    assert not torch.isfinite(found.kl[9])
    others = torch.arange(12) != 9
    assert torch.isfinite(found.kl[others]).all() and torch.isfinite(found.js[others]).all()


def test_a_nan_logit_is_nan_in_everything():
    p, q = random_logits(3, 50, 0), random_logits(3, 50, 1)
    p[1, 7] = math.nan
    assert token_nll(p, torch.tensor([0, 0, 0])).isnan().tolist() == [False, True, False]
    found = divergence(p, q)
    assert found.kl.isnan().tolist() == found.js.isnan().tolist() == [False, True, False]
    assert not divergence(p, p).agree[1]


def test_inputs_are_left_alone():
    p, q = random_logits(9, 50, 0), random_logits(9, 50, 1)
    copies = p.clone(), q.clone()
    divergence(p, q)
    token_nll(p, torch.zeros(9, dtype=torch.long))
    assert torch.equal(p, copies[0]) and torch.equal(q, copies[1])


def test_no_rows_give_no_values():
    empty = torch.zeros(0, 50)
    assert token_nll(empty, torch.zeros(0, dtype=torch.long)).shape == (0,)
    found = divergence(empty, empty)
    assert found.kl.shape == found.js.shape == found.agree.shape == (0,)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 rows of logits for 3 targets"):
        token_nll(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="do not compare"):
        divergence(torch.zeros(2, 4), torch.zeros(2, 5))


def test_summed_nll_keeps_float64_digits():
    # 4,000 tokens of about 8 nats: a float32 running sum would be off by 1e-3
    logits, targets = random_logits(4000, 64, 5, 4.0), torch.arange(4000) % 64
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert token_nll(logits, targets).dtype == torch.float64
    assert np.isclose(token_nll(logits, targets).sum().item(), want.item(), rtol=1e-8)
