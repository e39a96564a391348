import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.encodings import Encoding
from compress.errors import NumericalError
from compress.numerics.affine import CANDIDATES, Grid, fit

CASES = [
    ("int8", True),
    ("int5", True),
    ("int4", True),
    ("int3", True),
    ("int2", True),
    ("int8", False),
    ("int4", False),
    ("int2", False),
]


def weights(seed: int, n: int = 6, g: int = 3, k: int = 16, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, g, k, generator=generator) * scale


@given(st.sampled_from(CASES), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 50.0]))
@settings(deadline=None)
def test_error_is_at_most_half_a_step_inside_the_range(case, seed, scale):
    name, symmetric = case
    encoding = Encoding(name, 16, symmetric)
    W = weights(seed, scale=scale)
    grid = fit(W, *encoding.code_range, symmetric, None, search=False)
    step = grid.scales.float().abs().unsqueeze(-1)
    low, high = (grid.decode(torch.full_like(W, edge)) for edge in encoding.code_range)
    inside = (W >= torch.minimum(low, high)) & (W <= torch.maximum(low, high))
    error = (W - grid.decode(grid.round(W))).abs()
    # half a quantization step, and the rounding of a float32 product
    assert (error <= step * 0.5001 + 1e-7)[inside].all()
    assert inside.float().mean() > 0.7  # the range is covered up to float16 rounding and the missing +8


def slow_search(W: torch.Tensor, low: int, high: int, h: torch.Tensor) -> float:
    """Weighted squared error of the best symmetric candidate for one group, in plain loops."""
    top = max(W.tolist(), key=lambda w: (abs(w), -w))
    best = None
    for step in [None, *torch.linspace(-0.9, 0.9, CANDIDATES).tolist()]:
        edge = low - (step or 0.0) if low < -high else high + (step or 0.0)
        s = torch.tensor(top / edge).half().float().item()
        codes = [min(max(round(w / s) if s else 0, low), high) for w in W.tolist()]
        if step is not None:
            squares = sum(x * c * c for x, c in zip(h.tolist(), codes))
            if squares:
                ratio = sum(x * w * c for x, w, c in zip(h.tolist(), W.tolist(), codes)) / squares
                s = torch.tensor(ratio).half().float().item()
        error = sum(x * (w - s * c) ** 2 for x, w, c in zip(h.tolist(), W.tolist(), codes))
        best = error if best is None else min(best, error)
    return best


@pytest.mark.parametrize("low,high", [(-8, 7), (-127, 127), (-2, 1)])
def test_search_equals_a_slow_plain_version(low, high):
    W = weights(3, n=4, g=2, k=16)
    h = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    grid = fit(W, low, high, True, h, search=True)
    s = grid.scales.float().unsqueeze(-1)
    for row in range(4):
        for group in range(2):
            # The scale was chosen for the candidate's codes; rounding anew to it can only lower the error.
            codes = grid.round(W)[row, group]
            error = float((h[group] * (W[row, group] - s[row, group] * codes) ** 2).sum())
            assert error <= slow_search(W[row, group], low, high, h[group]) * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("name,symmetric", CASES)
def test_search_never_raises_the_weighted_error(name, symmetric):
    W, h = weights(5, n=40), torch.rand(3, 16) + 0.01
    low, high = Encoding(name, 16, symmetric).code_range
    errors = []
    for search in (False, True):
        grid = fit(W, low, high, symmetric, h, search)
        errors.append((h * (W - grid.decode(grid.round(W))) ** 2).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-9).all()
    if name != "int8":
        assert errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_zero_is_exact_and_a_zero_group_decodes_to_zero(symmetric, search):
    W = weights(7)
    W[0, 0] = 0.0
    W[1, 1, ::2] = 0.0
    grid = fit(W, *Encoding("int4", 16, symmetric).code_range, symmetric, None, search)
    decoded = grid.decode(grid.round(W))
    assert not decoded[W == 0].any()


def test_signed_scale_gives_the_largest_weight_the_lowest_code():
    W = torch.tensor([[[4.0, -1.0, 0.5, 0.0]]])
    grid = fit(W, -8, 7, True, None, search=False)
    assert grid.scales.item() == -0.5 and grid.round(W).flatten().tolist() == [-8, 2, -1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    W = weights(1)
    W[2, 1, 3] = bad
    with pytest.raises(NumericalError, match="non-finite weights"):
        fit(W, -8, 7, True, None, search=True)


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(NumericalError, match="does not fit float16"):
        fit(torch.full((1, 1, 4), 1e7), -8, 7, True, None, search=False)


def test_rows_in_parts_equal_rows_at_once(monkeypatch):
    from compress.numerics import affine

    W = weights(11, n=50)
    whole = fit(W, -8, 7, True, None, search=True)
    monkeypatch.setattr(affine, "WEIGHTS_AT_ONCE", 100)
    parts = fit(W, -8, 7, True, None, search=True)
    assert torch.equal(whole.scales, parts.scales)


def test_grid_clamps_to_its_codes():
    grid = Grid(-8, 7, torch.ones(1, 1, dtype=torch.float16))
    assert grid.round(torch.tensor([[[-100.0, 100.0, 2.4]]])).flatten().tolist() == [-8, 7, 2]
