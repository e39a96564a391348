"""Codebooks against bitsandbytes, against the formats' definitions, and against a slow plain version."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.numerics.codebook import LEVELS, CodebookGrid, exponents_to_float, fit

NAMES = ("nf4", "mxfp4", "iq4_nl")


def weights(seed: int, shape: tuple[int, ...] = (5, 3, 32), spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * spread


def slow_codes(W: torch.Tensor, scales: torch.Tensor, name: str) -> torch.Tensor:
    """The nearest of all levels, weight by weight."""
    codes = torch.empty(W.shape)
    for i, row in enumerate(W):
        for j, group in enumerate(row):
            scale = 2.0 ** (int(scales[i, j]) - 127) if name == "mxfp4" else float(scales[i, j])
            for k, w in enumerate(group.tolist()):
                if scale == 0:  # of no use to any level: the weights take the code of 0
                    w = 0.0
                distances = [abs(w - level * (scale or 1.0)) for level in LEVELS[name]]
                codes[i, j, k] = distances.index(min(distances))
    return codes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_the_nearest_of_all_levels(name, search):
    W = weights(0)
    W[0, 0], W[1, 1, :4] = 0.0, 0.0
    grid = fit(W, name, None, search)
    assert torch.equal(grid.round(W), slow_codes(W, grid.scales, name))
    assert not grid.decode(grid.round(W))[0, 0].any()
    transposed = W.transpose(0, 2).contiguous().transpose(0, 2)  # columns in a row, as GPTQ holds them
    assert torch.equal(fit(transposed, name, None, search).round(transposed), grid.round(W))


def test_nf4_has_the_levels_and_codes_of_bitsandbytes():
    assert torch.equal(torch.tensor(LEVELS["nf4"]), bnb.get_4bit_type("nf4", device="cpu"))
    W = weights(1, (40, 128)).half().float()  # so that the largest magnitudes are float16 numbers, as our scales are
    theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    grid = fit(W.view(40, 2, 64), "nf4", None, search=False)
    codes = grid.round(W.view(40, 2, 64)).view(-1).to(torch.uint8)
    assert torch.equal(codes[::2] << 4 | codes[1::2], theirs.flatten())
    assert torch.equal(grid.scales.float().flatten(), state.absmax)
    ours = EncodedTensor(Encoding("nf4", 64), codes.view(40, 128), grid.scales).decode()
    assert torch.equal(ours, bnb.dequantize_4bit(theirs, state))


def test_nf4_levels_are_normal_quantiles():
    offset = 0.9677083  # where the paper's code puts the outermost quantile
    positive = norm.ppf([offset + i * (0.5 - offset) / 8 for i in range(8)])
    negative = -norm.ppf([offset + i * (0.5 - offset) / 7 for i in range(7)])
    expected = sorted([*positive, 0.0, *negative]) / max(positive)
    assert torch.allclose(torch.tensor(LEVELS["nf4"]).double(), torch.tensor(expected), atol=1e-6)  # float32 constants


def test_mxfp4_levels_are_the_floats_of_e2m1():
    for code, level in enumerate(LEVELS["mxfp4"]):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
        assert level == (-magnitude if sign else magnitude)


def test_exponents_are_powers_of_two():
    exponents = torch.arange(255, dtype=torch.uint8)
    assert exponents_to_float(exponents).tolist() == [2.0 ** (e - 127) for e in range(255)]


@given(st.integers(0, 10**6), st.sampled_from(NAMES), st.booleans(), st.sampled_from([1e-20, 1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=60)
def test_error_is_within_half_a_gap_and_codes_repeat(seed, name, search, spread):
    if name != "mxfp4" and spread == 1e-20:
        spread = 1e-2  # float16 scales end at 6e-8
    W = weights(seed, spread=spread)
    grid = fit(W, name, None, search)
    codes = grid.round(W)
    decoded = grid.decode(codes)
    assert torch.equal(grid.round(decoded), codes)
    scale = exponents_to_float(grid.scales) if name == "mxfp4" else grid.scales.float()
    levels = sorted(LEVELS[name])
    reach = (min(max(levels), -min(levels)) * scale.abs()).unsqueeze(-1)
    half_gap = max(b - a for a, b in zip(levels, levels[1:])) / 2 * scale.abs().unsqueeze(-1)
    inside = W.abs() <= reach
    assert ((W - decoded).abs() <= half_gap * (1 + 1e-6))[inside].all()  # a rounding error of float32
    if 0.0 in levels:
        assert torch.equal(decoded.sign()[decoded != 0], W.sign()[decoded != 0])


@given(st.integers(0, 10**6), st.sampled_from(NAMES), st.booleans())
@settings(deadline=None, max_examples=40)
def test_search_never_loses(seed, name, weighted):
    W = weights(seed, (4, 2, 64 if name == "nf4" else 32))
    h = torch.rand(W.shape[1:], generator=torch.Generator().manual_seed(seed)) if weighted else None

    def error(search: bool) -> torch.Tensor:
        grid = fit(W, name, h, search)
        square = (W - grid.decode(grid.round(W))).square()
        return (square if h is None else square * h).sum(-1)

    assert (error(True) <= error(False) * (1 + 1e-5)).all()  # sums in another order


@pytest.mark.parametrize("name,factor", [("nf4", 0.97), ("mxfp4", 0.95), ("iq4_nl", 0.97)])
def test_search_gains(name, factor):
    W = weights(5, (64, 8, 32))
    found = [
        (W - (grid := fit(W, name, None, search)).decode(grid.round(W))).square().sum() for search in (False, True)
    ]
    assert found[1] < factor * found[0], found


@pytest.mark.parametrize("name", ["nf4", "mxfp4"])
def test_zero_has_its_own_code(name):
    grid = CodebookGrid(name, fit(weights(3), name, None, False).scales)
    code = grid.zero.expand(5, 3, 32)
    assert not grid.decode(code).any() and torch.equal(grid.round(torch.zeros(5, 3, 32)), code)


def test_bad_numbers_and_fields_are_refused():
    W = weights(4)
    with pytest.raises(NumericalError, match="does not fit float16"):
        fit(W * 1e6, "nf4", None, False)
    W[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="non-finite"):
        fit(W, "mxfp4", None, False)
    with pytest.raises(RecipeError, match="over 32 channels, found group_size=64"):
        Encoding("mxfp4", 64)
    with pytest.raises(RecipeError, match="iq4_nl shares a scale over 32 channels, found group_size=None"):
        Encoding("iq4_nl")
    with pytest.raises(RecipeError, match="without zero points"):
        Encoding("nf4", 64, symmetric=False)
    with pytest.raises(RecipeError, match="48 input channels are not a multiple of mxfp4's 32"):
        Encoding("mxfp4", 32).groups(48)
