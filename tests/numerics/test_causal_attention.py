"""Attention by blocks of queries against torch's in float64, its gradients, and what may not leak."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from compress.numerics.causal_attention import QUERIES_AT_ONCE, causal_attention


def draw(seed: int, rows: int, groups: int, shared: int, length: int, size: int = 16):
    """Queries, keys and values; those of the values are shorter than those of the keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, groups * shared, length, size), (rows, groups, length, size), (rows, groups, length, size - 4)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def reference(query, key, value, scale):
    """Torch's own, in float64."""
    q, k, v = query.double(), key.double(), value.double()
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 4),
    length=st.sampled_from([1, 2, 63, 127, 128, 129, 200, 256, 300]),
    scale=st.sampled_from([0.25, 0.125, 1.0]),
)
def test_it_is_torch_attention(seed, rows, groups, shared, length, scale):
    inputs = draw(seed, rows, groups, shared, length)
    torch.testing.assert_close(
        causal_attention(*inputs, scale).double(), reference(*inputs, scale), rtol=1e-4, atol=1e-5
    )


def test_gradients_are_those_of_torch_attention():
    inputs = [x.requires_grad_() for x in draw(0, 2, 2, 3, QUERIES_AT_ONCE + 30)]
    gradient = torch.randn(2, 6, QUERIES_AT_ONCE + 30, 12, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(causal_attention(*inputs, 0.25), inputs, gradient)
    theirs = torch.autograd.grad(reference(*inputs, 0.25), inputs, gradient.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-5)


def test_scores_of_bfloat16_inputs_are_float32():
    query, key, value = (x.bfloat16() for x in draw(0, 1, 2, 3, 200))
    query = 40 * query  # scores of some hundreds, which bfloat16 would round to multiples of 1 or 2
    found = causal_attention(query, key, value, 0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), reference(query, key, value, 0.25), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("changed", [1, QUERIES_AT_ONCE - 1, QUERIES_AT_ONCE, QUERIES_AT_ONCE + 1, 299])
def test_no_position_sees_a_later_one(changed):
    query, key, value = draw(0, 1, 2, 2, 300)
    before = causal_attention(query, key, value, 0.25)
    for part in (query, key, value):
        part[:, :, changed:] = torch.nan
    after = causal_attention(query, key, value, 0.25)
    kept = changed // QUERIES_AT_ONCE * QUERIES_AT_ONCE  # a later key times a weight of 0 is NaN within its block
    assert torch.equal(after[:, :, :kept], before[:, :, :kept])
    key[:, :, changed:], value[:, :, changed:], query[:, :, changed:] = 7.0, -3.0, 2.0
    assert torch.equal(causal_attention(query, key, value, 0.25)[:, :, :changed], before[:, :, :changed])


def test_a_row_does_not_depend_on_its_batch():
    inputs = draw(0, 3, 2, 2, 200)
    together = causal_attention(*inputs, 0.25)
    for i in range(3):
        assert torch.equal(causal_attention(*(x[i : i + 1] for x in inputs), 0.25)[0], together[i])
