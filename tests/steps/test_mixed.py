"""Mixed precision: the table is the best within the budget, the method stores it, and the score means what it says."""

import pytest
import torch
from pydantic import ValidationError

from compress.encodings import Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.plugin import step
from compress.steps.distill._network import Network
from compress.steps.distill._training import Ruler
from compress.steps.quantize._fields import round_to_nearest
from compress.steps.quantize.mixed import Mixed, squares_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"group_size": 16, "target_bits": 5.5, "sensitivity_tokens": 256}


def windows(count: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (32,), generator=generator) for _ in range(count)]


def bits(model) -> float:
    stored = [model.encoded[f"{name}.weight"] for name in model.facts.linears]
    return 8 * sum(e.nominal_bytes for e in stored) / sum(e.codes.numel() for e in stored)


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "hqq"])
def test_the_method_stores_what_the_table_says(method):
    model, run = tiny_model(), Context(seed=0, calibration=windows())
    chosen = Mixed(method=method, **FAST)
    table = chosen.table(model.facts, chosen.losses(tiny_model(), run))
    chosen.apply(model, run)
    assert {n: model.encoded[f"{n}.weight"].encoding for n in model.facts.linears} == {
        n: Encoding(c, 16) for n, c in table.items()
    }
    assert len(set(table.values())) > 1 and 5.0 < bits(model) <= 5.5
    assert model.encoded["lm_head.weight"].encoding == Encoding("int8", 16)
    assert f"{bits(model):.3f} of 5.5 bits" in run.notes[-1]
    assert ", ".join(f"{list(table.values()).count(c)} linears in {c}" for c in chosen.choices) in run.notes[-1]
    alone = tiny_model()
    step(f"quantize.{method}")(group_size=16, symmetric=True, keep=dict(table)).apply(
        alone, Context(seed=0, calibration=windows())
    )
    assert alone.digest == model.digest


@pytest.mark.parametrize(
    ("tensor", "value"), [("model.layers.1.mlp.up_proj", float("nan")), ("model.norm", float("inf"))]
)
def test_non_finite_weights_are_named(tensor, value):
    model = tiny_model()
    with torch.no_grad():
        model.parameter(f"{tensor}.weight").view(-1)[5] = value
    with pytest.raises(NumericalError, match=f"^{tensor}.weight: non-finite logits on the calibration data"):
        Mixed(**FAST).apply(model, Context(seed=0, calibration=windows()))


@pytest.mark.parametrize("fields", [{"embeddings": "int5"}, {"embeddings": None}, {"symmetric": False}])
def test_the_method_gets_every_field_that_the_two_share(fields):
    model, alone = tiny_model(), tiny_model()
    chosen = Mixed(method="rtn", **FAST | {"target_bits": 6.0} | fields)
    chosen.apply(model, Context(seed=0, calibration=windows()))
    table = chosen.table(alone.facts, chosen.losses(tiny_model(), Context(seed=0, calibration=windows())))
    step("quantize.rtn")(group_size=16, keep=dict(table), **fields).apply(alone, Context(seed=0))
    assert alone.digest == model.digest and len(set(table.values())) > 1


def test_sensitivities_are_those_of_the_tokens_asked_for():
    few, all_ = (Mixed(**FAST | {"sensitivity_tokens": tokens}) for tokens in (96, 512))
    found = [
        chosen.losses(tiny_model(), Context(seed=0, calibration=data))
        for chosen, data in ((few, windows()), (few, windows()[:3]), (all_, windows()))
    ]
    assert found[0] == found[1] != found[2]


def test_squares_are_those_of_plain_gradients_token_by_token():
    """One token, so that a weight's gradient is a single outer product that autograd can square."""
    model = tiny_model()
    ids = torch.tensor([[5]])
    with squares_of(model) as fisher:
        model.module(ids).logits[0, 0, 7].backward()
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    model.module(ids).logits[0, 0, 7].backward()
    for name, found in fisher.items():
        plain = model.module.get_submodule(name).weight.grad.square()
        assert torch.allclose(found, plain, rtol=1e-3, atol=1e-6 * float(plain.max())), name
    assert sum(float(f.sum()) > 0 for f in fisher.values()) >= 10  # attention over one token ignores q and k
    assert not any(m._forward_hooks for m in model.module.modules())


def test_expected_losses_rank_as_the_measured_ones():
    model = tiny_model()
    data = windows(24, 1)
    chosen = Mixed(choices=("int3", "int5"), group_size=16, target_bits=5.0, sensitivity_tokens=768)
    losses = chosen.losses(model, Context(seed=0, calibration=data))
    ruler = Ruler("test", Network(model.module, learns=False), data)
    expected, measured = [], []
    for name, row in losses.items():
        twin = tiny_model()
        W = twin.parameter(f"{name}.weight").detach()
        twin.store(f"{name}.weight", round_to_nearest(name, W, Encoding("int3", 16), search=True))
        expected.append(row[0])
        measured.append(ruler.divergence(Network(twin.module, learns=False)))
        assert row[1] < 0.2 * row[0]  # two bits more: a sixteenth of the squared error, in theory
    ranks = torch.tensor([expected, measured]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8, (expected, measured)
    assert 0.4 < sum(expected) / sum(measured) < 2.5


def test_runs_repeat():
    digests = []
    for _ in range(2):
        model = tiny_model()
        Mixed(method="rtn", **FAST).apply(model, Context(seed=3, calibration=windows()))
        digests.append(model.digest)
    assert digests[0] == digests[1]


def test_the_best_table_follows_the_scores():
    facts, chosen = tiny_model().facts, Mixed(choices=("int3", "int8"), group_size=16, target_bits=5.0)
    dear = [name for name in facts.linears if "v_proj" in name]
    losses = {name: [1.0 if name in dear else 1e-3, 0.0] for name in facts.linears}
    table = chosen.table(facts, losses)
    assert all(table[name] == "int8" for name in dear) and "int3" in table.values()


def test_possible_encodings_are_all_choices_and_the_planned_table_is_within_budget():
    facts, chosen = tiny_model().facts, Mixed(**FAST)
    possible = chosen.possible(facts)
    assert [str(e) for e in possible["model.layers.0.mlp.up_proj.weight"]] == ["int3 g16", "int4 g16", "int8 g16"]
    assert possible["lm_head.weight"] == [Encoding("int8", 16)] and possible.keys() == chosen.encodings(facts).keys()
    planned = chosen.encodings(facts)
    weights = sum(n * m for n, m in facts.linears.values())
    stored = sum(n * m * planned[f"{name}.weight"].bits_per_weight(m) for name, (n, m) in facts.linears.items())
    assert 5.0 < stored / weights <= 5.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bits": 3.9}, r"target_bits=3.9: all linears take 4.000 bits per weight in int3 and 9.000 in int8"),
        ({"target_bits": 9.0}, r"give a target between them, or other choices"),
        ({"choices": ["int4", "int4"]}, r"choices: int4, int4 names an encoding twice"),
        ({"choices": ["int4", "nf4"]}, r"choices: int4, nf4 take 5.000 bits per weight alike, which leaves nothing to"),
        ({"group_size": 24}, r"32 input channels are not a multiple of group_size=24; use group_size=16"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_weights_load(fields, message):
    with pytest.raises(RecipeError, match=message):
        Mixed(**{**FAST, **fields}).check(tiny_model().facts)


def test_codebooks_are_choices_where_the_method_has_them():
    model = tiny_model()
    fields = {"choices": ["int3", "nf4", "int8"], "group_size": 16, "target_bits": 5.5}
    Mixed(method="rtn", **fields).apply(model, Context(seed=0, calibration=windows()))
    assert {str(model.encoded[f"{name}.weight"].encoding) for name in model.facts.linears} == {
        "int3 g16",
        "nf4 g16",
        "int8 g16",
    }
    with pytest.raises(RecipeError, match=r"quantize.hqq chooses integer codes, not nf4's"):
        Mixed(method="hqq", **fields).check(model.facts)


def test_missing_data_and_coded_tensors_are_refused():
    with pytest.raises(RecipeError, match=r"quantize.mixed needs data.calibration"):
        Mixed(**FAST).apply(tiny_model(), Context(seed=0))
    model = tiny_model()
    step("quantize.rtn")(group_size=16).apply(model, Context(seed=0))
    with pytest.raises(RecipeError, match="rounding twice loses twice"):
        Mixed(**FAST).apply(model, Context(seed=0, calibration=windows()))


@pytest.mark.parametrize("fields", [{"choices": ["int4"]}, {"choices": ["int4", "fp16"]}, {"method": "cast"}])
def test_impossible_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        Mixed(**fields)


# --- the real model ---------------------------------------------------------------------------------------


@pytest.mark.model
def test_sensitivities_are_those_of_the_real_model_and_the_table_beats_one_encoding_for_all(real_baseline, real_model):
    from compress.data import documents

    ids = [i for document in documents("wiki")[:100] for i in real_baseline.encode(document.text)]
    data = [torch.tensor(ids[i : i + 256]) for i in range(0, 12 * 256, 256)]
    ruler = Ruler("test", Network(real_baseline.module, False), data[:4])
    chosen = Mixed(choices=("int3", "int4", "int5"), method="rtn", target_bits=4.5, sensitivity_tokens=2048)
    model = real_model()
    losses = chosen.losses(model, Context(seed=0, calibration=data[4:]))
    expected, measured = [], []
    for name in list(losses)[4::23]:
        parameter = model.parameter(f"{name}.weight")
        W = parameter.detach().clone()
        parameter.data = round_to_nearest(name, W, Encoding("int3", 32), search=True).decode()
        measured.append(ruler.divergence(Network(model.module, False)))
        parameter.data = W
        expected.append(losses[name][0])
    ranks = torch.tensor([expected, measured]).argsort(1).argsort(1).double()
    assert len(expected) == 9 and float(torch.corrcoef(ranks)[0, 1]) > 0.7, (expected, measured)
    found = {}
    table = dict(chosen.table(model.facts, losses))
    for label, keep in (("mixed", table), ("int4", {})):
        model = real_model()
        step("quantize.rtn")(encoding="int4", range="mse", embeddings=None, keep=keep).apply(model, Context(seed=0))
        found[label] = ruler.divergence(Network(model.module, False))
    assert found["mixed"] < 0.95 * found["int4"], found


def test_it_is_computed_anew_when_its_method_changes(monkeypatch):
    before = {method: Mixed(method=method).reads() for method in ("gptq", "rtn")}
    monkeypatch.setattr(type(step("quantize.gptq")()), "version", 99)
    assert Mixed(method="gptq").reads() != before["gptq"] and Mixed(method="rtn").reads() == before["rtn"]
