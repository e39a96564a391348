"""Steps that remove channels and blocks: really smaller models that everything after them accepts."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compress import artifact
from compress.errors import NumericalError, RecipeError
from compress.exporting import weights_exact
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import exporter, step
from compress.steps.prune._depth import block_influence
from tests import tiny_gguf, tiny_onnx
from tests.tiny import tiny_model

WINDOW = [3, 77, 201, 12, 50, 9]
HALF = ("prune.neurons", {"fraction": 0.5})
FEWER = ("prune.heads", {"groups": 1, "queries": 1})
THINNER = ("prune.hidden", {"fraction": 0.5, "round_to": 16})
SHORTER = ("prune.layers", {"count": 1})


def windows(count: int = 8, length: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def reshaped(name: str, fields: dict, model: Model | None = None, notes: list[str] | None = None) -> Model:
    model = model or tiny_model()
    context = Context(seed=0, calibration=windows(), notes=[] if notes is None else notes)
    chosen = step(name)(**fields)
    expected = chosen.facts_after(model.facts)
    chosen.apply(model, context)
    assert model.facts == expected
    return model


def logits(model: Model) -> torch.Tensor:
    return next(model.logits([WINDOW]))


def check_shapes(model: Model) -> None:
    """Facts, config, tensors and modules tell the same shapes."""
    parameters = {n: tuple(p.shape) for n, p in model.module.named_parameters() if n in model.facts.matrices}
    assert parameters == dict(model.facts.matrices)
    for name, (n, m) in model.facts.linears.items():
        linear = model.module.get_submodule(name)
        assert (linear.out_features, linear.in_features) == (n, m)
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    assert [block.self_attn.layer_idx for block in blocks] == list(range(model.facts.layers))


# --- what both do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("prune.neurons", {"fraction": 0.0}),
        ("prune.heads", {}),
        ("prune.layers", {"count": 0}),
        ("prune.hidden", {"fraction": 0.0}),
    ],
)
def test_nothing_to_remove_changes_no_bit(name, fields):
    model = tiny_model()
    config = model.module.config.to_dict()
    step(name)(**fields).apply(model, Context(seed=0))  # needs no calibration either
    assert model.digest == tiny_model().digest and model.module.config.to_dict() == config


@pytest.mark.parametrize(("name", "fields"), [HALF, FEWER, SHORTER, THINNER])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_smaller_model_is_an_ordinary_one(name, fields, family, tmp_path):
    model = tiny_onnx.tiny(family, tied=True)
    model.parameter("model.layers.0.mlp.down_proj.weight").data.mul_(0.01)  # the first block goes, where one goes
    model.parameter("model.layers.0.self_attn.o_proj.weight").data.mul_(0.01)
    before = sum(p.numel() for p in model.module.parameters())
    reshaped(name, fields, model)
    check_shapes(model)
    assert sum(p.numel() for p in model.module.parameters()) < (0.9 if name == "prune.heads" else 0.8) * before
    # through the cache, where each block finds its keys by its number
    torch.testing.assert_close(model.decode_logits(WINDOW), logits(model), rtol=1e-4, atol=1e-4)
    artifact.save(model, tmp_path / "made")
    assert torch.equal(logits(artifact.load(tmp_path / "made")), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.tensor([WINDOW])).logits[0], logits(model), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert len(config.get("layer_types") or range(model.facts.layers)) == config["num_hidden_layers"]


@pytest.mark.parametrize(("name", "fields"), [HALF, FEWER, SHORTER, THINNER])
@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_exports_hold_the_smaller_model(name, fields, format, tmp_path):
    model = tiny_gguf.tiny("llama") if format == "gguf" else tiny_onnx.tiny("llama", tied=True)
    reshaped(name, fields, model)
    if format == "onnx":  # llama.cpp would round activations to 8 bits
        step("quantize.rtn")(encoding="int8", group_size=16).apply(model, Context(seed=0))
    chosen = exporter(format)()
    chosen.write(model, tmp_path)
    assert weights_exact(model, chosen, tmp_path)
    opened = chosen.open(tmp_path)
    try:
        found = next(opened.logits([WINDOW]))
    finally:
        opened.close()
    assert tiny_gguf.kl(logits(model), found) < 1e-4  # llama.cpp's cache holds float16


@pytest.mark.parametrize(("name", "fields"), [FEWER, THINNER])
def test_what_llama_cpp_cannot_load_is_refused_beforehand(name, fields, tmp_path):
    model = tiny_gguf.tiny("qwen2")
    after = step(name)(**fields).facts_after(model.facts)
    with pytest.raises(RecipeError, match="query heads together as wide as its hidden state, and here .* to onnx"):
        exporter("gguf")().check(after)
    reshaped(name, fields, model)
    with pytest.raises(RecipeError, match="as wide as its hidden state"):
        exporter("gguf")().write(model, tmp_path)
    exporter("onnx")().check(model.facts)
    exporter("gguf")().check(reshaped(name, fields, tiny_gguf.tiny("qwen3")).facts)


@pytest.mark.parametrize(("name", "fields"), [HALF, FEWER, SHORTER, THINNER])
@pytest.mark.parametrize(
    ("earlier", "given", "message"),
    [
        ("quantize.rtn", {"group_size": 16}, "q_proj.weight is stored as int4 g16 already; move it to the front"),
        ("prune.magnitude", {"sparsity": 0.5}, "q_proj.weight is pruned by a mask already"),
    ],
)
def test_masks_and_codes_fix_the_shapes(name, fields, earlier, given, message):
    model = tiny_model()
    step(earlier)(**given).apply(model, Context(seed=0))
    digest = model.digest
    with pytest.raises(RecipeError, match=message):
        reshaped(name, fields, model)
    assert model.digest == digest


@pytest.mark.parametrize(("name", "fields"), [HALF, FEWER, SHORTER, THINNER])
def test_calibration_is_needed(name, fields):
    with pytest.raises(RecipeError, match=f"{name} needs calibration data"):
        step(name)(**fields).apply(tiny_model(), Context(seed=0))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("prune.neurons", {"fraction": 0.4}, "fraction=0.4 of 64 channels removes none.* round_to=32"),
        ("prune.layers", {"count": 2}, "count=2 leaves none of 2 blocks; use at most 1"),
        ("prune.hidden", {"fraction": 0.4}, "fraction=0.4 of 32 channels removes none.* round_to=32"),
        ("prune.heads", {"groups": 2}, "groups=2 leaves none of 2 key/value heads; use at most 1"),
        ("prune.heads", {"queries": 4}, "queries=4 leaves none of 4 query heads; use at most 2, or remove whole"),
        (
            "prune.heads",
            {"queries": 1},
            "leaves 3, which 2 key/value heads cannot share evenly; remove a multiple of 2",
        ),
        ("prune.heads", {"groups": 1, "queries": 2}, "queries=2 leaves none of 2 query heads"),
    ],
)
def test_what_removes_nothing_or_all_is_refused(name, fields, message):
    with pytest.raises(RecipeError, match=message):
        step(name)(**fields).check(tiny_model().facts)
    with pytest.raises(RecipeError, match=message):
        step(name)(**fields).apply(tiny_model(), Context(seed=0, calibration=windows()))


@pytest.mark.parametrize(
    ("heads", "fields", "message"),
    [
        ((4, 1), {"groups": 1}, "groups=1 leaves none of 1 key/value heads; leave groups out"),
        ((4, 2), {"groups": 1, "queries": 2}, "queries=2 leaves none of 2 query heads; use at most 1"),
        ((2, 2), {"queries": 2}, "queries=2 leaves none of 2 query heads; remove whole groups"),
        (
            (2, 2),
            {"queries": 1},
            "queries=1 of 2 query heads leaves 1, which 2 key/value heads cannot share evenly; remove whole groups",
        ),
        ((4, 2), {"queries": 5}, "queries=5 leaves none of 4 query heads; use at most 2, or remove whole groups"),
        ((1, 1), {"queries": 1}, "queries=1 leaves none of 1 query heads; leave queries out"),
    ],
)
def test_the_remedy_can_be_followed(heads, fields, message):
    shape = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    facts = tiny_model(**shape).facts
    with pytest.raises(RecipeError, match=f"^{message}$"):
        step("prune.heads")(**fields).check(facts)
    with pytest.raises(RecipeError, match="^count=1 leaves none of 1 blocks; leave the step out$"):
        step("prune.layers")(count=1).check(replace(facts, layers=1))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("prune.neurons", {"fraction": 1.0}),
        ("prune.neurons", {"fraction": float("nan")}),
        ("prune.neurons", {"fraction": 0.5, "round_to": 0}),
        ("prune.neurons", {"fraction": 0.5, "ridge": 0.0}),
        ("prune.layers", {"count": -1}),
        ("prune.layers", {"count": 1, "update": "output"}),
        ("prune.layers", {"count": 1, "criterion": "taylor"}),
        ("prune.heads", {"groups": -1}),
        ("prune.heads", {"queries": 2.0}),
        ("prune.heads", {"queries": 2, "criterion": "influence"}),
        ("prune.hidden", {"fraction": 1.0}),
        ("prune.layers", {"count": 1.5}),
    ],
)
def test_impossible_fields_are_refused(name, fields):
    with pytest.raises(ValidationError):
        step(name)(**fields)


def test_later_steps_see_the_new_shapes():
    model = reshaped(*SHORTER, model=reshaped(*HALF))
    later = step("quantize.gptq")(group_size=32)
    later.apply(model, Context(seed=0, calibration=windows()))
    assert {n: e.encoding for n, e in model.encoded.items()} == later.encodings(model.facts)
    assert model.encoded["model.layers.0.mlp.down_proj.weight"].codes.shape == (32, 32)
    pruned = reshaped(*HALF)
    step("prune.sparsegpt")(pattern="2:4").apply(pruned, Context(seed=0, calibration=windows()))
    assert pruned.masks["model.layers.1.mlp.down_proj.weight"].shape == (32, 32)


# --- neurons ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["activation", "wanda", "fisher", "taylor"])
def test_channels_that_add_nothing_go_and_the_function_stays(criterion):
    model = tiny_model()
    silent = [torch.randperm(64, generator=torch.Generator().manual_seed(i))[:32] for i in range(2)]
    for i in range(2):
        model.parameter(f"model.layers.{i}.mlp.up_proj.weight").data[silent[i]] = 0.0
    expected = logits(model)
    kept = {i: [j for j in range(64) if j not in silent[i].tolist()] for i in range(2)}
    rows = {i: model.parameter(f"model.layers.{i}.mlp.gate_proj.weight").detach()[kept[i]] for i in range(2)}
    for update in ("none", "output", "stream"):
        notes: list[str] = []
        fields = {"fraction": 0.5, "update": update, "criterion": criterion}
        narrow = reshaped("prune.neurons", fields, tiny_copy(model), notes)
        for i in range(2):
            assert torch.equal(narrow.parameter(f"model.layers.{i}.mlp.gate_proj.weight"), rows[i])
        torch.testing.assert_close(logits(narrow), expected, rtol=1e-4, atol=1e-4)
        assert notes == ["prune.neurons: 32 of 64 MLP channels remain in each block"]


def tiny_copy(model: Model) -> Model:
    twin = tiny_model()
    twin.module.load_state_dict(model.module.state_dict())
    return twin


def test_the_update_is_fitted_to_the_inputs_that_the_narrowed_blocks_before_it_give():
    errors = {}
    for update in ("none", "output", "stream"):
        model = reshaped("prune.neurons", {"fraction": 0.5, "update": update})
        total = 0.0
        for window in windows():
            with torch.no_grad():
                new = model.module.base_model(window[None]).last_hidden_state
                old = tiny_model().module.base_model(window[None]).last_hidden_state
            total += float((new - old).square().mean())
        errors[update] = total
    assert errors["stream"] < 0.9 * errors["output"] < 0.8 * errors["none"], errors


def test_non_finite_weights_name_the_layer():
    model = tiny_model()
    model.parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="model.layers.1: non-finite"):
        reshaped(*HALF, model=model)


# --- layers -----------------------------------------------------------------------------------------------


def plain_influence(model: Model, calibration: list[torch.Tensor]) -> list[float]:
    """From transformers' own hidden states, in float32; the last one is normed, so that its block is left out."""
    totals = torch.zeros(model.facts.layers - 1, dtype=torch.float64)
    for window in calibration:
        with torch.no_grad():
            states = model.module.base_model(window[None], output_hidden_states=True).hidden_states
        for i in range(model.facts.layers - 1):
            for x, y in zip(states[i][0].double(), states[i + 1][0].double()):
                totals[i] += 1 - (x @ y) / (x.norm() * y.norm())
    return (totals / sum(len(w) for w in calibration)).tolist()


def test_influence_equals_a_plain_reference():
    model = tiny_model()
    model.parameter("model.layers.0.mlp.down_proj.weight").data.mul_(0.3)
    found = block_influence(model, windows(), batch=3)
    assert found[0] == pytest.approx(plain_influence(model, windows())[0], rel=0.02)  # bfloat16 products
    assert len(found) == 2


@pytest.mark.parametrize("idle", [0, 1])
def test_a_block_that_does_nothing_goes_and_the_function_stays(idle):
    model = tiny_model()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.parameter(f"model.layers.{idle}.{name}.weight").data.zero_()
    expected, notes = logits(model), []
    assert block_influence(model, windows())[idle] == pytest.approx(0, abs=1e-6)
    short = reshaped(*SHORTER, model=model, notes=notes)
    assert torch.equal(logits(short), expected)
    assert notes[0].startswith(f"prune.layers: removed blocks {idle} (") and notes[0].endswith("of 2")


def test_non_finite_states_name_the_block():
    model = tiny_model()
    model.parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="model.layers.1: non-finite"):
        reshaped(*SHORTER, model=model)
