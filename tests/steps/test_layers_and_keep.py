"""Which matrices a quantization step stores, and in what: `layers`, `keep` and `embeddings` together."""

from fnmatch import fnmatchcase

import pytest
import torch

from compress import refusals
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.numerics.hessian import Hessian
from compress.plugin import step
from compress.scarcity import scarcity
from tests.recipes import SMOL, recipe
from tests.tiny import tiny_model

WINDOWS = [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
HEAD, TOKENS = "lm_head.weight", "model.embed_tokens.weight"
FIELDS = {
    "rtn": {},
    "gptq": {},
    "awq": {"alphas": 2},
    "hqq": {},
    "smoothquant": {"group_size": 32},
    "ggml": {"type": "q4_1", "embeddings": "q8_0"},
    "mixed": {"choices": ["int3", "int8"], "target_bits": 6.0, "method": "rtn", "sensitivity_tokens": 32},
}


def after(method: str, tied: bool = False, **fields):
    """A tiny model after a step, having computed something finite."""
    model = tiny_model(tie_word_embeddings=tied)
    chosen = step(f"quantize.{method}")(**{**FIELDS[method], **fields})
    chosen.check(model.facts)
    chosen.apply(model, Context(seed=0, calibration=WINDOWS))
    assert torch.isfinite(next(model.logits([[1, 2, 3, 250]]))).all()
    planned = chosen.encodings(model.facts)
    assert planned.keys() == model.encoded.keys()
    if method != "mixed":  # whose plan is made without weights
        assert dict(planned) == {name: held.encoding for name, held in model.encoded.items()}
    return model


@pytest.mark.parametrize("method", FIELDS)
def test_a_step_leaves_the_linears_that_no_pattern_matches_as_they_are(method):
    layers = ["*.0.mlp.*", "*.v_proj"]
    model, before = after(method, layers=layers), tiny_model()
    taken = {f"{n}.weight" for n in before.facts.linears if any(fnmatchcase(n, pattern) for pattern in layers)}
    assert len(taken) == 5 and model.encoded.keys() == taken | {HEAD, TOKENS}
    assert model.inputs.keys() == ({n.removesuffix(".weight") for n in taken} if method == "smoothquant" else set())
    if method not in ("awq", "smoothquant"):  # which move factors between linears
        for name in before.facts.linears.keys() - {n.removesuffix(".weight") for n in taken}:
            assert torch.equal(model.parameter(f"{name}.weight"), before.parameter(f"{name}.weight"))


@pytest.mark.parametrize(
    "name,fields",
    [
        ("quantize.gptq", {"layers": ["*.1.mlp.*"], "keep": {"*.down_proj": "fp16"}}),
        ("quantize.awq", {"layers": ["*.1.mlp.up_proj"], "alphas": 2}),
        ("quantize.awq", {"layers": ["*.1.mlp.*", "*.o_proj"], "keep": {"*.down_proj": "fp16", "*.o_proj": "bf16"}}),
        ("prune.sparsegpt", {"sparsity": 0.5, "layers": {"*": 0.0, "*.1.mlp.up_proj": 0.25}}),
    ],
)
def test_second_moments_are_summed_of_the_inputs_alone_that_weights_are_fitted_to(name, fields, monkeypatch):
    chosen, model, summed = step(name)(**fields), tiny_model(), set()
    own = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, X: (summed.add(self._name), own(self, X))[1])
    chosen.apply(model, Context(seed=0, calibration=WINDOWS))
    assert summed == {"model.layers.1.mlp.gate_proj"}  # the first of the linears that share that input
    assert chosen.hessians(model.facts) == chosen.solved(model.facts) == {"model.layers.0.mlp.gate_proj": 32}
    stored = {name: held.encoding for name, held in model.encoded.items()}
    assert stored == dict(chosen.encodings(model.facts))  # floats of a stage that is not solved among them


def test_a_head_that_is_solved_for_counts_among_the_inputs(monkeypatch):
    chosen, summed = step("quantize.gptq")(layers=["*.q_proj"], keep={"*.q_proj": "fp16"}, embeddings="int4"), set()
    assert chosen.hessians(SMOL) == {SMOL.architecture.embedding: 576} and chosen.hessians(SMOL) == chosen.solved(SMOL)
    assert "100 calibration tokens for 576 input channels of model.embed_tokens: " in scarcity(chosen, SMOL, 100)
    own = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, X: (summed.add(self._name), own(self, X))[1])
    for tied, head in ((True, TOKENS), (False, HEAD)):
        model = tiny_model(tie_word_embeddings=tied)
        chosen.apply(model, Context(seed=0, calibration=WINDOWS))
        assert summed == {head} and {f"{n}.weight" for n in chosen.hessians(model.facts)} == summed
        summed.clear()
    assert step("quantize.gptq")(layers=["*.q_proj"], keep={"*.q_proj": "fp16"}).hessians(SMOL) == {}  # int8


@pytest.mark.parametrize("method", FIELDS)
def test_an_untied_head_and_embedding_may_differ(method):
    head, linear, tokens = ("q5_0", "q5_1", "q8_0") if method == "ggml" else ("int5", "bf16", "int8")
    model = after(method, keep={"lm_head": head, "*.o_proj": linear}, embeddings=tokens)
    names = {"q5_0": "int5", "q8_0": "int8"}
    assert model.encoded[HEAD].encoding.name == names.get(head, head)
    assert model.encoded[TOKENS].encoding.name == names.get(tokens, tokens)
    kept = [n for n in model.facts.linears if n.endswith("o_proj")]
    assert kept and {model.encoded[f"{n}.weight"].encoding.name for n in kept} == {linear}
    assert HEAD not in after(method, keep={"lm_head": "fp32"}).encoded
    alone = after(method, keep={"lm_head": head}, embeddings=None)
    assert HEAD in alone.encoded and TOKENS not in alone.encoded


@pytest.mark.parametrize("method", FIELDS)
def test_a_tied_head_has_the_encoding_of_its_embedding(method):
    kind = "q5_0" if method == "ggml" else "int5"
    model = after(method, tied=True, keep={"*embed_tokens": kind})
    assert model.encoded[TOKENS].encoding.name == "int5" and HEAD not in model.encoded
    assert model.module.lm_head.weight is model.module.get_input_embeddings().weight
    message = r"keep: 'lm_head' matches no linear, e.g. .*q_proj, nor model.embed_tokens \(the head is tied to it\)"
    with pytest.raises(RecipeError, match=message):
        after(method, tied=True, keep={"lm_head": kind})


def test_a_pattern_that_matches_linears_names_nothing_else():
    model = after("rtn", keep={"*": "int2"}, embeddings="int5")
    assert model.encoded[HEAD].encoding.name == model.encoded[TOKENS].encoding.name == "int5"
    assert {model.encoded[f"{n}.weight"].encoding.name for n in model.facts.linears} == {"int2"}


@pytest.mark.parametrize("method", ["gptq", "mixed", "ggml"])
def test_patterns_that_match_nothing_are_refused(method):
    with pytest.raises(RecipeError, match=r"layers: '\*.mpl.\*' matches no linear, e.g. model.layers.0"):
        after(method, layers=["*.mpl.*"])
    with pytest.raises(RecipeError, match=r"keep: '\*.q_proj' matches no linear that layers \(\*.mlp.\*\) takes"):
        after(method, layers=["*.mlp.*"], keep={"*.q_proj": "fp16"})


def test_two_steps_share_the_linears_between_them():
    first = '  - quantize.gptq: {layers: ["*.mlp.*"], embeddings: null}\n'
    assert refusals.check(recipe(first + '  - quantize.rtn: {layers: ["*.self_attn.*"]}\n'), SMOL) == []
    with pytest.raises(RecipeError, match=r"up_proj.weight and \d+ more are .*; leave them to one step \(layers, "):
        refusals.check(recipe(first + '  - quantize.rtn: {layers: ["*.up_proj"]}\n'), SMOL)
    model = after("gptq", layers=["*.mlp.*"], embeddings=None)
    codes = model.encoded["model.layers.0.mlp.up_proj.weight"].codes.clone()
    step("quantize.awq")(layers=["*.self_attn.*"], alphas=2).apply(model, Context(seed=0, calibration=WINDOWS))
    assert model.encoded.keys() == model.facts.matrices.keys()
    assert torch.equal(codes, model.encoded["model.layers.0.mlp.up_proj.weight"].codes)


def test_the_budget_of_mixed_precision_is_that_of_what_it_chooses_for():
    fields = {"layers": ["*.mlp.*", "*.q_proj"], "keep": {"*.q_proj": "fp16", "*.1.mlp.down_proj": "int8"}}
    model = after("mixed", **fields)
    free = [n for n in model.facts.linears if ".mlp." in n and n != "model.layers.1.mlp.down_proj"]
    stored = [model.encoded[f"{name}.weight"] for name in free]
    assert {e.encoding.name for e in stored} == {"int3", "int8"}
    bits = 8 * sum(e.nominal_bytes for e in stored) / sum(e.codes.numel() for e in stored)
    assert 5.0 < bits <= 6.0
    chosen = step("quantize.mixed")(**FIELDS["mixed"], **fields)
    assert chosen.gradient_bytes(model.facts) == 4 * sum(e.codes.numel() for e in stored)
    possible = chosen.possible(model.facts)
    assert {len(possible[f"{name}.weight"]) for name in free} == {2}
    assert [str(e) for e in possible["model.layers.1.mlp.down_proj.weight"]] == ["int8 g32"]
    with pytest.raises(RecipeError, match="keep and layers leave no linear to choose for"):
        after("mixed", keep={"*": "int8"})
