"""Rounding of activations and caches: the very numbers of llama.cpp's blocks, and never more than half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.ggml_blocks import decode_blocks, encode_blocks
from compress.numerics.runtime_rounding import round_per_tensor, round_per_token, round_q4_0, round_q8_0


def loud_and_quiet(seed: int, rows: int = 64, k: int = 96) -> torch.Tensor:
    """Rows of all magnitudes, one of zeros, and blocks of zeros beside others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.logspace(-3, 3, rows).unsqueeze(1)
    x[3], x[5, :32] = 0.0, 0.0
    return x


@pytest.mark.parametrize("kind,function", [("q8_0", round_q8_0), ("q4_0", round_q4_0)])
def test_blocks_are_bit_for_bit_those_of_llama_cpp(kind, function):
    x = loud_and_quiet(0)
    assert torch.equal(function(x.view(4, 16, 96)).view(64, 96), decode_blocks(encode_blocks(x, kind), kind))
    if kind == "q8_0":  # a q4_0 block is cut off at both ends, and rounding it again moves its scale
        assert torch.equal(function(function(x)), function(x))


@given(st.integers(0, 10_000))
def test_an_error_is_at_most_half_a_step(seed):
    x = loud_and_quiet(seed)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((round_per_token(x) - x).abs() <= step * 0.5001 + 1e-20).all()  # float32 quotients near a half
    scale = float(x.abs().max()) / 127
    assert ((round_per_tensor(x, scale) - x).abs() <= scale * 0.5001).all()
    codes = round_per_token(x) / step.clamp(min=1e-20)
    assert (codes - codes.round()).abs().max() < 1e-3 and codes.abs().max() < 127.01


def test_a_fixed_scale_cuts_off_and_silence_stays_silent():
    x = torch.tensor([[1000.0, -1000.0, 0.4, 1.6]])
    assert round_per_tensor(x, 1.0).tolist() == [[127.0, -128.0, 0.0, 2.0]]
    for function in (round_per_token, round_q8_0, round_q4_0):
        assert not function(torch.zeros(2, 32)).any()
