"""Layer errors: against a slow plain version, where they arise, and on the real model."""

import copy
import math
import time

import pytest
import torch

from compress.errors import RecipeError
from compress.inspection import layer_errors
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from tests.tiny import tiny_model

WINDOWS = [torch.arange(5, 37), torch.arange(60, 92)]


@pytest.fixture(scope="module")
def baseline():
    return tiny_model()


def changed(model, name, factor=None, noise=0.0):
    """A copy with one linear's weight scaled, or made noisy."""
    twin = Model(copy.deepcopy(model.module), model.tokenizer)
    with torch.no_grad():
        weight = twin.parameter(f"{name}.weight")
        if factor is not None:
            weight.mul_(factor)
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std() * noise)
    twin.touch()
    return twin


def plain_outputs(model, name, windows):
    """Outputs of one linear in float64, with every matrix product done anew: no hook, no batch."""
    inputs = []
    module = copy.deepcopy(model.module).double()
    linear = module.get_submodule(name)
    inner = linear.forward
    linear.forward = lambda x: inputs.append(x[0]) or inner(x)
    with torch.no_grad():
        for window in windows:
            module(input_ids=window[None])
    return torch.cat(inputs) @ linear.weight.detach().T


def test_errors_are_those_of_a_plain_computation_on_own_inputs(baseline):
    model = changed(baseline, "model.layers.0.mlp.up_proj", noise=0.3)
    found = layer_errors(model, baseline, WINDOWS)
    assert list(found) == list(baseline.facts.linears) and len(found) == 14
    for name, error in found.items():
        y, other = (plain_outputs(m, name, WINDOWS) for m in (baseline, model))
        expected = float((y - other).square().sum() / y.square().sum())
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-12), name


def test_errors_arise_where_the_change_is_and_reach_what_follows(baseline):
    found = layer_errors(changed(baseline, "model.layers.1.self_attn.v_proj", noise=0.1), baseline, WINDOWS)
    for name, error in found.items():
        layer, part = int(name.split(".")[2]), name.split(".")[-1]
        untouched = layer == 0 or part in ("q_proj", "k_proj")
        assert (error == 0) == untouched, name
    assert 0.002 < found["model.layers.1.self_attn.v_proj"] < 0.05  # of noise: 0.1², less what inputs tell apart


def test_a_scaled_linear_errs_by_the_square_of_what_is_missing(baseline):
    name = "model.layers.1.mlp.down_proj"  # nothing before it differs
    assert layer_errors(changed(baseline, name, 0.9), baseline, WINDOWS)[name] == pytest.approx(0.01, rel=1e-4)
    assert layer_errors(changed(baseline, name, 0.0), baseline, WINDOWS)[name] == 1.0
    silent = changed(baseline, name, 0.0)
    assert layer_errors(silent, silent, WINDOWS)[name] == 0.0
    assert layer_errors(baseline, silent, WINDOWS)[name] == math.inf


def test_nothing_is_left_behind_and_windows_may_differ_in_length(baseline):
    seen = []
    model = changed(baseline, "model.layers.0.mlp.up_proj", noise=0.3)
    windows = [WINDOWS[0], WINDOWS[1][:10]]
    found = layer_errors(model, baseline, windows, lambda label, fraction: seen.append((label, fraction)))
    assert seen == [("layers", 0.5), ("layers", 1.0)]
    assert all(0 <= error < math.inf for error in found.values())
    for one in (model, baseline):
        assert not any(module._forward_hooks for module in one.module.modules())
    with pytest.raises(RecipeError, match="need a window"):
        layer_errors(model, baseline, [])


def test_what_is_not_finite_is_not_hidden(baseline):
    found = layer_errors(changed(baseline, "model.layers.0.mlp.up_proj", math.nan), baseline, WINDOWS)
    assert math.isnan(found["model.layers.0.mlp.up_proj"]) and math.isnan(found["model.layers.1.mlp.down_proj"])
    assert found["model.layers.0.self_attn.q_proj"] == 0.0


def test_real_model_loses_more_at_fewer_bits_and_within_seconds(real_model, real_baseline):
    ids = torch.tensor(real_baseline.encode(__doc__ * 40)[:512])
    windows = list(ids.view(4, 128))
    errors = {}
    for encoding in ("int8", "int4"):
        model = real_model()
        step("quantize.rtn")(encoding=encoding, group_size=32).apply(model, Context(seed=0))
        started = time.monotonic()
        errors[encoding] = layer_errors(model, real_baseline, windows)
        assert time.monotonic() - started < 20  # 3.3 s on one thread
    assert len(errors["int8"]) == 210
    assert all(0 < errors["int8"][name] < errors["int4"][name] / 20 for name in errors["int8"])  # 2⁸ in theory
    assert max(errors["int4"].values()) < 1
