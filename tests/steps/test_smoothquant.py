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
from compress.plugin import step
from compress.rounding import InputRounding
from compress.steps.quantize.smoothquant import output_error, smoothing
from tests.inputs import inputs_of, windows
from tests.tiny import tiny_model

WINDOW = [list(range(3, 60)), [250, 9, 9, 17]]
GAIN = "model.layers.{}.{}.weight"


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
    context = Context(seed=0, calibration=windows(8) if calibration is None else calibration)
    step("quantize.smoothquant")(embeddings=None, **fields).apply(model, context)
    return context


def test_factors_are_the_papers():
    x, w = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])
    assert smoothing(x, w, 0.5).tolist() == [4.0, 0.5, 1.0]  # silent inputs count as 1, absent weights as 1
    assert smoothing(x, w, 1.0).tolist() == [16.0, 1.0, 1.0]
    assert smoothing(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def reference(model: Model, block: int, alpha: float | str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Int8 weights of a block and static scales of its inputs, in float64; α is searched on the first 512 tokens."""
    names = [name for name in model.facts.linears if f".{block}." in name]
    inputs = inputs_of(model, names, windows(20))
    weights = {n: model.parameter(f"{n}.weight").detach().double() for n in names}
    for source, readers in model.facts.folds(block):
        X, stacked = inputs[readers[0]], torch.cat([weights[n] for n in readers])
        tried = [_smoothing(X, stacked, i / 10) for i in range(11)] if alpha == "search" else []
        best = torch.ones(X.shape[1]).double() if tried else _smoothing(X, stacked, alpha)
        for s in tried:
            best = min(best, s, key=lambda s: _output_error(X, stacked, s))
        for n in readers:
            weights[n], inputs[n] = weights[n] * best, inputs[n] / best
        if source in weights:
            weights[source] = weights[source] / best.unsqueeze(1)
    return {n: _int8(W)[0] for n, W in weights.items()}, {n: float(x.abs().max()) / 127 for n, x in inputs.items()}


def _smoothing(X: torch.Tensor, W: torch.Tensor, alpha: float) -> torch.Tensor:
    return X.abs().amax(0) ** alpha / W.abs().amax(0) ** (1 - alpha)


def _int8(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scale of each row."""
    scales = (W.abs().amax(1, keepdim=True) / 127).half().double()
    return (W / scales).round().clamp(-127, 127), scales


def _output_error(X: torch.Tensor, W: torch.Tensor, s: torch.Tensor) -> float:
    """What the linear errs by, with weights and static inputs rounded."""
    codes, scales = _int8(W * s)
    scale = (X / s).abs().max() / 127
    rounded = (X[:512] / s / scale).round() * scale
    return float((rounded @ (codes * scales).T - X[:512] @ W.T).square().sum())


@pytest.mark.parametrize("working", ["float32"], indirect=True)
@pytest.mark.parametrize("alpha", [0.6, "search"])
def test_every_block_equals_a_plain_version_fed_by_the_rounded_ones_before_it(alpha, working):
    model, rounded = with_outliers(30.0), with_outliers(30.0)
    apply(rounded, windows(20), alpha=alpha, activations="static")
    for block in (0, 1):
        codes, scales = reference(model, block, alpha)
        assert len(codes) == 7
        for name, expected in codes.items():
            held = rounded.encoded[f"{name}.weight"]
            assert held.encoding == Encoding("int8") and held.scales.shape[1] == 1
            found = held.codes * held.scales.sign()  # ours are signed, so that the largest weight is positive in codes
            assert (found == expected).float().mean() > 0.99, name  # float32 against float64, on an edge
            assert (found - expected).abs().max() <= 1, name
            assert rounded.inputs[name].scale == pytest.approx(scales[name], rel=1e-5), name
        model.module.model.layers[block] = rounded.module.model.layers[block]


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
    list(model.logits([w.tolist() for w in windows(8)]))
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
