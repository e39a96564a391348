"""HQQ as a step: what it stores, what it refuses, and what it gains on the real model."""

import pytest
import torch
from gguf import GGUFReader

from compress.encodings import Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.numerics.half_quadratic import fit_half_quadratic, fit_offsets
from compress.plugin import step
from compress.steps.quantize._fields import round_to_nearest
from export._llama_cpp import find
from export.gguf import Gguf
from tests.tiny import tiny_model
from tests.tiny_gguf import tiny

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_encodes_what_it_announces_and_keeps_pruned_weights(symmetric):
    model = tiny_model()
    step("prune.magnitude")(sparsity=0.5).apply(model, Context(seed=0))
    head = model.parameter("lm_head.weight").detach().clone()
    chosen = step("quantize.hqq")(group_size=16, symmetric=symmetric, keep={"*.o_proj": "fp16", "*.q_proj": "int8"})
    chosen.apply(model, Context(seed=0))
    assert {n: e.encoding for n, e in model.encoded.items()} == chosen.encodings(model.facts)
    assert model.encoded[UP].encoding == Encoding("int4", 16, symmetric)
    for name, mask in model.masks.items():
        assert not model.parameter(name)[~mask].any() and model.parameter(name)[mask].any()
    nearest = round_to_nearest("lm_head.weight", head, Encoding("int8", 16, symmetric), search=False)
    assert torch.equal(model.encoded["lm_head.weight"].codes, nearest.codes)


@pytest.mark.parametrize("fields", [{}, {"p": 0.3}, {"p": 1.0}, {"iterations": 2}])
@pytest.mark.parametrize("encoding", ["int3", "q4_1"])
def test_the_norm_and_the_iterations_are_those_asked_for(encoding, fields):
    found = []
    for asked in ({}, fields):
        model = tiny_model()
        W = model.parameter(UP).detach().view(64, 1, 32).clone()
        step("quantize.hqq")(encoding=encoding, **asked).apply(model, Context(seed=0))
        p, iterations = asked.get("p", 0.7), asked.get("iterations", 20)
        if encoding == "q4_1":
            grid = fit_offsets(W, 15, p, iterations)
        else:
            grid = fit_half_quadratic(W, 0, 7, False, p, iterations)
        found.append(grid.decode(grid.round(W)).flatten(1))
        assert torch.equal(model.parameter(UP), found[-1])
    assert not fields or not torch.equal(*found)


def test_it_lowers_its_own_norm_of_the_error():
    W = {n: p.detach().clone() for n, p in tiny_model().module.named_parameters()}
    errors = {}
    for name, fields in (("quantize.rtn", {"symmetric": False}), ("quantize.hqq", {})):
        model = tiny_model()
        step(name)(group_size=16, embeddings=None, **fields).apply(model, Context(seed=0))
        errors[name] = sum((model.parameter(n) - W[n]).abs().pow(0.7).sum().item() for n in model.encoded)
    assert errors["quantize.hqq"] < 0.97 * errors["quantize.rtn"], errors


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"encoding": "nf4"}, "integer codes, not nf4.s; use quantize.rtn"),
        ({"keep": {"*.down_proj": "mxfp4"}}, "integer codes, not mxfp4.s; use"),
        ({"embeddings": "mxfp4"}, "integer codes, not mxfp4.s; use"),
        ({"encoding": "q4_1", "group_size": 64}, "q4_1 holds a scale and an offset for 32 channels, always"),
        ({"encoding": "q5_1", "symmetric": True}, "leave group_size and symmetric out"),
        ({"p": 0.0}, "greater than 0"),
        ({"iterations": 0}, "greater than or equal to 1"),
    ],
)
def test_what_it_cannot_do_is_refused(fields, message):
    with pytest.raises((RecipeError, ValueError), match=message):
        step("quantize.hqq")(**fields)


@pytest.mark.parametrize("encoding,high", [("q4_1", 15), ("q5_1", 31)])
def test_blocks_hold_the_offsets_that_it_found_and_reach_the_file(encoding, high, tmp_path):
    model = tiny()
    W = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    chosen = step("quantize.hqq")(encoding=encoding, keep={"*.q_proj": "int8"})
    chosen.apply(model, Context(seed=0))
    assert {n: e.encoding for n, e in model.encoded.items()} == chosen.encodings(model.facts)
    assert model.encoded[UP].encoding == Encoding(encoding)
    assert model.encoded[UP.replace("mlp.up", "self_attn.q")].encoding == Encoding("int8", 32)
    grouped = W[UP].view(len(W[UP]), -1, 32)
    grid = fit_offsets(grouped, high, 0.7, 20)
    assert torch.equal(model.parameter(UP), grid.decode(grid.round(grouped)).view_as(W[UP]))
    Gguf().write(model, tmp_path)
    (stored,) = [t for t in GGUFReader(find(tmp_path)).tensors if t.name == "blk.0.ffn_up.weight"]
    assert stored.tensor_type.name == encoding.upper()
    assert torch.equal(torch.from_numpy(stored.data.copy()), model.encoded[UP].codes)


def test_non_finite_weights_name_the_tensor():
    model = tiny_model()
    with torch.no_grad():
        model.parameter(UP)[1, 1] = float("nan")
    with pytest.raises(NumericalError, match=UP):
        step("quantize.hqq")(group_size=16).apply(model, Context(seed=0))


@pytest.mark.model
def test_it_loses_less_than_rounding_over_the_range_on_the_real_model(real_model, real_baseline):
    from compress import data
    from compress.numerics.divergence import divergence

    (evaluation,) = data.split([data.Request("evaluation", "wiki")], 0)
    held_out = [real_baseline.encode(d.text)[:256] for d in evaluation.documents[:10]]
    expected = [logits.clone() for logits in real_baseline.logits(held_out)]
    found = {}
    for name, fields in (("quantize.rtn", {"symmetric": False}), ("quantize.hqq", {})):
        model = real_model()
        step(name)(encoding="int4", group_size=64, embeddings=None, **fields).apply(model, Context(seed=0))
        pairs = zip(expected, model.logits(held_out))
        found[name] = torch.cat([divergence(p, q).kl for p, q in pairs]).mean().item()
    assert found["quantize.hqq"] < found["quantize.rtn"], found
