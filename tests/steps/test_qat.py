"""Quantization-aware distillation: what trains is what is stored, bit for bit, and it beats rounding and GPTQ."""

import copy

import pytest
import torch
from pydantic import ValidationError

from compress import artifact
from compress.data import documents
from compress.encodings import EncodedTensor, Encoding
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from compress.steps.distill import _network as net
from compress.steps.distill._coded import Latent, latents, learnable
from compress.steps.distill._training import Ruler
from compress.steps.distill.qat import QuantizationAware, _rounded
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
# Random weights have no codes to spare: small steps.
FAST = {"tokens": 1024, "batch": 4, "checks": 2, "selection_tokens": 128, "learning_rate": 3e-3, "scale_rate": 2e-3}
STARTS = [
    ("quantize.rtn", {"encoding": "int3", "group_size": 16}),
    ("quantize.rtn", {"encoding": "int2", "group_size": 16, "symmetric": False, "keep": {"*.o_proj": "fp16"}}),
    ("quantize.gptq", {"encoding": "nf4", "group_size": 16}),
    ("quantize.rtn", {"encoding": "iq4_nl", "embeddings": None, "keep": {"*.down_proj": "int8"}}),
    ("quantize.rtn", {"encoding": "int4", "group_size": "channel", "range": "mse"}),
]


def windows(count: int, seed: int, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def context(teacher: Model | None = None, seed: int = 0, **fields) -> Context:
    teacher = teacher or tiny_model()
    data = {"calibration": windows(16, 1), "selection": windows(4, 2), **fields}
    return Context(seed=seed, teacher=lambda: teacher, **data)


def quantized(name: str, fields: dict, seed: int = 0) -> Model:
    model = tiny_model(seed)
    step(name)(**fields).apply(model, context())
    return model


def divergence(model: Model, teacher: Model, data: list[torch.Tensor]) -> float:
    ruler = Ruler("test", net.Network(teacher.module, False), data)
    return ruler.divergence(net.Network(model.module, False))


@pytest.mark.parametrize("name,fields", STARTS)
def test_a_latent_weight_rounds_to_the_codes_that_it_stands_behind(name, fields):
    model = quantized(name, fields)
    origins = {n: p.detach() for n, p in tiny_model().module.named_parameters()}
    for origin in (origins, {}, {n: p.detach() for n, p in tiny_model(1).module.named_parameters()}):
        for tensor, latent in latents(learnable(model), origin).items():
            now, start = latent.encoded(), model.encoded[tensor]
            assert torch.equal(now.codes, start.codes) and torch.equal(now.scales, start.scales)
    if name == "quantize.rtn" and fields.get("range") != "mse":  # then all but ties and clipped ones are the original
        latent = latents(learnable(model), origins)["model.layers.1.mlp.up_proj.weight"]
        W = (latent.u * latent.unit).view(64, 32)
        assert torch.isclose(W, origins["model.layers.1.mlp.up_proj.weight"], atol=1e-6).float().mean() > 0.8


@pytest.mark.parametrize("name,fields", STARTS)
def test_what_trained_is_what_is_stored_bit_for_bit(name, fields, monkeypatch, tmp_path):
    """The weights in the network's products, when the state that is kept was measured, are the stored ones."""
    seen: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    def watch(self, student):
        weights = {f"model.{n}": t.detach().clone() for n, t in student.frozen.items()}
        seen.append((weights, student.body.norm.weight.detach().clone()))
        return 1.0 / len(seen)  # the last state is the one that is kept: random weights may not get better

    monkeypatch.setattr(Ruler, "divergence", watch)
    model, before, run = quantized(name, fields), quantized(name, fields), context()
    QuantizationAware(**FAST).apply(model, run)
    weights, gain = seen[-1]
    assert len(seen) == 3 and "after step 8 of 8" in run.notes[-1]
    coded = learnable(model)
    assert len(coded) == (12 if "o_proj" in str(fields) else 14)
    changed = 0
    for tensor, held in coded.items():
        assert held.encoding == before.encoded[tensor].encoding and held.scales.dtype == torch.float16
        assert torch.equal(model.parameter(tensor), held.decode())
        assert torch.equal(weights[tensor], held.decode().to(weights[tensor].dtype)), tensor
        low, high = held.encoding.code_range
        assert low <= int(held.codes.min()) and int(held.codes.max()) <= high
        changed += int((held.codes != before.encoded[tensor].codes).sum())
    assert changed and torch.equal(model.parameter("model.norm.weight"), gain)
    for tensor in before.encoded.keys() - coded.keys():
        assert torch.equal(model.encoded[tensor].codes, before.encoded[tensor].codes)
    assert f"codes of {len(coded)} linears are others now" in run.notes[-1]
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    artifact.save(model, tmp_path / "a")
    assert artifact.load(tmp_path / "a").digest == model.digest


def test_gradients_of_weights_and_scales_come_from_every_window():
    """Two windows at once give the mean of each alone, and a move along the gradient of θ lowers the loss."""
    from compress.steps.distill._lessons import Reading

    teacher = Reading(net.Network(tiny_model().module, False), 1.0, 1.0)
    both = windows(2, 7)
    found = []
    for some in ([both[0]], [both[1]], both):
        model = quantized(*STARTS[0])
        behind = latents(learnable(model), {})
        model.module.requires_grad_(False)
        with _rounded(model, behind) as rounding:
            student = net.Network(model.module, learns=True)
            teacher.backward(student, some)
            rounding.gather()
        found.append({n: (latent.u.grad, latent.theta.grad) for n, latent in behind.items()})
    for name, gradients in found[2].items():
        for one, two, together in zip(found[0][name], found[1][name], gradients, strict=True):
            # the batches are rounded to bfloat16 apart
            assert (0.5 * (one + two) - together).norm() <= 0.02 * together.norm(), name


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_pruned_weights_stay_zero(pattern):
    model = tiny_model()
    step("prune.magnitude")(**({"pattern": pattern} if pattern else {"sparsity": 0.4})).apply(model, Context(seed=0))
    step("quantize.rtn")(encoding="int3", group_size=16, symmetric=False).apply(model, Context(seed=0))
    before = model.digest
    QuantizationAware(**FAST).apply(model, context())
    assert model.digest != before and model.masks
    assert all(not model.parameter(name)[~mask].any() for name, mask in model.masks.items())


def test_runs_repeat_and_follow_the_seed():
    digests = []
    for seed in (0, 0, 1):
        model = quantized(*STARTS[0])
        QuantizationAware(**FAST).apply(model, context(seed=seed))
        digests.append(model.digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("when", [0.3, 1.0])
def test_a_failure_on_the_way_leaves_everything_as_it_was(when):
    def fail(label: str, fraction: float) -> None:
        if fraction >= when:
            raise KeyboardInterrupt

    model, before = quantized(*STARTS[0]), quantized(*STARTS[0])
    with pytest.raises(KeyboardInterrupt):
        QuantizationAware(**FAST).apply(model, context(progress=fail))
    assert model.digest == before.digest
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before.parameter(name)) and parameter.grad is None, name


def test_an_empty_group_and_the_largest_scale_do_no_harm():
    tensor = EncodedTensor(
        Encoding("int3", 4),
        torch.tensor([[0, 0, 0, 0, 1, -4, 3, 0]], dtype=torch.int8),
        torch.tensor([[0.0, 65504.0]]).half(),
    )
    latent = Latent.behind(tensor, None)
    latent.take(torch.ones(1, 8), latent.encoded())
    assert torch.isfinite(latent.u.grad).all() and torch.isfinite(latent.theta.grad).all()
    assert torch.equal(latent.encoded().decode(), tensor.decode()) and not latent.u.grad[0, 0].any()


@pytest.mark.parametrize("start", [None, {"encoding": "mxfp4"}])
def test_without_codes_there_is_nothing_to_learn(start):
    model = tiny_model()
    if start:
        step("quantize.rtn")(**start).apply(model, Context(seed=0))
    with pytest.raises(RecipeError, match="no linear holds codes with float16 scales; quantize before it"):
        QuantizationAware(**FAST).apply(model, context())


@pytest.mark.parametrize("fields", [{"learning_rate": 0.0}, {"scale_rate": -1.0}, {"encoding": "int4"}])
def test_impossible_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        QuantizationAware(**fields)


# --- a model that has learned something -------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> tuple[Model, list[torch.Tensor], list[torch.Tensor]]:
    """A tiny model trained on the standard library's topics for some seconds; its windows, and held-out ones."""
    model = tiny_model()
    text = torch.tensor(model.encode("".join(d.text[:4000] for d in documents("pydoc"))))
    training, held_out = text[:-4096], text[-4096:]
    for parameter in model.module.parameters():
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 0.3)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=5e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(150):
        at = torch.randint(len(training) - 64, (16,), generator=generator).tolist()
        ids = torch.stack([training[a : a + 64] for a in at])
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - i / 150)
        optimizer.zero_grad()
        model.module(ids, labels=ids).loss.backward()
        optimizer.step()
    model.module.zero_grad()
    model.touch()
    order = torch.randperm(len(training) // 64, generator=generator)[:112].tolist()
    return model, [training[64 * i : 64 * i + 64] for i in order], list(held_out.split(64))


@pytest.mark.parametrize("encoding", ["int2", "int3"])
def test_it_beats_rounding_gptq_and_trained_scales_at_equal_encoding(learned, encoding):
    teacher, data, held_out = learned
    quantize = {"encoding": encoding, "group_size": 16, "embeddings": None}
    plain = {**quantize, "error_propagation": 0.0}  # the start that the bounds were measured from
    budget = {"tokens": 16384 if encoding == "int2" else 8192, "batch": 8, "selection_tokens": 1024}
    chains = {
        "gptq": [("quantize.gptq", plain)],
        "gptq, qat": [("quantize.gptq", plain), ("distill.qat", budget)],
    }
    if encoding == "int2":
        chains |= {
            "rtn": [("quantize.rtn", quantize)],
            "rtn, qat": [("quantize.rtn", quantize), ("distill.qat", budget)],
            "gptq, scales": [("quantize.gptq", plain), ("quantize.scales", budget)],
        }
    found = {}
    for label, chain in chains.items():
        model = Model(copy.deepcopy(teacher.module), teacher.tokenizer)
        for name, fields in chain:
            step(name)(**fields).apply(model, context(teacher, calibration=data[:96], selection=data[96:]))
        found[label] = divergence(model, teacher, held_out)
    # measured: 0.35 and 0.55 times GPTQ's divergence at twice the tokens
    assert found["gptq, qat"] < 0.8 * found["gptq"], found
    if encoding == "int2":
        assert found["rtn, qat"] < 0.6 * found["rtn"] and found["gptq, qat"] < 0.9 * found["gptq, scales"], found
