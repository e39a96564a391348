"""Fewer residual channels where an architecture ties the width to more: Gemma's embedding, heads of a fixed size."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from compress import artifact, measure
from compress.architectures import Facts
from compress.classifier import Classifier, model_of
from compress.errors import RecipeError
from compress.exporting import weights_exact
from compress.families import Encoder
from compress.interfaces import Context
from compress.model import Model, config_of
from compress.numerics.divergence import divergence
from compress.plugin import step
from compress.steps.prune._structure import reader_of
from compress.steps.prune._width import first_tokens, read
from export.checkpoint import Checkpoint
from export.gguf import Gguf
from export.onnx import Onnx
from tests import test_contract
from tests.steps import test_prune_classifiers
from tests.tiny import tiny_module, tiny_of
from tests.tiny_classifier import KINDS as ENCODERS
from tests.tiny_classifier import labelled
from tests.tiny_gguf import trained_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
GEMMAS = ("gemma", "gemma2", "gemma3_text")
DECODERS = (*GEMMAS, "gpt2")
KINDS = (*DECODERS, *ENCODERS)
SPLIT = ("gpt2", *ENCODERS)  # where heads go with the width
WINDOWS = [[5, 6, 7, 8, 9, 10], [200] * 3 + list(range(40, 97)), [3], [1, 2]]
TEXTS = [row["text"] for row in labelled(60, seed=5)]
HALF = {"fraction": 0.5, "round_to": 8}
LOUD, SILENT = torch.arange(1, 32, 2), torch.arange(0, 32, 2)


def tiny(kind: str, **options: Any) -> Model:
    """Random, 32 wide, with norms and biases that matter; the epsilon of its norms all but nothing."""
    if kind in ENCODERS:
        return test_prune_classifiers.tiny(
            kind, **({} if kind == "distilbert" else {"layer_norm_eps": 1e-12}), **options
        )
    epsilon = {"layer_norm_epsilon" if kind == "gpt2" else "rms_norm_eps": 1e-12}
    return tiny_of(kind, **epsilon, **options)


def calibration(model: Model) -> list[torch.Tensor]:
    return test_prune_classifiers.some(model) if isinstance(model, Classifier) else test_contract.windows(8, 0)


def narrowed(model: Model, notes: list[str] | None = None, **fields: Any) -> Model:
    chosen = step("prune.hidden")(**{**HALF, **fields})
    chosen.check(model.facts)
    expected = chosen.facts_after(model.facts)
    chosen.apply(model, Context(seed=0, calibration=calibration(model), notes=[] if notes is None else notes))
    assert model.facts == expected == Facts.from_config(config_of(model.module))
    return model


def logits(model: Any) -> torch.Tensor:
    given = [model.encode(text) for text in TEXTS] if getattr(model, "labels", ()) else WINDOWS
    return torch.cat([rows.clone() for rows in model.logits(given)])


def blocks(model: Model) -> Any:
    return model.module.get_submodule(model.facts.architecture.blocks)


# --- what is left -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_remove_changes_no_bit(kind: str) -> None:
    model = tiny(kind)
    config = model.module.config.to_dict()
    step("prune.hidden")(fraction=0.0).apply(model, Context(seed=0))
    assert model.digest == tiny(kind).digest and model.module.config.to_dict() == config


@pytest.mark.parametrize("kind,tied", [*((k, True) for k in KINDS), *((k, False) for k in DECODERS)])
def test_the_narrower_model_is_an_ordinary_one(kind: str, tied: bool, tmp_path: Path) -> None:
    model, notes = tiny(kind, **({} if kind in ENCODERS else {"tie_word_embeddings": tied})), list[str]()
    narrowed(model, notes)
    assert model.facts.sizes["residual"] == 16
    assert notes == ["prune.hidden: 16 of 32 residual channels remain"] + [
        "prune.hidden: 2 of 4 heads remain in each block"
    ] * (kind in SPLIT)
    assert {n: tuple(p.shape) for n, p in model.module.named_parameters() if n in model.facts.matrices} == dict(
        model.facts.matrices
    )
    if model.facts.architecture.centred:
        assert sum(p.numel() for p in model.module.parameters()) == model.facts.parameters + model.facts.floats
    artifact.save(model, tmp_path / "made")
    assert torch.equal(logits(artifact.load(tmp_path / "made")), logits(model))
    auto = AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM
    if kind in DECODERS:  # an encoder's folder is one of transformers
        Checkpoint().write(model, tmp_path / "out")
    plain = auto.from_pretrained(tmp_path / ("out" if kind in DECODERS else "made"), dtype=torch.float32).eval()
    if kind in DECODERS:
        with torch.no_grad():
            found = torch.cat([plain(torch.tensor([w])).logits[0] for w in WINDOWS])
        torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-4)
        torch.testing.assert_close(model.decode_logits(WINDOWS[1]), next(model.logits(WINDOWS[1:2])), rtol=0, atol=1e-4)
    opened = model_of(plain, model.tokenizer)
    assert torch.equal(logits(opened), logits(model)) and opened.facts == model.facts
    for (name, live), (_, fresh) in zip(model.module.named_modules(), opened.module.named_modules(), strict=True):
        assert not name or sizes(live) == sizes(fresh), name
    assert {n: b.tolist() for n, b in model.module.named_buffers()} == {
        n: b.tolist() for n, b in opened.module.named_buffers()
    }


def sizes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of its config."""
    return {name: held for name, held in vars(module).items() if isinstance(held, int | float | tuple)}


def test_an_mlp_whose_width_was_four_times_the_hidden_one_keeps_its_own() -> None:
    model = tiny("gpt2", n_inner=None)
    assert narrowed(model).module.config.n_inner == model.facts.sizes["mlp"] == 128


# --- what goes --------------------------------------------------------------------------------------------


@torch.no_grad()
def silence(model: Model) -> list[list[list[float]]]:
    """Let half of the channels, heads and pooler's outputs do nothing; per block what the other heads are read by.

    No norm centres anything: the mean over the channels is 0 as it is.
    """
    arch, rows = model.facts.architecture, []
    for name in arch.embeddings:
        table = model.parameter(f"{name}.weight")
        table[:, SILENT] = 0
        if arch.centred:
            table[:, LOUD] -= table[:, LOUD].mean(dim=1, keepdim=True)
    for block in blocks(model):
        heads = block.get_submodule(reader_of(arch, "q"))
        if arch.splits_width:
            heads.weight.view(32, 4, 8)[:, [0, 3]] = 0
        for linear in (heads, block.get_submodule(reader_of(arch, "mlp"))):
            for held in filter(lambda p: p is not None, (linear.weight, linear.bias)):
                held[SILENT] = 0
                if arch.centred:
                    held[LOUD] -= held[LOUD].mean(dim=0)
        rows.append(heads.weight.view(32, -1, 8)[LOUD][:, 1:3].flatten(1).tolist())
    for module in model.module.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias[SILENT] = 0
            if isinstance(arch, Encoder):  # whose norms feed the sums
                module.weight[LOUD] = 1.3
                module.bias[LOUD] -= module.bias[LOUD].mean()
    if isinstance(arch, Encoder):
        model.parameter(f"{arch.head}.weight")[:, LOUD] = 0
    model.touch()
    return rows


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("kind,tied", [*((k, True) for k in KINDS), *((k, False) for k in DECODERS)])
def test_what_does_nothing_goes_and_the_function_stays(kind: str, tied: bool, update: bool) -> None:
    model = tiny(kind, **({} if kind in ENCODERS else {"tie_word_embeddings": tied}))
    heads = silence(model)
    expected, arch = logits(model), model.facts.architecture
    embeddings = model.parameter(model.facts.embedding_tensor).detach()[:, LOUD].clone()
    made = model.parameter(f"{arch.pooler}.bias").detach()[SILENT].tolist() if isinstance(arch, Encoder) else []
    assert expected.std() > 0.05
    narrowed(model, update=update)
    scale = 2**0.5 if kind in GEMMAS else 1.0
    torch.testing.assert_close(model.parameter(model.facts.embedding_tensor), embeddings * scale, rtol=1e-6, atol=0)
    if arch.splits_width and not update:
        assert [b.get_submodule(reader_of(arch, "q")).weight.tolist() for b in blocks(model)] == heads
    if isinstance(arch, Encoder):
        assert model.parameter(f"{arch.pooler}.bias").tolist() == pytest.approx(made, abs=1e-3 if update else 0)
    # bfloat16 products of the calibration
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=2e-3 if update else 1e-4)


@pytest.mark.parametrize("kind", SPLIT)
def test_what_heads_and_constant_channels_did_is_done_by_what_stays(kind: str) -> None:
    """Heads and a pooler's outputs have weaker twins; in GPT-2 norms make a constant of silent channels."""
    model = tiny(kind)
    silence(model)
    arch = model.facts.architecture
    with torch.no_grad():
        for block in blocks(model):
            for name, (out, _) in arch.linears.items():
                linear = block.get_submodule(name)
                for part in {"q": [0], "qkv": [0, 1, 2]}.get(out, []):
                    for held in (linear.weight, linear.bias):
                        rows = held[part * 32 : part * 32 + 32]
                        rows[8:16], rows[16:24] = rows[0:8], rows[24:32]
            W = block.get_submodule(reader_of(arch, "q")).weight
            W[:, [*range(8), *range(24, 32)]] = 0.5 * W[:, 8:24].flip(1)
            if not isinstance(arch, Encoder):
                block.ln_1.bias[SILENT], block.ln_2.bias[SILENT] = 0.3, -0.4
        if isinstance(arch, Encoder):
            pooler = model.module.get_submodule(arch.pooler)
            pooler.weight *= 0.2
            pooler.bias.fill_(1.0)  # none is silent, whatever the text
            pooler.weight[LOUD] = pooler.weight[SILENT]
            made = pooled(model, calibration(model)).square().mean(dim=0).sqrt()[SILENT]
            head = model.parameter(f"{arch.head}.weight")
            head[:, SILENT] *= 0.3 / made / head[:, SILENT].norm(dim=0)
            head[:, LOUD] = 0.7 * head[:, SILENT].flip(0)
    model.touch()
    expected = logits(model)
    narrowed(model, ridge=1e-6)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.02)  # the ridge, and bfloat16 products


@pytest.mark.parametrize("kind", KINDS)
def test_refitted_readers_stay_nearer(kind: str) -> None:
    """Where what goes can be told from what stays: the stream has 12 directions, as far as norms let it."""
    errors = {False: 0.0, True: 0.0}
    for seed, update in itertools.product(range(3), errors):
        model = tiny(kind, seed=seed)
        arch = model.facts.architecture
        directions = torch.randn(12, 32, generator=torch.Generator().manual_seed(3)) / 3
        with torch.no_grad():
            for name in arch.embeddings:
                table = model.parameter(f"{name}.weight")
                table.copy_(table[:, :12] @ directions)
            for block in blocks(model):
                for linear in (block.get_submodule(reader_of(arch, axis)) for axis in ("q", "mlp")):
                    linear.weight.copy_(directions.T @ linear.weight[:12])
                for norm in arch.norms if isinstance(arch, Encoder) else arch.post_norms.values():
                    block.get_submodule(norm).weight.fill_(1.0)
        model.touch()
        wanted = logits(model)
        found = logits(narrowed(model, fraction=0.25, update=update))
        errors[update] += float(divergence(wanted, found).kl.mean())
    assert errors[True] < 0.6 * errors[False], errors


@pytest.mark.parametrize("kind", KINDS)
def test_a_norms_ratio_is_that_of_root_mean_squares_about_the_mean_of_all(kind: str) -> None:
    model = tiny(kind)
    arch, given = model.facts.architecture, calibration(model)
    norms, _ = read(model, given, lambda label, share: None)
    added = [f"{arch.blocks}.{i}.{name}" for i in range(model.facts.layers) for name in arch.post_norms.values()]
    assert [norm.name for norm in norms] == [*model.facts.readers, *added]
    seen: dict[str, list[torch.Tensor]] = {}
    for norm in norms:
        model.module.get_submodule(norm.name).register_forward_pre_hook(
            lambda _, args, name=norm.name: seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))
        )
    for window in given:
        model.read(window)
    weights = first_tokens(model, given) if isinstance(arch, Encoder) else None
    for norm in norms:
        x = torch.cat(seen[norm.name]).double()
        shares = (x - x.mean(dim=1, keepdim=True) if arch.centred else x).square()
        shares /= shares.mean(dim=1, keepdim=True)
        if norm.name == list(model.facts.readers)[-1] and weights is not None:
            shares *= weights[:, None]
        assert norm.ratio(LOUD) == pytest.approx(float(shares[:, LOUD].mean() ** 0.5), rel=0.005), norm.name
        assert norm.ratio(torch.arange(32)) == 1.0


def test_a_norm_that_is_given_nothing_keeps_its_gain() -> None:
    model = tiny("gemma2")
    with torch.no_grad():
        model.parameter("model.layers.0.mlp.down_proj.weight").zero_()
    gain = model.parameter("model.layers.0.post_feedforward_layernorm.weight").tolist()
    narrowed(model)
    found = model.parameter("model.layers.0.post_feedforward_layernorm.weight").tolist()
    assert len(found) == 16 and all(any(abs(a - b) < 1e-6 for b in gain) for a in found)


# --- what an encoder's pooler and head read ---------------------------------------------------------------


@torch.no_grad()
def pooled(model: Model, windows: list[torch.Tensor]) -> torch.Tensor:
    """What the head of an encoder would read if each token were the first, (tokens, width)."""
    arch = model.facts.architecture
    assert isinstance(arch, Encoder)
    states = model.module.base_model(torch.stack(windows)).last_hidden_state.flatten(0, 1)
    found: torch.Tensor = getattr(torch, arch.pooling.lower())(model.module.get_submodule(arch.pooler)(states))
    return found


@pytest.mark.parametrize("kind", ENCODERS)
def test_first_tokens_count_as_much_as_all_others(kind: str) -> None:
    model = tiny(kind)
    assert isinstance(model, Classifier) and isinstance(model.facts.architecture, Encoder)
    given = calibration(model)
    counts = first_tokens(model, given)
    assert counts is not None
    first = torch.cat(given) == model.tokenizer.cls_token_id
    n = len(first)
    assert 0 < int(first.sum()) < n / 4 and float(counts[first].sum()) == pytest.approx(n / 2)
    assert len(set(counts[first].tolist())) == len(set(counts[~first].tolist())) == 1
    assert float(counts.sum()) == pytest.approx(n)
    assert first_tokens(model, [w.clamp(min=5) for w in given]) is None
    norms, head = read(model, given, lambda label, share: None)
    assert head is not None and [norm.name for norm in norms] == list(model.facts.readers)
    with torch.no_grad():
        states = model.module.base_model(torch.stack(given)).last_hidden_state.flatten(0, 1)
    for reading, X in ((norms[-1].reading, states), (head, pooled(model, given))):
        assert reading is not None
        X = torch.cat([X, torch.ones(n, 1)], dim=1).double()
        plain = (X * counts[:, None]).T @ X
        assert (reading.hessian.matrix - plain).norm() < 0.02 * plain.norm()  # bfloat16 products
    assert norms[0].counts is None and norms[-1].counts is not None
    model.tokenizer.cls_token = None
    assert first_tokens(model, given) is None
    narrowed(model)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gpt2", {"fraction": 0.2, "round_to": 24}, "a multiple of round_to=24; raise fraction or lower round_to$"),
        (
            "bert",
            {"fraction": 0.2, "round_to": 12},
            "a multiple of 24, for whole heads of 8 channels and round_to=12; r",
        ),
        (
            "gpt2",
            {"fraction": 0.2, "round_to": 4},
            "of 8, for whole heads of 8 channels and round_to=4; raise fraction$",
        ),
        ("llama", {"fraction": 0.2, "round_to": 16}, "a multiple of round_to=16; raise fraction or lower round_to$"),
        ("roberta", {"fraction": 0.2, "round_to": 8}, "a multiple of round_to=8; raise fraction$"),
        ("gemma", {"fraction": 0.4}, "rounded up to a multiple of round_to=32; raise fraction or lower round_to$"),
        (
            "distilbert",
            {"fraction": 0.9, "round_to": 64},
            "a multiple of round_to=64; raise fraction or lower round_to$",
        ),
    ],
)
def test_a_fraction_that_removes_nothing_is_told_the_multiple(kind: str, fields: dict[str, Any], message: str) -> None:
    facts = tiny(kind).facts
    with pytest.raises(RecipeError, match=f"of 32 channels removes none.* {message}"):
        step("prune.hidden")(**fields).check(facts)


@pytest.mark.parametrize("kind", SPLIT)
def test_heads_alone_are_refused_and_the_step_that_removes_them_with_the_width_is_named(kind: str) -> None:
    message = f"config of a {kind} cannot say .* use prune.neurons or prune.layers, or prune.hidden, where heads go"
    with pytest.raises(RecipeError, match=message):
        step("prune.heads")(groups=1).check(tiny(kind).facts)
    for width in (16, 24):
        after = step("prune.hidden")(fraction=1 - width / 32, round_to=8).facts_after(tiny(kind).facts)
        assert (after.heads, after.kv_heads, after.head_size) == (width // 8, width // 8, 8)


# --- exports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_portable_onnx_computes_the_same(kind: str, tmp_path: Path) -> None:
    model, portable = narrowed(tiny(kind)), Onnx(flavour="portable")
    step("quantize.rtn")(encoding="int8", group_size=8).apply(model, Context(seed=0))
    portable.check(model.facts)
    portable.write(model, tmp_path)
    assert weights_exact(model, portable, tmp_path)
    opened: Any = measure.open_model(str(tmp_path))
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-4)
    opened.close()


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """llama.cpp opens no tokenizer without merges."""
    return trained_tokenizer()


@pytest.mark.parametrize("kind", DECODERS)
def test_llama_cpp_computes_the_same(kind: str, merging: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = Model(tiny_module(kind, vocab_size=len(merging), eos_token_id=merging.eos_token_id), merging)
    narrowed(model)
    Gguf().check(model.facts)
    Gguf().write(model, tmp_path)
    assert weights_exact(model, Gguf(), tmp_path)
    opened = Gguf().open(tmp_path)
    expected = logits(model)
    assert (logits(opened) - expected).norm() <= 0.02 * expected.norm()  # a cache of float16
    opened.close()
