"""Rounding methods: reference, properties, bad input, and consequences on the real model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress import blocks
from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.plugin import step
from compress.steps.quantize import gptq
from compress.steps.quantize._fields import fit_grid, round_to_nearest
from compress.steps.quantize.gptq import Moments, _drift, solve
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
    found = solve(W, Moments(H), INT4, 0.01, search=True)
    expected = slow_gptq(W, H, found.scales, 16, 0.01)
    # float32 against float64: a weight on the edge between two codes may fall on either side
    assert (found.codes.double() != expected).float().mean() < 0.01


@given(st.integers(0, 10**6), st.sampled_from(["int8", "int4", "int2"]), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_gptq_with_uncorrelated_equal_inputs_is_rounding_to_nearest(seed, name, symmetric, search):
    W, _ = problem(seed)
    encoding = Encoding(name, 16, symmetric)
    found = solve(W, Moments(torch.eye(48)), encoding, 1e-6, search)
    plain = round_to_nearest("w", W, encoding, search)
    assert torch.equal(found.scales, plain.scales) and torch.equal(found.codes, plain.codes)


@pytest.mark.parametrize("group_size", [8, 16, 48, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_than_rounding_on_its_inputs(group_size, symmetric):
    W, H = problem(2, n=30)
    encoding = Encoding("int4", group_size, symmetric)
    gptq = loss(W, solve(W, Moments(H), encoding, 0.01, search=True), H)
    assert gptq < 0.7 * loss(W, round_to_nearest("w", W, encoding, search=True), H)


@pytest.mark.parametrize("encoding", [Encoding("nf4", 16), Encoding("mxfp4", 32), Encoding("iq4_nl", 32)])
def test_gptq_chooses_codes_of_codebooks(encoding):
    W, H = problem(6, n=30, m=96, tokens=400)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    plain = loss(W, round_to_nearest("w", W, encoding, search=True), H)
    assert loss(W, solve(W, Moments(H), encoding, 0.01, search=True), H) < 0.7 * plain
    if encoding.holds_zero:
        found = solve(W * mask, Moments(H), encoding, 0.01, search=True, mask=mask).decode()
        assert not found[~mask].any() and found[mask].any()


def slow_ordered_gptq(
    W: torch.Tensor, H: torch.Tensor, scales: torch.Tensor, size: int, dampening: float
) -> torch.Tensor:
    """`slow_gptq` that always rounds the channel of largest second moment among those left."""
    W, H = W.double().clone(), H.double().clone()
    left = sorted(range(len(H)), key=lambda j: -float(H[j, j]))
    H += dampening * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    codes = torch.empty_like(W)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(H[left][:, left])
        s = scales[:, j // size].double()
        codes[:, j] = (W[:, j] / s).round().clamp(-8, 7)
        W[:, left] -= ((W[:, j] - codes[:, j] * s) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        left = left[1:]
    return codes


def test_act_order_rounds_the_strongest_channels_first_on_static_scales():
    W, H = problem(7)
    strength = torch.rand(48, generator=torch.Generator().manual_seed(0)).mul_(2).exp()
    H *= strength * strength.unsqueeze(1)
    found = solve(W, Moments(H), INT4, 0.01, search=True, act_order=True)
    beforehand = fit_grid(W.view(10, 3, 16), INT4, H.diagonal().view(3, 16), search=True)
    assert torch.equal(found.scales, beforehand.scales)
    expected = slow_ordered_gptq(W, H, found.scales, 16, 0.01)
    assert (found.codes.double() != expected).float().mean() < 0.01


@pytest.mark.parametrize("encoding", [INT4, Encoding("int4", 16, symmetric=False), Encoding("nf4", 16)])
@pytest.mark.parametrize("search", [True, False])
def test_static_groups_are_fitted_to_the_weights_as_they_were(encoding, search):
    """As `static_groups` in the authors' gptq.py (IST-DASLab/gptq), without a change of order."""
    W, H = problem(12)
    found = solve(W, Moments(H), encoding, 0.01, search, static_groups=True)
    beforehand = fit_grid(W.view(10, 3, 16), encoding, H.diagonal().view(3, 16), search)
    assert torch.equal(found.scales, beforehand.scales)
    dynamic = solve(W, Moments(H), encoding, 0.01, search)
    # the first group's are the same, and the later ones have made up for it by the time they are fitted
    assert torch.equal(dynamic.scales[:, 0], found.scales[:, 0])
    assert not torch.equal(dynamic.scales[:, 1:], found.scales[:, 1:])
    if encoding == INT4:
        expected = slow_gptq(W, H, beforehand.scales, 16, 0.01)
        assert (found.codes.double() != expected).float().mean() < 0.01


@pytest.mark.parametrize("encoding", [INT4, Encoding("int4", 16, symmetric=False), Encoding("nf4", 16)])
def test_act_order_keeps_masks_and_loses_less_than_rounding(encoding):
    W, H = problem(8, n=30)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    found = solve(W * mask, Moments(H), encoding, 0.01, search=True, mask=mask, act_order=True)
    assert not found.decode()[~mask].any() and found.decode()[mask].any()
    ordered = loss(W, solve(W, Moments(H), encoding, 0.01, search=True, act_order=True), H)
    assert ordered < 0.7 * loss(W, round_to_nearest("w", W, encoding, search=True), H)


@pytest.mark.parametrize(
    "encoding",
    [INT4, Encoding("int4", 16, symmetric=False), Encoding("int2", 8), Encoding("nf4", 16), Encoding("mxfp4", 32),
     Encoding("int4")],
)  # fmt: skip
@pytest.mark.parametrize("act_order", [False, True])
def test_refinement_loses_less_and_less(encoding, act_order):
    W, H = problem(9, n=30, m=96, tokens=400)
    found = [
        solve(W, Moments(H), encoding, 0.01, search=True, act_order=act_order, refinement=passes)
        for passes in (0, 1, 3)
    ]
    lost = [loss(W, encoded, H) for encoded in found]
    assert lost[1] < 0.97 * lost[0] and lost[2] <= lost[1] * 1.001, lost  # the solved H is damped
    assert all(encoded.scales.dtype == found[0].scales.dtype for encoded in found)
    decoded = found[1].decode()
    low, high = encoding.code_range
    assert found[1].codes.min() >= low and found[1].codes.max() <= high and torch.isfinite(decoded).all()


def test_refinement_keeps_masks_and_makes_up_for_drift():
    W, X0, X = drifted(0)
    H, drift = X.float().T @ X.float(), (X0.float() - X.float()).T @ X.float()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    for symmetric in (True, False):
        found = solve(W * mask, Moments(H), Encoding("int4", 16, symmetric), 0.01, True, mask, refinement=2).decode()
        assert not found[~mask].any() and found[mask].any()

    def output_error(refinement: int) -> float:
        Q = solve(W, Moments(H, drift), INT4, 0.01, search=True, refinement=refinement).decode()
        return float((X0.float() @ W.T - X.float() @ Q.T).norm())

    assert output_error(2) < output_error(0)


def drifted(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, inputs as they were, and inputs that earlier rounding shrank and disturbed: (tokens, m) bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(30, 48, generator=generator)
    X0 = torch.randn(400, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    X0 += 0.5 * torch.randn(400, 48, generator=generator)
    return W, X0.bfloat16(), (0.9 * X0 + 0.2 * torch.randn(400, 48, generator=generator)).bfloat16()


def test_the_moments_of_drift_are_those_of_a_plain_sum():
    _, X0, X = drifted(0)
    found = _drift([X0[:150], X0[150:]], [X[:150], X[150:]])
    expected = (X0.double() - X.double()).T @ X.double()
    assert (found - expected).norm() < 0.005 * expected.norm()  # the products are rounded to bfloat16


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("carried", [150, 400])
def test_error_propagation_solves_for_the_least_squares_weights(carried, act_order):
    W, X0, X = drifted(1)
    H, first = X.float().T @ X.float(), X[:carried].float()
    seen, drift = first.T @ first, (X0[:carried].float() - first).T @ first
    damped = seen.double() + 0.01 * seen.diagonal().mean() * torch.eye(48)
    target = (W.double() + W.double() @ drift.double() @ torch.linalg.inv(damped)).float()
    moments = Moments(H, drift, None if carried == len(X) else seen)
    found = solve(W, moments, INT4, 0.01, search=True, act_order=act_order)
    expected = solve(target, Moments(H), INT4, 0.01, search=True, act_order=act_order)
    assert (found.codes != expected.codes).float().mean() < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_error_propagation_brings_outputs_nearer_to_those_of_the_unquantized_model(seed):
    W, X0, X = drifted(seed)
    H, drift = X.float().T @ X.float(), (X0.float() - X.float()).T @ X.float()

    def output_error(moments: Moments) -> float:
        Q = solve(W, moments, INT4, 0.01, search=True).decode()
        return float((X0.float() @ W.T - X.float() @ Q.T).norm())

    without, half, whole = (output_error(Moments(H, d)) for d in (None, drift / 2, drift))
    assert whole < half < without


def test_error_propagation_reads_the_first_tokens_alone_where_these_suffice(monkeypatch):
    windows = [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
    solved: list[Moments] = []
    monkeypatch.setattr(gptq, "solve", lambda W, moments, *rest: solved.append(moments) or solve(W, moments, *rest))

    def first(calibration: list[torch.Tensor], carried: int) -> tuple[Moments, Moments]:
        solved.clear()
        monkeypatch.setattr(gptq, "CARRIED", carried)
        step("quantize.gptq")(encoding="int4", group_size=16).apply(tiny_model(), Context(0, calibration))
        return solved[0], solved[1]  # of the first attention's inputs, and of its output's

    all_in, _ = first(windows, 28)
    half_in, half_out = first(windows, 1)
    less_in, less_out = first(windows[:8], 28)
    assert all_in.seen is None and less_in.seen is None and less_out.seen is None
    assert torch.equal(half_in.H, all_in.H) and torch.equal(half_in.seen, less_in.H)
    assert not half_in.drift.any() and half_out.drift.any()
    assert half_out.seen.trace() < 0.7 * half_out.H.trace()


@pytest.mark.parametrize(("head", "widest"), [(8, 32), (32, 128)])
def test_error_propagation_reads_so_many_tokens_per_channel_of_its_widest_input(monkeypatch, head, widest):
    asked: list[int] = []
    monkeypatch.setattr(blocks, "walk", lambda *_, originals, **__: asked.append(originals) or iter(()))
    for share in (0.5, 0.0):
        chosen = step("quantize.gptq")(encoding="int4", group_size=16, error_propagation=share)
        chosen.apply(tiny_model(head_dim=head), Context(0))
    assert asked == [28 * widest, 0]


def test_groups_wider_than_a_run_of_columns_are_solved_alike():
    W, H = problem(4, n=6, m=288, tokens=600)
    wide = solve(W, Moments(H), Encoding("int4", None), 0.01, search=False)
    assert wide.scales.shape == (6, 1)
    expected = slow_gptq(W, H, wide.scales, 288, 0.01)
    assert (wide.codes.double() != expected).float().mean() < 0.01


def test_gptq_keeps_pruned_weights_at_zero():
    W, H = problem(3)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    for symmetric in (True, False):
        found = solve(W * mask, Moments(H), Encoding("int4", 16, symmetric), 0.01, search=True, mask=mask)
        assert not found.decode()[~mask].any()
        assert found.decode()[mask].any()


def test_a_dead_channel_becomes_zero():
    W, H = problem(5)
    H[7], H[:, 7] = 0.0, 0.0
    assert not solve(W, Moments(H), INT4, 0.01, search=True).decode()[:, 7].any()


def test_options_of_gptq_change_what_they_name():
    windows = [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(8)]

    def codes(**options) -> torch.Tensor:
        model = tiny_model()
        step("quantize.gptq")(encoding="int4", group_size=16, **options).apply(model, Context(0, windows))
        return model.encoded["model.layers.1.mlp.down_proj.weight"].codes

    plain = codes()
    assert torch.equal(plain, codes(error_propagation=0.5))
    assert not torch.equal(plain, codes(error_propagation=0.0))
    assert not torch.equal(plain, codes(act_order=True))
    assert not torch.equal(plain, codes(static_groups=True))
    assert torch.equal(codes(act_order=True), codes(act_order=True, static_groups=True))
    assert not torch.equal(plain, codes(refinement=1))
    for refused in ({"error_propagation": 1.5}, {"error_propagation": float("nan")}):
        with pytest.raises(ValidationError):
            step("quantize.gptq")(**refused)


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


def slow_percentile(W: torch.Tensor, encoding: Encoding, percentile: float) -> torch.Tensor:
    """What integer codes decode to, weight by weight in float64: numpy's percentiles are the range of each group."""
    low, high = encoding.code_range
    size, tail = encoding.group_size or W.shape[1], (100 - percentile) / 2
    found = torch.empty(W.shape, dtype=torch.float64)
    for i, row in enumerate(W.double().tolist()):
        for start in range(0, len(row), size):
            group = row[start : start + size]
            least, most = np.percentile(group, [tail, 100 - tail])
            zero = 0
            if encoding.symmetric:
                top = least if -least >= most else most
                scale = top / (low if low < -high else high)
            else:
                least, most = min(least, 0.0), max(most, 0.0)
                scale = (most - least) / (high - low)
            scale = float(np.float16(scale))
            if not encoding.symmetric:
                zero = min(max(round(low - least / scale), low), high)
            for j, w in enumerate(group):
                code = min(max(round(w / scale) + zero, low), high)
                found[i, start + j] = (code - zero) * scale
    return found


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percentile", [50.0, 93.75, 99.9])
def test_a_percentile_is_the_range_of_each_group(name, symmetric, percentile):
    W, _ = problem(3)
    W[:, 5] *= 20.0
    encoding = Encoding(name, 16, symmetric)
    found = round_to_nearest("w", W, encoding, False, percentile=percentile)
    expected = slow_percentile(W, encoding, percentile)
    # float32 against float64: a weight on the edge between two codes may fall on either side
    assert (~torch.isclose(found.decode().double(), expected, rtol=1e-6, atol=0)).float().mean() < 0.01


@pytest.mark.parametrize("encoding", [Encoding("int4", 32), Encoding("nf4", 32), Encoding("iq4_nl", 32)])
def test_clipping_outliers_spares_the_rest(encoding):
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    W[:, ::32] = 40.0  # one of each group
    rest = torch.ones(64, dtype=torch.bool)
    rest[::32] = False
    errors = [
        (round_to_nearest("w", W, encoding, False, percentile=p).decode() - W)[:, rest].square().mean()
        for p in (100.0, 93.0)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_the_step_clips_every_tensor_and_still_sees_what_is_not_finite():
    model, plain = tiny_model(), tiny_model()
    step("quantize.rtn")(group_size=16, range="percentile", percentile=90).apply(model, Context(seed=0))
    for name, held in model.encoded.items():
        expected = round_to_nearest(name, plain.parameter(name).detach(), held.encoding, False, percentile=90.0)
        assert torch.equal(held.codes, expected.codes) and torch.equal(held.scales, expected.scales)
    with torch.no_grad():
        plain.parameter("model.layers.0.mlp.up_proj.weight")[1, 1] = float("inf")  # a clamp would hide it
    with pytest.raises(NumericalError, match="layers.0.mlp.up_proj.weight: non-finite weights"):
        step("quantize.rtn")(group_size=16, range="percentile", percentile=80).apply(plain, Context(seed=0))


@pytest.mark.parametrize(
    "fields", [{"range": "percentile"}, {"percentile": 99.0}, {"range": "mse", "percentile": 99.0}]
)
def test_a_percentile_and_its_range_go_together(fields):
    with pytest.raises(ValidationError, match="expected both, as in range: percentile, percentile: 99.9"):
        step("quantize.rtn")(**fields)


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
