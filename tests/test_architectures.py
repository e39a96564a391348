"""What holds of every architecture: its logits, what each step does to it, and the artifacts that are made of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress import artifact, refusals, source
from compress.architectures import Facts
from compress.blocks import walk
from compress.encodings import EncodedTensor, Encoding
from compress.errors import RecipeError
from compress.exporting import weights_exact
from compress.families import ARCHITECTURES
from compress.interfaces import Context, Exporter
from compress.model import Model
from compress.numerics.products import working_products, working_type
from compress.plugin import exporter, step
from compress.recipe import load
from compress.steps.quantize._fields import round_to_nearest
from compress.steps.quantize._folding import fold
from export.checkpoint import Checkpoint
from export.gguf import Gguf
from export.onnx import Onnx
from tests.test_contract import FIELDS, windows
from tests.tiny import tiny_model, tiny_module, tiny_of
from tests.tiny_gguf import trained_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = tuple(ARCHITECTURES)
NEW = ("phi3", "gemma", "gemma2", "gemma3_text", "gpt2")  # the others are what most tests run on
WINDOWS = [[5, 6, 7, 8, 9, 10], [200] * 3 + list(range(40, 97)), [3], [1, 2]]  # one longer than the sliding window
STEPS = (
    "quantize.rtn", "quantize.gptq", "quantize.awq", "quantize.hqq", "quantize.cast", "quantize.smoothquant",
    "prune.magnitude", "prune.wanda", "prune.sparsegpt", "prune.neurons", "prune.heads", "prune.layers",
    "prune.hidden", "distill.logits",
)  # fmt: skip
NOTHING = {
    "prune.magnitude": {"sparsity": 0.0},
    "prune.wanda": {"sparsity": 0.0},
    "prune.sparsegpt": {"sparsity": 0.0},
    "prune.neurons": {"fraction": 0.0},
    "prune.heads": {},
    "prune.layers": {"count": 0},
    "prune.hidden": {"fraction": 0.0},
}
REFUSED = {("gpt2", "prune.heads"): "the config of a gpt2 cannot say"}


def context(kind: str) -> Context:
    return Context(seed=0, calibration=windows(6, 0), selection=windows(2, 1), teacher=lambda: tiny_of(kind))


def all_logits(model: Model) -> list[torch.Tensor]:
    return [rows.clone() for rows in model.logits(WINDOWS)]


def assert_same(model: Model, expected: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(all_logits(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str) -> None:
    module = tiny_module(kind)
    with torch.no_grad():
        expected = [module(input_ids=torch.tensor([w])).logits[0] for w in WINDOWS]
    assert expected[1].std() > 0.3
    model = tiny_of(kind)
    assert_same(model, expected)
    torch.testing.assert_close(model.decode_logits(WINDOWS[1]), expected[1], rtol=0, atol=1e-4)
    shapes = {n: tuple(p.shape) for n, p in model.module.named_parameters()}
    assert {name: shapes[name] for name in model.facts.matrices} == model.facts.matrices
    if ARCHITECTURES[kind].centred:  # the others' few biases are left out
        assert sum(p.numel() for p in model.module.parameters()) == model.facts.parameters + model.facts.floats


@pytest.mark.parametrize("kind", KINDS)
def test_walking_the_blocks_is_the_forward_pass(kind: str) -> None:
    model, calibration = tiny_of(kind), windows(3, 0)
    with torch.inference_mode(), working_products():
        (expected, last) = (
            model.module.base_model(input_ids=torch.stack(part), use_cache=False).last_hidden_state
            for part in (calibration[:2], calibration[2:])
        )
    norm = model.module.get_submodule(model.facts.architecture.final_norm)
    for block in walk(model, calibration, windows_per_batch=2):
        plain: dict[str, list[torch.Tensor]] = {}
        block.observe(lambda names, X, to=plain: to.setdefault(names[0], []).append(X.to(working_type())))
        in_turn = {names[0]: torch.cat(inputs) for names, inputs in block.stages_in_turn()}
        assert list(in_turn) == list(plain) and len(plain) == 4
        for name, X in in_turn.items():
            assert torch.equal(X, torch.cat(plain[name]))
        left = block.advance()
        closing = model.facts.architecture.stages[3][0]
        after = [t for _, _, t in block.around(f"{model.facts.architecture.blocks}.{block.index}.{closing}")]
        assert torch.equal(torch.cat(after), torch.cat(left).flatten(0, 1))
    for states, wanted in zip(left, (expected, last), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(norm(states), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", NEW)
def test_the_stream_behind_attention_is_what_the_second_norm_reads(kind: str) -> None:
    model = tiny_of(kind)
    parts = model.facts.architecture
    for block in walk(model, windows(2, 0)):
        seen: list[torch.Tensor] = []
        hook = block.module.get_submodule(parts.block_norms[1]).register_forward_pre_hook(
            lambda _, args, to=seen: to.append(args[0].flatten(0, 1))
        )
        block.advance()
        hook.remove()
        found = [t for _, _, t in block.around(f"{parts.blocks}.{block.index}.{parts.stages[1][0]}")]
        assert torch.equal(torch.cat(found), torch.cat(seen))


@pytest.mark.parametrize("kind", NEW)
def test_folding_any_scales_leaves_the_function_as_it_was(kind: str) -> None:
    model = tiny_of(kind, num_key_value_heads=4) if kind != "gpt2" else tiny_of(kind)  # so that values fold, too
    expected, digest = all_logits(model), model.digest
    generator = torch.Generator().manual_seed(1)
    folded = 0
    for block in range(model.facts.layers):
        for source_, readers in model.facts.folds(block):
            m = model.parameter(f"{readers[0]}.weight").shape[1]
            fold(model, source_, readers, 2 ** (2 * torch.rand(m, generator=generator) - 1))
            folded += 1
    assert folded == len(model.facts.architecture.folds) * model.facts.layers and model.digest != digest
    assert_same(model, expected, 2e-4)  # float32 rounding, of logits up to 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_removes_nothing_changes_nothing(kind: str) -> None:
    model = tiny_of(kind)
    digest = model.digest
    for name, fields in NOTHING.items():
        step(name)(**fields).apply(model, context(kind))
        model.touch()
        assert model.digest == digest, name


@pytest.mark.parametrize("kind,name", [(k, n) for k in NEW for n in STEPS])
def test_what_a_step_makes_survives_saving(kind: str, name: str, tmp_path: Path) -> None:
    model, before = tiny_of(kind), tiny_of(kind).digest
    made = step(name)(**FIELDS.get(name, {}))
    if reason := REFUSED.get((kind, name)):
        with pytest.raises(RecipeError, match=reason):
            made.check(model.facts)
        return
    made.check(model.facts)
    predicted = made.facts_after(model.facts)
    made.apply(model, context(kind))
    model.touch()
    if not name.startswith("distill."):  # its own teacher has nothing to teach this student
        assert model.digest != before
    assert predicted.matrices == model.facts.matrices
    assert all(model.parameter(t).shape == shape for t, shape in model.facts.matrices.items())
    expected = all_logits(model)
    artifact.save(model, tmp_path / "a")
    assert_same(artifact.load(tmp_path / "a"), expected, 0.0)


@pytest.mark.parametrize("kind", NEW)
def test_smaller_models_are_opened_by_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny_of(kind)
    for name in ("prune.neurons", "prune.heads", "prune.layers", "prune.hidden"):
        if (kind, name) not in REFUSED:
            step(name)(**FIELDS[name]).apply(model, context(kind))
    model.touch()
    Checkpoint().write(model, tmp_path / "out")
    assert weights_exact(model, Checkpoint(), tmp_path / "out")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert_same(model, [module(input_ids=torch.tensor([w])).logits[0] for w in WINDOWS])
    assert_same(source.load(str(tmp_path / "out")), all_logits(model), 0.0)


@pytest.mark.parametrize("kind", [k for k in NEW if k != "gpt2"])
def test_heads_that_nothing_reads_are_those_that_go(kind: str) -> None:
    model = tiny_of(kind)
    reader, size = model.facts.architecture.stages[1][0], model.facts.head_size
    with torch.no_grad():
        for i in range(model.facts.layers):
            W = model.parameter(f"{model.facts.architecture.blocks}.{i}.{reader}.weight")
            W[:, : 2 * size] = 0  # the query heads of the first group
    expected = all_logits(model)
    step("prune.heads")(groups=1, update="none").apply(model, context(kind))
    assert (model.facts.heads, model.facts.kv_heads) == (2, 1)
    assert_same(model, expected)


@pytest.mark.parametrize("kind", NEW)
def test_neurons_that_nothing_reads_are_those_that_go(kind: str) -> None:
    model = tiny_of(kind)
    reader = model.facts.architecture.stages[3][0]
    silent = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    with torch.no_grad():
        for i in range(model.facts.layers):
            model.parameter(f"{model.facts.architecture.blocks}.{i}.{reader}.weight")[:, silent] = 0
    expected = all_logits(model)
    step("prune.neurons")(fraction=0.5, update="none").apply(model, context(kind))
    assert model.facts.sizes["mlp"] == 32
    assert_same(model, expected)


def mixed(model: Model) -> Model:
    """The model with its matrices in int4, int8 and float16 in turn."""
    for i, tensor in enumerate(model.facts.matrices):
        encoding = (Encoding("int4", 32), Encoding("int8", 32), Encoding("fp16"))[i % 3]
        W = model.parameter(tensor).detach()
        held = EncodedTensor(encoding, W.half()) if encoding.name == "fp16" else None
        model.store(tensor, held or round_to_nearest(tensor, W, encoding, search=False))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_portable_onnx_holds_the_very_weights_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    model, portable = mixed(tiny_of(kind)), Onnx(flavour="portable")
    portable.write(model, tmp_path / "out")
    assert weights_exact(model, portable, tmp_path / "out")
    runtime = portable.open(tmp_path / "out")
    for expected, found in zip(all_logits(model), runtime.logits(WINDOWS), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    names = [f"{model.facts.architecture.blocks}.1.{norm}" for norm in model.facts.architecture.block_norms]
    pairs = zip(model.norm_outputs(names, WINDOWS[1]), runtime.norm_outputs(names, WINDOWS[1]), strict=True)
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    runtime.close()


def test_learned_positions_are_counted_from_the_first_token_that_is_not_padding(tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    model = tiny_of("gpt2")
    Onnx(flavour="portable").write(model, tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, mask = np.full((1, 12), 99), np.zeros((1, 12), np.int64)
    ids[0, 4:10], mask[0, 4:10] = WINDOWS[0], 1
    (found,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(torch.from_numpy(found[0, 4:10]), all_logits(model)[0], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """llama.cpp opens no tokenizer without merges."""
    return trained_tokenizer()


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_holds_the_very_weights_and_llama_cpp_computes_the_same(
    kind: str, merging: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name in ("floats", "mixed"):
        module = tiny_module(kind, vocab_size=len(merging), eos_token_id=merging.eos_token_id)
        model = Model(module, merging) if name == "floats" else mixed(Model(module, merging))
        (tmp_path / name).mkdir()
        Gguf().write(model, tmp_path / name)
        assert weights_exact(model, Gguf(), tmp_path / name)
        runtime = Gguf().open(tmp_path / name)
        # llama.cpp keeps keys and values, and a table of gelu, in float16; with codes it rounds activations to 8 bits.
        tolerance = 0.02 if name == "floats" else 0.1
        for expected, found in zip(all_logits(model), runtime.logits(WINDOWS), strict=True):
            assert (found - expected).norm() <= tolerance * expected.norm()
        decoded = runtime.decode_logits(WINDOWS[1])
        assert (decoded - all_logits(model)[1]).norm() <= tolerance * decoded.norm()
        runtime.close()


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "phi3"])
def test_streamed_blocks_compute_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_of(kind)
    Checkpoint().write(model, tmp_path / "out")
    streamed = source.load(str(tmp_path / "out"), streaming=True)
    assert_same(streamed, all_logits(model), 0.0)
    step("quantize.gptq")(group_size=16).apply(streamed, context(kind))
    step("quantize.gptq")(group_size=16).apply(model, context(kind))
    assert_same(streamed, all_logits(model), 0.0)
    streamed.close()


def facts_of(kind: str, **options: object) -> Facts:
    return Facts.from_config(tiny_module(kind, **options).config.to_dict())


@pytest.mark.parametrize(
    ("kind", "name", "fields", "message"),
    [
        ("gpt2", "prune.heads", {"groups": 1}, "config of a gpt2 cannot say .* prune.hidden, where heads go with the"),
        ("gpt2", "prune.hidden", {"fraction": 0.2, "round_to": 4}, "a multiple of 8, for whole heads of 8 channels"),
        ("gemma2", "prune.neurons", {"fraction": 0.5, "update": "stream"}, "a norm stands before it"),
        ("gemma3_text", "prune.heads", {"groups": 1, "update": "stream"}, "a norm stands before it"),
        ("gemma2", "prune.layers", {"count": 1, "update": "stream"}, "a norm stands before it"),
        ("gemma2", "quantize.kv_cache", {}, "caps its attention at 20"),
        ("gpt2", "quantize.ggml", {"preset": "Q8_0"}, "mix for a gpt2.* is not known; name a type"),
        ("phi3", "distill.hidden", {**FIELDS["distill.hidden"], "relations": 1.0}, "one matrix in a phi3"),
    ],
)
def test_steps_that_cannot_work_say_so(kind: str, name: str, fields: dict[str, object], message: str) -> None:
    made = step(name)(**fields)
    with pytest.raises(RecipeError, match=message):
        made.check(facts_of(kind))
    made.check(tiny_model(head_dim=32).facts)


@pytest.mark.parametrize(
    ("kind", "options", "format", "fields", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 64}, "gguf", {}, "the queries of this gemma2 by 0.25, not by 0.125"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "gguf", {}, "one in 2, and here another"),
        ("gemma", {"tie_word_embeddings": False}, "gguf", {}, "gives a gemma no head but its embedding"),
        ("gemma3_text", {"final_logit_softcapping": 9.0}, "gguf", {}, "does not cap the logits of a gemma3_text"),
        ("gpt2", {"scale_attn_weights": False}, "gguf", {}, "by 0.353553, not by 1"),
        ("gpt2", {"activation_function": "relu"}, "gguf", {}, "computes gelu_tanh here, not 'relu'"),
        ("gpt2", {"activation_function": "quick_gelu"}, "onnx", {"flavour": "portable"}, "not 'quick_gelu'$"),
        ("phi3", {"sliding_window": 16}, "gguf", {}, "a sliding window of 16 tokens is not written"),
        ("gpt2", {}, "onnx", {}, "not of gpt2; use flavour: portable"),
        ("gemma", {}, "onnx", {}, "not of gemma; use flavour: portable"),
        ("gpt2", {}, "checkpoint", {"format": "gptq"}, "no layout for the linears of a gpt2"),
    ],
)
def test_formats_that_compute_otherwise_refuse(
    kind: str, options: dict[str, object], format: str, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        exporter(format)(**fields).check(facts_of(kind, **options))


def test_coded_linears_that_transformers_keeps_transposed_stay_out_of_checkpoints() -> None:
    reason = Checkpoint().refuses(Encoding("int4", 32), "transformer.h.0.attn.c_attn.weight")
    assert reason is not None and "(in, out), where it opens no codes" in reason


def test_which_blocks_keep_a_window_is_not_known_before_some_are_removed() -> None:
    before = facts_of("gemma3_text")
    after = step("prune.layers")(count=1).facts_after(before)
    assert after.kinds is None and step("prune.layers")(count=0).facts_after(before) == before
    with pytest.raises(RecipeError, match="one in 6, and which of them are left is known only once"):
        Gguf().check(after)
    model = tiny_of("gemma3_text")
    step("prune.layers")(count=1).apply(model, context("gemma3_text"))
    assert model.facts.kinds is not None and len(model.facts.kinds) == 5


@pytest.mark.parametrize(
    "kind,key", [("gpt2", "scale_attn_by_inverse_layer_idx"), ("gemma", "use_bidirectional_attention")]
)
def test_a_variant_that_is_not_supported_is_refused(kind: str, key: str) -> None:
    config = tiny_module(kind).config.to_dict()
    with pytest.raises(RecipeError, match=f"{kind!r} is not supported with {key}=True"):
        Facts.from_config({**config, key: True})


def test_what_a_config_leaves_out_has_the_architectures_own_value() -> None:
    config = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "hidden_act": "gelu"}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 99}
    gemma = Facts.from_config({**config, "model_type": "gemma"})
    assert gemma.tied and gemma.head_size == 256 and gemma.activation == "gelu_tanh" and gemma.logit_cap is None
    second = Facts.from_config({**config, "model_type": "gemma2"})
    assert (second.logit_cap, second.attention_cap, second.query_scale) == (30.0, 50.0, 1 / 16)
    assert second.kinds == ("sliding_attention", "full_attention", "sliding_attention") and second.window is None
    assert Facts.from_config({**config, "model_type": "llama"}).activation == "gelu"
    gpt2 = Facts.from_config({"model_type": "gpt2", "vocab_size": 9, "n_embd": 32, "n_layer": 1, "n_head": 2})
    assert gpt2.sizes["mlp"] == 128 and gpt2.context_length == 1024 and gpt2.tied


def test_streaming_transposed_linears_is_refused_before_and_while_loading(tmp_path: Path) -> None:
    Checkpoint().write(tiny_of("gpt2"), tmp_path / "model")
    with pytest.raises(RecipeError, match="streaming reads no transposed linears"):
        source.load(str(tmp_path / "model"), streaming=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path / 'model'}\nstreaming: true\ndata: {{evaluation: [{{source: pydoc}}]}}\n"
        "release: [perplexity: {max_increase: 5%}]\ngate: [perplexity: {max_increase: 5%}]\n"
        "steps: [quantize.rtn: {encoding: int8}]\n"
    )
    with pytest.raises(RecipeError, match=r"recipe.yaml:2:\d+.*streaming: reads no transposed linears"):
        refusals.check(load(recipe), facts_of("gpt2"))


def accepts(made: Exporter, facts: Facts) -> bool:
    try:
        made.check(facts)
    except RecipeError:
        return False
    return True


def test_the_table_in_the_docs_is_what_exporters_take() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| `"]
    formats = (Gguf(), Onnx(flavour="portable"), Onnx(), Checkpoint())
    found = []
    for kind in KINDS:
        facts = facts_of(kind)
        linear = f"{next(iter(facts.linears))}.weight"
        cells = ["yes" if accepts(made, facts) else "no" for made in formats]
        if Checkpoint().refuses(Encoding("int8", 32), linear):
            cells[3] = "floats alone"
        found.append([kind, *cells])
    assert rows == found
