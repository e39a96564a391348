"""The type of products follows the processor; oneDNN is asked only where it keeps float32's bits."""

import pytest
import torch

from compress.numerics import products

MATMUL = torch.backends.mkldnn.matmul


def test_float32_stays_float32():
    before = MATMUL.fp32_precision
    try:
        products.prefer_onednn.cache_clear()
        exact = products.prefer_onednn()
        assert MATMUL.fp32_precision == ("bf16" if exact else before)
        generator = torch.Generator().manual_seed(0)
        for rows, inner, columns in ((1, 576, 64), (300, 64, 300), (512, 1536, 576)):
            X = torch.randn(rows, inner, generator=generator)
            W = torch.randn(columns, inner, generator=generator)
            exactly = X.double() @ W.double().T
            error = (torch.nn.functional.linear(X, W).double() - exactly).abs().max()
            assert error < 1e-6 * inner  # factors of 8 bits err by 0.004 of their root
    finally:
        MATMUL.fp32_precision = before
        products.prefer_onednn.cache_clear()


def test_a_processor_that_reads_fewer_bits_keeps_mkl(monkeypatch):
    before = MATMUL.fp32_precision
    try:
        products.prefer_onednn.cache_clear()
        MATMUL.fp32_precision = "none"
        product = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
        assert not products.prefer_onednn()
        assert MATMUL.fp32_precision == "none"
    finally:
        MATMUL.fp32_precision = before
        products.prefer_onednn.cache_clear()


def test_bfloat16_factors_are_allowed_for_a_while():
    before = MATMUL.fp32_precision
    for exact, within in ((True, "bf16"), (False, before)):
        with products.bfloat16_factors(exact):
            assert MATMUL.fp32_precision == within
        assert MATMUL.fp32_precision == before


@pytest.mark.parametrize(
    "has,expected",
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_products_of_calibration_are_bfloat16_where_the_processor_multiplies_it(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert products.working_type() == expected
    with products.working_products():
        assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == expected


def test_this_processor_says_what_it_multiplies():
    assert products.NATIVE & torch.cpu.get_capabilities().keys()
