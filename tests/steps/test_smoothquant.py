"""SmoothQuant: the paper's factors, int8 products as they run, and outliers that no longer hurt."""

import copy
import json

import pytest
import torch

from compress import artifact, sealing
from compress.encodings import Encoding
from compress.errors import CompressError, NumericalError, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.divergence import divergence
from compress.numerics.products import working_products
from compress.plugin import step
from compress.rounding import InputRounding
from compress.steps.quantize.smoothquant import output_error, smoothing
from tests.tiny import tiny_model

WINDOW = [list(range(3, 60)), [250, 9, 9, 17]]
GAIN = "model.layers.{}.{}.weight"


def windows(count: int = 8) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def with_outliers(factor: float) -> Model:
    """The tiny model with two loud channels behind every norm: gains up, columns down, the same function."""
    model = tiny_model()
    with torch.no_grad():
        for block in range(model.facts.layers):
            for source, readers in model.facts.folds(block):
                if "norm" in source:
                    model.parameter(f"{source}.weight")[[3, 17]] *= factor
                    for reader in readers:
                        model.parameter(f"{reader}.weight")[:, [3, 17]] /= factor
    model.touch()
    return model


def kl(a: Model, b: Model) -> float:
    pairs = zip([x.clone() for x in a.logits(WINDOW)], b.logits(WINDOW))
    return torch.cat([divergence(p, q).kl for p, q in pairs]).mean().item()


def apply(model: Model, calibration: list[torch.Tensor] | None = None, **fields) -> Context:
    context = Context(seed=0, calibration=windows() if calibration is None else calibration)
    step("quantize.smoothquant")(embeddings=None, **fields).apply(model, context)
    return context


def test_factors_are_the_papers():
    x, w = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])
    assert smoothing(x, w, 0.5).tolist() == [4.0, 0.5, 1.0]  # silent inputs count as 1, absent weights as 1
    assert smoothing(x, w, 1.0).tolist() == [16.0, 1.0, 1.0]
    assert smoothing(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def reference(model: Model, alpha: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Int8 weights of the first block and static scales of its inputs, by plain float64 loops."""
    caught: dict[str, list[torch.Tensor]] = {}
    linears = {n: model.module.get_submodule(n) for n in model.facts.linears if ".0." in n}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: caught.setdefault(n, []).append(a[0].float().flatten(0, -2)))
        for n, m in linears.items()
    ]
    with torch.inference_mode(), working_products():  # as the walk over blocks computes
        model.module(input_ids=torch.stack(windows()))
    for hook in hooks:
        hook.remove()
    inputs = {n: torch.cat(x).double() for n, x in caught.items()}
    weights = {n: m.weight.detach().double() for n, m in linears.items()}
    for source, readers in model.facts.folds(0):
        for j in range(inputs[readers[0]].shape[1]):
            largest = max(float(inputs[readers[0]][:, j].abs().max()), 1e-30)
            heaviest = max(float(weights[n][:, j].abs().max()) for n in readers)
            s = largest**alpha / heaviest ** (1 - alpha)
            for n in readers:
                weights[n][:, j] *= s
                inputs[n][:, j] /= s
            if source in weights:
                weights[source][j] /= s
    coded = {}
    for n, W in weights.items():
        scales = (W.abs().amax(1, keepdim=True) / 127).half().double()
        coded[n] = (W / scales).round().clamp(-127, 127)
    return coded, {n: float(x.abs().max()) / 127 for n, x in inputs.items()}


def test_the_step_equals_a_plain_version():
    model = with_outliers(30.0)
    codes, scales = reference(model, 0.6)
    apply(model, alpha=0.6, activations="static")
    assert len(codes) == 7
    for name, expected in codes.items():
        held = model.encoded[f"{name}.weight"]
        assert held.encoding == Encoding("int8") and held.scales.shape[1] == 1
        rounded = held.codes * held.scales.sign()  # ours are signed, so that the largest weight is positive in codes
        assert (rounded == expected).float().mean() > 0.99, name  # float32 against float64, on an edge
        assert (rounded - expected).abs().max() <= 1, name
        assert model.inputs[name].scale == pytest.approx(scales[name], rel=1e-5), name


@pytest.mark.parametrize("activations", ["dynamic", "static", "block"])
def test_smoothing_takes_the_harm_out_of_outliers(activations):
    original, found = with_outliers(300.0), {}
    assert kl(tiny_model(), original) < 1e-6  # planting them changed no function
    for alpha in (None, 0.5, "search"):
        model = with_outliers(300.0)
        if alpha is None:  # the same int8 weights and inputs, without smoothing
            step("quantize.rtn")(encoding="int8", group_size="channel", embeddings=None).apply(model, Context(seed=0))
            peak = _peaks(original) if activations == "static" else {}
            for name in model.facts.linears:
                model.round_inputs(name, InputRounding(activations, peak.get(name)))
        else:
            apply(model, alpha=alpha, activations=activations)
        found[alpha] = kl(original, model)
    assert found[0.5] < 0.1 * found[None] and found["search"] < 0.1 * found[None], found


def _peaks(model: Model) -> dict[str, float]:
    """The largest input of each linear / 127."""
    found: dict[str, float] = {}

    def look(name: str, x: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(x.abs().max() / 127))

    hooks = [
        model.module.get_submodule(n).register_forward_pre_hook(lambda _, a, n=n: look(n, a[0]))
        for n in model.facts.linears
    ]
    list(model.logits([w.tolist() for w in windows()]))
    for hook in hooks:
        hook.remove()
    return found


def test_search_errs_no_more_than_any_alpha_it_tried():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 32, generator=generator) * torch.logspace(-1, 2, 32)
    W = torch.randn(16, 32, generator=generator)
    dynamic = InputRounding("dynamic")
    errors = [
        output_error(W, smoothing(X.abs().amax(0), W.abs().amax(0), i / 10), X, Encoding("int8"), dynamic)
        for i in range(11)
    ]
    plain = output_error(W, torch.ones(32), X, Encoding("int8"), dynamic)
    assert min(errors) < 0.5 * plain


def test_what_is_kept_reads_floats_and_is_not_rounded():
    model = tiny_model()
    apply(model, keep={"*.down_proj": "fp16", "*.o_proj": "int8"})
    kept = {name for name in model.facts.linears if name.endswith(("down_proj", "o_proj"))}
    assert set(model.inputs) == set(model.facts.linears) - kept and kept
    assert {str(model.encoded[f"{n}.weight"].encoding) for n in kept} == {"fp16", "int8 per channel"}


def test_rounding_survives_saving_and_is_part_of_what_the_model_is(tmp_path):
    model, floats = tiny_model(), tiny_model()
    apply(model, activations="static")
    for name, tensor in model.encoded.items():
        floats.store(name, copy.deepcopy(tensor))
    assert model.digest != floats.digest and "int8 inputs per tensor" in model.compute
    artifact.save(model, tmp_path / "a")
    back = artifact.load(tmp_path / "a")
    assert back.inputs == model.inputs and back.digest == model.digest
    for x, y in zip(list(back.logits(WINDOW)), model.logits(WINDOW)):
        assert torch.equal(x, y)
    shown = artifact.encodings(tmp_path / "a")["model.layers.0.mlp.up_proj"]
    assert shown == "int8 per channel, int8 inputs per tensor"
    facts = json.loads((tmp_path / "a" / artifact.MANIFEST).read_text())
    facts["rounding"]["inputs"]["model.layers.0.mlp.up_proj"]["scale"] *= 2
    (tmp_path / "a" / artifact.MANIFEST).unlink()
    sealing.write(tmp_path / "a", {k: v for k, v in facts.items() if k != sealing.SEAL})
    with pytest.raises(CompressError, match="not those that were saved"):
        artifact.load(tmp_path / "a")


def test_bad_input_is_refused_with_its_name():
    model = tiny_model()
    with pytest.raises(RecipeError, match=r"alpha=1.5; expected a number from 0 to 1"):
        step("quantize.smoothquant")(alpha=1.5).check(model.facts)
    apply(model)
    with pytest.raises(CompressError, match=r"inputs are rounded already"):
        model.round_inputs("model.layers.0.mlp.up_proj", InputRounding("dynamic"))
    silent = tiny_model()
    with torch.no_grad():
        silent.parameter(GAIN.format(0, "input_layernorm")).zero_()
    with pytest.raises(NumericalError, match=r"q_proj: its inputs reach 0.0 on the calibration data"):
        apply(silent, activations="static")
