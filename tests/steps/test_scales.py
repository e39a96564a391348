"""Scale distillation: codes never move, what is measured is what is stored, and the gradient is the plain one."""

import pytest
import torch
from pydantic import ValidationError

from compress import artifact
from compress.encodings import EncodedTensor
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.scaled_linear import ScaledLinear
from compress.plugin import step
from compress.steps.distill._coded import learnable, rescaled
from compress.steps.distill._network import Network
from compress.steps.distill._training import Ruler
from compress.steps.quantize.scales import Scales, scaled
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"tokens": 1024, "batch": 4, "checks": 2, "learning_rate": 1e-2, "selection_tokens": 128}
STARTS = [
    ("quantize.rtn", {"encoding": "int3", "group_size": 16}),
    ("quantize.rtn", {"encoding": "int3", "group_size": 16, "symmetric": False}),
    ("quantize.rtn", {"encoding": "nf4", "group_size": 16, "keep": {"*.o_proj": "fp16", "*.0.*.up_proj": "fp32"}}),
    ("quantize.rtn", {"encoding": "int2", "group_size": "channel", "embeddings": None}),
]


def windows(count: int, seed: int, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def context(teacher: Model | None = None, seed: int = 0, **fields) -> Context:
    teacher = teacher or tiny_model()
    data = {"calibration": windows(16, 1), "selection": windows(4, 2), **fields}
    return Context(seed=seed, teacher=lambda: teacher, **data)


def quantized(name: str = "quantize.rtn", fields: dict | None = None) -> Model:
    model = tiny_model()
    step(name)(**(fields or STARTS[0][1])).apply(model, Context(seed=0))
    return model


def divergence(model: Model, data: list[torch.Tensor]) -> float:
    return Ruler("test", Network(tiny_model().module, False), data).divergence(Network(model.module, False))


def norms(model: Model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.module.named_parameters() if "norm" in n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_a_weight_built_from_its_factors(dtype):
    generator = torch.Generator().manual_seed(0)
    x, V, out = (torch.randn(shape, generator=generator) for shape in ((2, 7, 48), (10, 48), (2, 7, 10)))
    theta = 0.3 * torch.randn(10, 3, generator=generator)
    plain_x, plain_theta = x.double().requires_grad_(), theta.double().requires_grad_()
    W = V.double() * plain_theta.exp().repeat_interleave(16, dim=1)
    (plain_x @ W.T * out).sum().backward()
    x.requires_grad_(), theta.requires_grad_()
    y = ScaledLinear.apply(x, W.detach().to(dtype), theta)
    assert y.dtype == dtype
    (y * out.to(dtype)).sum().backward()
    rounding = 1e-5 if dtype == torch.float32 else 2**-6  # bfloat16 has 8 bits; some products are rounded twice
    for found, plain in ((y, plain_x @ W.T), (x.grad, plain_x.grad), (theta.grad, plain_theta.grad)):
        assert (found - plain).norm() < rounding * plain.norm()
    assert theta.grad.dtype == torch.float32


def plain_gradients(model: Model, teacher: Model, data: list[torch.Tensor], T: float) -> dict[str, torch.Tensor]:
    """Of T² KL(teacher_T ‖ model_T), the mean over positions, by every gain and every θ (groups of 16)."""
    ids = torch.stack(data)
    with torch.no_grad():
        target = (teacher.module(ids).logits[:, :-1] / T).log_softmax(-1)
    said = (model.module(ids).logits[:, :-1] / T).log_softmax(-1)
    (T**2 * (target.exp() * (target - said)).sum(-1).mean()).backward()
    found = {n: p.grad for n, p in model.module.named_parameters() if "norm" in n}
    for name in learnable(model):
        W = model.parameter(name)
        found[name] = (W.grad * W.detach()).view(len(W), -1, 16).sum(-1)
    model.module.zero_grad()
    return found


@pytest.mark.parametrize("working", ["float32"], indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_the_first_step_follows_a_plain_gradient_at_the_rate_of_each(temperature, working):
    """Adam's first step is the rate against the gradient's sign; a gain's rate is in its root mean square."""
    teacher, model, data = tiny_model(), quantized(), windows(4, 1)
    for either in (teacher, model):
        with torch.no_grad():
            for i, gain in enumerate(p for n, p in either.module.named_parameters() if "norm" in n):
                gain.mul_(torch.linspace(0.5, 1.5, len(gain)) / (5 - i))
        either.touch()
    gains, coded = norms(model), learnable(model)
    wanted, other = (plain_gradients(model, teacher, data, T) for T in (temperature, 9 - temperature))
    run = context(teacher, calibration=data, selection=data)
    one = {"tokens": 128, "batch": 4, "checks": 1, "selection_tokens": 128}
    Scales(**one, learning_rate=5e-3, temperature=temperature).apply(model, run)
    assert "kept those after step 1 of 1" in run.notes[-1]
    moved = {name: (gain - model.parameter(name)) / gain.square().mean().sqrt() for name, gain in gains.items()}
    moved |= {n: (e.scales.float() / model.encoded[n].scales.float()).log() for n, e in coded.items()}
    step_, signs, others = (torch.cat([part[n].flatten() for n in wanted]) for part in (moved, wanted, other))
    assert ((step_.abs() - 5e-3).abs() < 6e-4).float().mean() > 0.99  # scales are float16, of eleven bits
    agreeing = [float((step_.sign() == part.sign()).float().mean()) for part in (signs, others)]
    assert agreeing[0] > 0.999 and agreeing[1] < 0.95, agreeing  # a gradient of next to nothing may have any sign


@pytest.mark.parametrize("name,fields", STARTS)
def test_only_scales_and_norms_learn_and_they_learn(name, fields, tmp_path):
    model, before = quantized(name, fields), quantized(name, fields)
    run = context()
    Scales(**FAST).apply(model, run)
    assert divergence(model, run.selection) < 0.97 * divergence(before, run.selection)
    assert model.encoded.keys() == before.encoded.keys()
    coded = learnable(before)
    assert len(coded) == 14 - 3 * ("keep" in fields)
    for tensor, was in before.encoded.items():
        now = model.encoded[tensor]
        assert now.encoding == was.encoding and torch.equal(now.codes, was.codes)
        assert (now.zero_points is None) == (was.zero_points is None)
        assert now.zero_points is None or torch.equal(now.zero_points, was.zero_points)
        assert torch.equal(model.parameter(tensor), now.decode())
        if tensor in coded:
            assert now.scales.dtype == torch.float16 and not torch.equal(now.scales, was.scales)
            assert torch.equal(now.scales.sign(), was.scales.sign())
        else:
            assert now.scales is None or torch.equal(now.scales, was.scales)
    changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before.parameter(n))}
    assert changed == set(coded) | set(norms(before))
    assert "KL to the baseline" in run.notes[-1] and ("3 linears have no scales" in run.notes[-1]) == ("keep" in fields)
    artifact.save(model, tmp_path / "a")
    assert artifact.load(tmp_path / "a").digest == model.digest
    assert all(
        type(model.module.get_submodule(n)).forward.__qualname__ == "Linear.forward" for n in model.facts.linears
    )
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())


def test_what_is_measured_is_what_is_stored():
    model, run = quantized(), context()
    Scales(**{**FAST, "checks": 4}).apply(model, run)
    assert "after step 0 " not in run.notes[-1]
    noted = float(run.notes[-1].split("→ ")[1].split(" ")[0])
    assert divergence(model, run.selection) == pytest.approx(noted, abs=6e-5)  # the note has four digits


def test_the_student_that_learns_decodes_rounded_scales():
    model = quantized()
    coded = learnable(model)
    model.module.requires_grad_(False)
    student = Network(model.module, learns=True)
    window = windows(1, 5)[0]
    with torch.no_grad(), scaled(model, student, coded) as (thetas, settle):
        start = student.hidden(window).clone()
        for i, theta in enumerate(thetas.values()):
            theta.add_(0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(i)))
        assert torch.equal(student.hidden(window), start)  # decoded anew only when settled
        settle()
        moved = student.hidden(window).clone()
        for name, theta in thetas.items():
            tensor = rescaled(coded[name], theta)
            assert (tensor.scales.float() / coded[name].scales.float() - theta.exp()).abs().max() < 2e-3  # float16
    assert all(torch.equal(model.parameter(name), tensor.decode()) for name, tensor in coded.items())  # as before
    for name, theta in thetas.items():
        model.store(name, rescaled(coded[name], theta))
    assert not torch.equal(moved, start)
    assert torch.equal(Network(model.module, learns=False).hidden(window), moved)


def test_runs_repeat_and_follow_the_seed():
    digests = []
    for seed in (0, 0, 1):
        model = quantized()
        Scales(**FAST).apply(model, context(seed=seed))
        digests.append(model.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_harmful_learning_rate_ends_early_and_keeps_the_start():
    model, before, run = quantized(), quantized(), context()
    Scales(**{**FAST, "tokens": 2048, "checks": 8, "learning_rate": 2.0}).apply(model, run)
    assert model.digest == before.digest
    assert "after step 0 of 16, stopped at 4 (nothing better than the start was found)" in run.notes[-1]


def test_pruned_weights_stay_zero():
    model = tiny_model()
    step("prune.magnitude")(sparsity=0.4).apply(model, Context(seed=0))
    step("quantize.rtn")(encoding="int3", group_size=16, symmetric=False).apply(model, Context(seed=0))
    before = model.digest
    Scales(**FAST).apply(model, context())
    assert model.digest != before and model.masks
    assert all(not model.parameter(name)[~mask].any() for name, mask in model.masks.items())


def test_a_failure_on_the_way_leaves_everything_as_it_was():
    def fail(label: str, fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    model, before = quantized(), quantized()
    with pytest.raises(KeyboardInterrupt):
        Scales(**FAST).apply(model, context(progress=fail))
    assert model.digest == before.digest and "forward" not in vars(
        model.module.get_submodule(next(iter(model.facts.linears)))
    )


def test_a_scale_beyond_float16_is_an_error():
    model = quantized()
    name = "model.layers.1.mlp.down_proj.weight"
    old = model.encoded[name]
    model.store(name, EncodedTensor(old.encoding, old.codes.clamp(0, 1), torch.full_like(old.scales, 65504.0)))
    digest = model.digest
    with pytest.raises(NumericalError, match="quantize.scales: "):
        Scales(**{**FAST, "learning_rate": 0.5}).apply(model, context())
    assert model.digest == digest


@pytest.mark.parametrize("start", [None, {"encoding": "mxfp4"}])
def test_without_scales_there_is_nothing_to_learn(start):
    model = tiny_model()
    if start:
        step("quantize.rtn")(**start).apply(model, Context(seed=0))
    with pytest.raises(RecipeError, match="no linear holds codes with float16 scales; quantize before it"):
        Scales(**FAST).apply(model, context())


@pytest.mark.parametrize("missing", [{"calibration": ()}, {"selection": ()}])
def test_missing_data_are_refused(missing):
    with pytest.raises(RecipeError, match="data.calibration and data.selection"):
        Scales(**FAST).apply(quantized(), context(**missing))


@pytest.mark.parametrize("fields", [{"learning_rate": 0.0}, {"patience": 0}, {"temperature": -1.0}, {"train": "all"}])
def test_impossible_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        Scales(**fields)


# --- the real model ---------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_few_steps_heal_a_rounded_real_model_on_held_out_text(real_baseline, real_model):
    from compress.data import documents

    ids = [i for document in documents("wiki")[:200] for i in real_baseline.encode(document.text)]
    data = [torch.tensor(ids[i : i + 256]) for i in range(0, 24 * 256, 256)]
    held_out, selection, calibration = data[:4], data[4:8], data[8:]
    model, run = real_model(), context(real_baseline, calibration=calibration, selection=selection)
    step("quantize.rtn")(encoding="int4", embeddings=None).apply(model, Context(seed=0))
    ruler = Ruler("test", Network(real_baseline.module, False), held_out)
    before = ruler.divergence(Network(model.module, False))
    Scales(tokens=4096, batch=2, checks=1, selection_tokens=1024).apply(model, run)
    after = ruler.divergence(Network(model.module, False))
    assert after < 0.9 * before, (before, after, run.notes)
