"""What quantization says of weights and calibration data that are not as they should be."""

import pytest
import torch

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from tests.tiny import tiny_model

UP = "model.layers.1.mlp.up_proj"
CALIBRATED = ["awq", "gptq", "smoothquant"]
METHODS = [*CALIBRATED, "hqq", "rtn"]
FIELDS = {
    "awq": {"group_size": 16, "alphas": 2},
    "gptq": {"group_size": 16},
    "hqq": {"group_size": 16},
    "ggml": {"type": "q4_0"},
}


def context(windows: int = 8, length: int = 32) -> Context:
    generator = torch.Generator().manual_seed(0)
    return Context(seed=0, calibration=[torch.randint(0, 256, (length,), generator=generator) for _ in range(windows)])


def apply(method: str, model, given: Context) -> Context:
    fields = FIELDS.get(method, {"group_size": 16} if method == "rtn" else {})
    step(f"quantize.{method}")(**fields).apply(model, given)
    return given


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_non_finite_weights_are_refused_with_the_layer(method, value):
    model = tiny_model()
    with torch.no_grad():
        model.parameter(f"{UP}.weight")[3, 5] = value
    # a method that reads calibration may meet what they do to the states before it meets them
    with pytest.raises(NumericalError, match=r"model\.layers\.1[.:]"):
        apply(method, model, context())
    assert f"{UP}.weight" not in model.encoded


@pytest.mark.parametrize("method", CALIBRATED)
def test_non_finite_states_are_refused_with_the_block(method):
    model = tiny_model()
    with torch.no_grad():
        model.parameter("model.layers.0.self_attn.v_proj.weight").mul_(1e38)
        model.parameter("model.layers.0.self_attn.o_proj.weight").mul_(1e38)
    with pytest.raises(NumericalError, match=r"model\.layers\.0"):
        apply(method, model, context())


KEPT = {"group_size": 16, "keep": {"*.up_proj": "fp32"}}  # no scale fits weights of 1e20


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("quantize.awq", {**KEPT, "alphas": 2}),
        ("quantize.gptq", KEPT),
        ("prune.sparsegpt", {"sparsity": 0.5}),
        ("prune.neurons", {"fraction": 0.5, "round_to": 16}),
        ("prune.layers", {"count": 1, "update": "stream"}),
    ],
)
def test_a_non_finite_hessian_names_the_layer(name, fields):
    model = tiny_model(num_hidden_layers=3)
    with torch.no_grad():  # the states stay as they are
        model.parameter("model.layers.1.mlp.up_proj.weight").mul_(1e20)
        model.parameter("model.layers.1.mlp.down_proj.weight").mul_(1e-20)
    with pytest.raises(NumericalError, match=r"^model\.layers\.1\.mlp\.down_proj: non-finite Hessian; its inputs"):
        step(name)(**fields).apply(model, context())


@pytest.mark.parametrize(
    ("name", "fields", "norm", "readers", "told"),
    [
        ("quantize.gptq", {"group_size": 16, "embeddings": "int4"}, "model.norm", ["lm_head"], "lm_head.weight"),
        ("prune.hidden", {"fraction": 0.5, "round_to": 16}, "model.norm", ["lm_head"], "model.norm"),
        (
            "prune.hidden",
            {"fraction": 0.5, "round_to": 16},
            "model.layers.1.post_attention_layernorm",
            ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"],
            "model.layers.1.post_attention_layernorm",
        ),
    ],
)
def test_a_non_finite_hessian_behind_a_norm_names_it_or_its_reader(name, fields, norm, readers, told):
    model = tiny_model()
    with torch.no_grad():
        model.parameter(f"{norm}.weight").mul_(1e20)
        for reader in readers:
            model.parameter(f"{reader}.weight").mul_(1e-20)
    with pytest.raises(NumericalError, match=rf"^{told}: non-finite Hessian"):
        step(name)(**fields).apply(model, context())


@pytest.mark.parametrize("encoding", ["int4", "nf4"])
def test_a_channel_that_is_all_but_silent_is_not_scaled_beyond_float16(encoding):
    model = tiny_model()
    with torch.no_grad():
        model.parameter("model.layers.1.input_layernorm.weight")[3] = 1e-14
    step("quantize.awq")(group_size=16, encoding=encoding).apply(model, context())
    gains = model.parameter("model.layers.1.input_layernorm.weight")
    assert gains.max() / gains.min() < 1e13  # which was 1e14: by another α than 0 nevertheless
    assert "model.layers.1.self_attn.q_proj.weight" in model.encoded


def loud() -> Model:
    """A model whose function is as it was, and one of whose matrices no scale in float16 fits."""
    model = tiny_model()
    with torch.no_grad():
        model.parameter(f"{UP}.weight").mul_(1e10)
        model.parameter("model.layers.1.mlp.down_proj.weight").mul_(1e-10)
    return model


def test_weights_that_no_scale_fits_are_named():
    with pytest.raises(
        NumericalError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: a scale of .* does not fit float16"
    ):
        step("quantize.awq")(alphas=3, group_size=16).apply(loud(), context())


def test_smoothing_may_make_weights_fit():
    model = loud()
    step("quantize.smoothquant")(alpha="search").apply(model, context())
    assert model.encoded[f"{UP}.weight"].decode().abs().max() < 127 * 65504


@pytest.mark.parametrize("method", [*CALIBRATED, "ggml"])
def test_silent_channels_are_counted(method):
    model = tiny_model()
    with torch.no_grad():
        model.parameter("model.layers.0.input_layernorm.weight")[[3, 8, 20]] = 0.0
    notes = [note for note in apply(method, model, context()).notes if "layers.0.self_attn.q_proj" in note]
    assert len(notes) == 1 and " 3 of 32 " in notes[0] and "input channels are" in notes[0], notes
    assert not [note for note in apply(method, tiny_model(), context()).notes if "channels are" in note]


def test_silent_channels_of_the_head_are_counted():
    model, given = tiny_model(), context()
    with torch.no_grad():
        model.parameter("model.norm.weight")[[3, 8, 20]] = 0.0
    step("quantize.gptq")(group_size=16, embeddings="int4").apply(model, given)
    assert given.notes == ["lm_head: 3 of 32 input channels are silent on the calibration data"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_fewer_tokens_than_channels_are_told_with_both_numbers(method):
    notes = apply(method, tiny_model(), context(windows=1, length=20)).notes
    assert "model.layers.0.self_attn.q_proj: 20 calibration tokens for 32 input channels" in notes
    assert "model.layers.0.mlp.down_proj: 20 calibration tokens for 64 input channels" in notes
    assert len([note for note in notes if "calibration tokens" in note]) == 4  # of the first block alone


@pytest.mark.parametrize("method", CALIBRATED)
def test_no_calibration_is_refused(method):
    with pytest.raises(RecipeError, match="the calibration set holds no window"):
        apply(method, tiny_model(), Context(seed=0))
