"""Rounding methods: reference, properties, bad input, and consequences on the real model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.plugin import step
from compress.steps.quantize._fields import round_to_nearest
from compress.steps.quantize.gptq import solve
from tests.tiny import tiny_model

INT4 = Encoding("int4", 16)


def problem(seed: int, n: int = 10, m: int = 48, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the second moments of inputs with strongly correlated channels: a few factors and noise."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, m // 4, generator=generator)
    X = factors @ torch.randn(m // 4, m, generator=generator) + 0.5 * torch.randn(tokens, m, generator=generator)
    return torch.randn(n, m, generator=generator), X.T @ X


def loss(W: torch.Tensor, encoded: EncodedTensor, H: torch.Tensor) -> float:
    error = (W - encoded.decode()).double()
    return float((error @ H.double() * error).sum())


def slow_gptq(W: torch.Tensor, H: torch.Tensor, scales: torch.Tensor, size: int, dampening: float) -> torch.Tensor:
    """Optimal brain quantization column by column with the exact inverse of what is left, in float64.

    Frantar & Alistarh 2022, arXiv:2208.11580, equations 7 and 8, in the fixed order of GPTQ.
    """
    W, H = W.double().clone(), H.double().clone()
    m = W.shape[1]
    H += dampening * H.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    codes = torch.empty_like(W)
    for j in range(m):
        inverse = torch.linalg.inv(H[j:, j:])
        s = scales[:, j // size].double()
        codes[:, j] = (W[:, j] / s).round().clamp(-8, 7)
        error = (W[:, j] - codes[:, j] * s) / inverse[0, 0]
        W[:, j:] -= error.unsqueeze(1) * inverse[0]
    return codes


def test_gptq_equals_a_slow_plain_version():
    W, H = problem(0)
    found = solve(W, H, INT4, 0.01, search=True)
    expected = slow_gptq(W, H, found.scales, 16, 0.01)
    # float32 against float64: a weight on the edge between two codes may fall on either side
    assert (found.codes.double() != expected).float().mean() < 0.01


@given(st.integers(0, 10**6), st.sampled_from(["int8", "int4", "int2"]), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_gptq_with_uncorrelated_equal_inputs_is_rounding_to_nearest(seed, name, symmetric, search):
    W, _ = problem(seed)
    encoding = Encoding(name, 16, symmetric)
    found = solve(W, torch.eye(48), encoding, 1e-6, search)
    plain = round_to_nearest("w", W, encoding, search)
    assert torch.equal(found.scales, plain.scales) and torch.equal(found.codes, plain.codes)


@pytest.mark.parametrize("group_size", [8, 16, 48, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_than_rounding_on_its_inputs(group_size, symmetric):
    W, H = problem(2, n=30)
    encoding = Encoding("int4", group_size, symmetric)
    gptq = loss(W, solve(W, H, encoding, 0.01, search=True), H)
    assert gptq < 0.7 * loss(W, round_to_nearest("w", W, encoding, search=True), H)


@pytest.mark.parametrize("encoding", [Encoding("nf4", 16), Encoding("mxfp4", 32)])
def test_gptq_chooses_codes_of_codebooks(encoding):
    W, H = problem(6, n=30, m=96, tokens=400)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    plain = loss(W, round_to_nearest("w", W, encoding, search=True), H)
    assert loss(W, solve(W, H, encoding, 0.01, search=True), H) < 0.7 * plain
    found = solve(W * mask, H, encoding, 0.01, search=True, mask=mask).decode()
    assert not found[~mask].any() and found[mask].any()


def test_groups_wider_than_a_run_of_columns_are_solved_alike():
    W, H = problem(4, n=6, m=288, tokens=600)
    wide = solve(W, H, Encoding("int4", None), 0.01, search=False)
    assert wide.scales.shape == (6, 1)
    expected = slow_gptq(W, H, wide.scales, 288, 0.01)
    assert (wide.codes.double() != expected).float().mean() < 0.01


def test_gptq_keeps_pruned_weights_at_zero():
    W, H = problem(3)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    for symmetric in (True, False):
        found = solve(W * mask, H, Encoding("int4", 16, symmetric), 0.01, search=True, mask=mask)
        assert not found.decode()[~mask].any()
        assert found.decode()[mask].any()


def test_a_dead_channel_becomes_zero():
    W, H = problem(5)
    H[7], H[:, 7] = 0.0, 0.0
    assert not solve(W, H, INT4, 0.01, search=True).decode()[:, 7].any()


def test_steps_encode_what_they_announce():
    windows = [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    for name in ("quantize.rtn", "quantize.gptq"):
        model = tiny_model()
        chosen = step(name)(encoding="int4", group_size=16, keep={"*.down_proj": "int8", "*.o_proj": "fp32"})
        announced = chosen.encodings(model.facts)
        chosen.apply(model, Context(seed=0, calibration=windows))
        assert {n: e.encoding for n, e in model.encoded.items()} == announced
        assert announced["model.layers.0.mlp.down_proj.weight"] == Encoding("int8", 16)
        assert "model.layers.0.self_attn.o_proj.weight" not in announced
        assert announced["lm_head.weight"] == Encoding("int8", 16)
        for tensor, encoded in model.encoded.items():
            assert torch.equal(model.parameter(tensor), encoded.decode())


def test_cast_rounds_every_matrix_and_no_norm():
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    step("quantize.cast")(encoding="bf16").apply(model, Context(seed=0))
    for name, parameter in model.module.named_parameters():
        expected = before[name].bfloat16().float() if name in model.facts.matrices else before[name]
        assert torch.equal(parameter, expected)
    assert "model.norm.weight" not in model.encoded


def test_float16_overflow_names_the_tensor():
    model = tiny_model()
    with torch.no_grad():
        model.parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = 1e6
    with pytest.raises(NumericalError, match="layers.1.mlp.up_proj"):
        step("quantize.cast")(encoding="fp16").apply(model, Context(seed=0))


def test_rounding_codes_again_is_refused():
    model = tiny_model()
    step("quantize.rtn")(encoding="int8", group_size=16).apply(model, Context(seed=0))
    with pytest.raises(RecipeError, match="rounding twice"):
        step("quantize.rtn")(encoding="int4", group_size=16).apply(model, Context(seed=0))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"group_size": 24}, "not a multiple of group_size=24; use group_size=16"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 16, "keep": {"*.dwn_proj": "int8"}}, "matches no linear"),
    ],
)
def test_bad_fields_are_refused_before_weights_load(fields, message):
    with pytest.raises(RecipeError, match=message):
        step("quantize.rtn")(encoding="int4", **fields).check(tiny_model().facts)


def test_non_finite_weights_name_the_tensor():
    model = tiny_model()
    with torch.no_grad():
        model.parameter("model.layers.0.mlp.up_proj.weight")[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="layers.0.mlp.up_proj"):
        step("quantize.rtn")(encoding="int4", group_size=16).apply(model, Context(seed=0))


@pytest.mark.model
def test_gptq_halves_the_loss_of_rounding_on_the_real_model(real_model, real_baseline):
    from compress import data
    from compress.numerics.divergence import divergence

    requests = [data.Request("calibration", "wiki", 8192, 512), data.Request("evaluation", "wiki")]
    calibration, evaluation = data.split(requests, 0)
    windows = data.pack(calibration, real_baseline.encode, 2)
    held_out = [real_baseline.encode(d.text)[:256] for d in evaluation.documents[:16]]
    expected = [logits for logits in real_baseline.logits(held_out)]
    found = {}
    for name in ("quantize.rtn", "quantize.gptq"):
        model = real_model()
        step(name)(encoding="int4", group_size=32).apply(model, Context(seed=0, calibration=windows))
        pairs = zip(expected, model.logits(held_out))
        found[name] = torch.cat([divergence(p, q).kl for p, q in pairs]).mean().item()
    # measured 0.36 against 0.15 on longer calibration; with 16 windows the gap is smaller
    assert found["quantize.gptq"] < 0.65 * found["quantize.rtn"], found
