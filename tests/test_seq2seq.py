"""Encoder-decoders: facts, pairs, opening, what is scored, steps, and what is refused before weights load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from compress import artifact, inspection, measure, pairs, plan, plugin, recipe, refusals, source
from compress.architectures import Facts
from compress.blocks import walk
from compress.data import Request, documents, split, whole
from compress.errors import Corrupt, RecipeError
from compress.interfaces import Context
from compress.numerics.divergence import divergence
from compress.numerics.sampling import gumbel
from compress.pairs import MARK, joined
from compress.plugin import evaluator
from compress.seq2seq import Seq2Seq
from tests.tiny import tiny_model
from tests.tiny_seq2seq import KINDS, saved, sentences, tiny_seq2seq, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [joined(row["source"], row["target"]) for row in sentences(6, seed=3)]
STEPS: dict[str, dict[str, Any]] = {
    "quantize.rtn": {"group_size": 16, "embeddings": "int4"},
    "quantize.cast": {},
    "quantize.hqq": {"group_size": 16},
}


def expected(model: Seq2Seq, text: str) -> tuple[torch.Tensor, float]:
    """Logits of transformers alone for one pair, and its loss on the target."""
    source, target = (torch.tensor([ids]) for ids in model.tokenizer(list(pairs.parted(text)))["input_ids"])
    with torch.no_grad():
        out = model.module(input_ids=source, labels=target)
    return out.logits[0], float(out.loss) * target.shape[1]


# --- facts and pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_every_matrix_and_every_linear_of_the_blocks(kind: str) -> None:
    model = tiny_seq2seq(kind)
    facts, module = model.facts, model.module
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.dim() == 2 and "relative" not in n}
    assert facts.matrices == shapes and facts.paired and facts.tied == (kind != "t5 v1.1")
    assert facts.parameters + facts.floats == sum(p.numel() for p in module.parameters())
    inside = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and ".block." in n]
    assert list(facts.linears) == inside  # in the order of computation
    arch = facts.architecture
    norms = {n for n, m in module.named_modules() if n.endswith("layer_norm")}
    stated = {f"{arch.blocks}.{i}.{n}" for i in range(3) for n in arch.block_norms}
    stated |= {f"encoder.block.{i}.{n}" for i in range(2) for n in arch.encoder_norms}  # type: ignore[attr-defined]
    assert norms == {*stated, arch.final_norm, "encoder.final_layer_norm"}
    assert {name for stage in arch.stages for name in stage} == set(arch.linears) and len(arch.stages) == 7
    assert (facts.layers, facts.encoder_layers, facts.context_length, facts.query_scale) == (3, 2, 96, 1.0)
    assert facts.output_scale == (32**-0.5 if kind == "t5" else 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["T5EncoderModel"]}, "supported as …ForConditionalGeneration, not as T5EncoderModel"),
        ({"architectures": None}, "not as no head"),
        ({"model_type": "umt5"}, "'umt5' is not supported: it reads a source .*, and of such models t5 and mt5 are;"),
        ({"model_type": "umt5", "is_encoder_decoder": False}, "'umt5' is not supported; supported: .*gpt2, t5, mt5"),
        ({"architectures": ["T5ForSequenceClassification"]}, "a classifier of architecture 't5' is not supported"),
    ],
)
def test_other_heads_and_relatives_are_refused_from_the_config(change: dict[str, Any], message: str) -> None:
    config = {**tiny_seq2seq().module.config.to_dict(), "architectures": ["T5ForConditionalGeneration"]}
    assert Facts.from_config({**config, "num_decoder_layers": None}).layers == 2
    assert Facts.from_config({**config, "feed_forward_proj": "gated-gelu"}).activation == "gelu_tanh"
    with pytest.raises(RecipeError, match=message):
        Facts.from_config({**config, **change})


def test_each_side_is_cut_and_keeps_what_ends_it() -> None:
    model = tiny_seq2seq()
    ids = model.encode(joined("the model " * 60, "a loss <pad> of proof " * 60))
    source, target = pairs.split(ids, model.start)
    assert len(source) == len(target) == 48 and source[-1] == target[-1] == 1 and target[0] == 0
    assert ids.count(0) == 1 and len(ids) == model.context_length
    for text in ("no pair", f"a{MARK}b{MARK}c"):
        with pytest.raises(RecipeError, match='expected JSON lines with "source" and "target"'):
            model.encode(text)
    with pytest.raises(RecipeError, match="3 tokens without a source and a start .* raise that"):
        next(model.logits([[0, 5, 6]]))


def test_rows_of_a_file_are_pairs(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "rows.jsonl", [{"source": "a", "target": "b"}, {"text": "c", "source": "d"}])
    assert [d.text for d in documents(f"file:{path}")] == [joined("a", "b"), "c"]
    write_pairs(path, [{"source": "a"}])
    with pytest.raises(RecipeError, match=':1: expected a JSON object with "text", or with "source" and "target"'):
        documents(f"file:{path}")


# --- opening ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_opens_computes_what_transformers_does_and_survives_saving(kind: str, tmp_path: Path) -> None:
    made = tiny_seq2seq(kind)
    model = source.load(str(saved(made, tmp_path / "model")))
    assert isinstance(model, Seq2Seq) and model.digest == made.digest
    assert source.facts(source.resolve(str(tmp_path / "model"))) == model.facts == made.facts
    windows = [model.encode(text) for text in TEXTS]
    for text, rows in zip(TEXTS, model.logits(windows), strict=True):
        torch.testing.assert_close(rows[:-1], expected(model, text)[0], atol=1e-4, rtol=0)  # padding is not seen
    artifact.save(model, tmp_path / "artifact")
    artifact.verify(tmp_path / "artifact")
    back = artifact.load(tmp_path / "artifact")
    assert isinstance(back, Seq2Seq) and back.digest == model.digest and back.facts == model.facts
    for a, b in zip(model.logits(windows), back.logits(windows), strict=True):
        assert torch.equal(a, b)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = saved(tiny_seq2seq(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(Corrupt, match="tensor encoder.block.2.* is missing"):
        source.load(str(folder))


def test_a_decoder_that_starts_with_the_end_of_a_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="starts with token 1, which ends a text"):
        tiny_seq2seq(decoder_start_token_id=1)


# --- what it computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_through_the_cache_is_reading_at_once(kind: str) -> None:
    model = tiny_seq2seq(kind)
    window = model.encode(TEXTS[0])
    torch.testing.assert_close(model.decode_logits(window), next(model.logits([window])), atol=1e-4, rtol=0)


def test_generation_is_transformers_greedy_one() -> None:
    model = tiny_seq2seq(num_decoder_layers=2)  # its `generate` counts the cache's layers by the encoder's
    for text in TEXTS:
        prompt = pairs.prompt_of(model, model.encode(text))
        tokens = model.generate(prompt, 12)
        ids = torch.tensor([prompt[:-1]])
        found = model.module.generate(ids, max_new_tokens=12, do_sample=False, num_beams=1)[0, 1:]
        assert tokens == found.tolist()
        assert model.generate([*prompt, *tokens[:2]], 10) == tokens[2:]
    assert model.generate(prompt, 12, gumbel(2.0, 5)) != tokens
    for method in (model.stream, model.branch_logits, model.encode_chat):
        with pytest.raises(RecipeError, match="reads a source and writes a target"):
            method([2, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_targets_given_their_sources(kind: str, tmp_path: Path) -> None:
    model = tiny_seq2seq(kind)
    rows = sentences(20)
    path = write_pairs(tmp_path / "rows.jsonl", rows)
    found = measure.evaluate(model, ["perplexity"], source=f"file:{path}", documents=None, length=96)["metrics"][0]
    texts = [joined(row["source"], row["target"]) for row in rows]
    nats = sum(expected(model, text)[1] for text in texts)
    tokens = sum(len(model.tokenizer(row["target"])["input_ids"]) for row in rows)
    assert found["tokens"] == tokens and found["examples"] == 20
    assert found["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_another_source_or_target_changes_the_loss_and_identical_weights_lose_nothing(tmp_path: Path) -> None:
    model, twin = tiny_seq2seq(), tiny_seq2seq()
    with torch.no_grad():
        twin.parameter("encoder.block.1.layer.1.DenseReluDense.wo.weight").mul_(3)
    twin.touch()
    path = write_pairs(tmp_path / "rows.jsonl", sentences(20))
    for other, low, high in ((tiny_seq2seq(), -1e-9, 1e-6), (twin, 1e-3, 10)):
        (found,) = measure.evaluate(
            other, ["divergence"], against=model, source=f"file:{path}", documents=None, length=96
        )["metrics"]
        assert low < found["value"] < high
    with pytest.raises(RecipeError, match="a pair is longer than the data's `length`"):
        measure.evaluate(model, ["perplexity"], source=f"file:{path}", documents=None, length=8)
    with pytest.raises(RecipeError, match="accuracy: asks how a text goes on"):
        measure.evaluate(model, ["accuracy"], source=f"file:{path}")
    with pytest.raises(RecipeError, match="pydoc: the model reads a source and writes a target"):
        measure.evaluate(model, ["perplexity"], source="pydoc", documents=5)
    with pytest.raises(RecipeError, match="the model goes on with a text, and found a pair"):
        measure.evaluate(tiny_model(), ["perplexity"], source=f"file:{path}", documents=5)


# --- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_stores_what_it_says_and_it_survives_saving(kind: str, name: str, tmp_path: Path) -> None:
    model, step = tiny_seq2seq(kind), plugin.step(name)(**STEPS[name])
    step.check(model.facts)
    step.apply(model, Context(seed=0))
    assert {n: e.encoding for n, e in model.encoded.items()} == dict(step.encodings(model.facts))
    assert model.encoded.keys() == model.facts.matrices.keys() and step.takes_pairs
    artifact.save(model, tmp_path / "artifact")
    back = artifact.load(tmp_path / "artifact")
    assert back.digest == model.digest
    window = model.encode(TEXTS[0])
    assert torch.equal(next(back.logits([window])), next(model.logits([window])))


def test_blocks_are_walked_through_both_halves_and_feed_each_other() -> None:
    model = tiny_seq2seq("t5 v1.1")
    windows = [torch.tensor(model.encode(text)) for text in TEXTS]
    blocks = list(walk(model, windows, windows_per_batch=2))
    names = [next(iter(block.linears)).rpartition(".layer")[0] for block in blocks]
    assert names == [*(f"encoder.block.{i}" for i in range(2)), *(f"decoder.block.{i}" for i in range(3))]
    norm, found = model.module.decoder.final_layer_norm, {}
    with torch.inference_mode():
        for state in blocks[-1].advance():
            for rows in model.head(norm(state)):
                found[tuple(rows.argmax(1).tolist())] = rows
    for window in windows:  # products of blocks are bfloat16
        rows = next(model.logits([window.tolist()]))
        assert min(float((rows - other).abs().mean()) for other in found.values() if other.shape == rows.shape) < 0.05


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_originals_of_both_halves_are_of_the_same_first_batches(tokens: int) -> None:
    model = tiny_seq2seq("t5 v1.1")
    rows = sentences(20, seed=3)
    windows = [torch.tensor(model.encode(joined(row["source"], row["target"]))) for row in rows]
    blocks = list(walk(model, windows, windows_per_batch=2, originals=tokens))
    read, written = ([len(X) for X in next(iter(block.originals.values()))] for block in (blocks[0], blocks[-1]))
    both = [min(pair) for pair in zip(read, written, strict=True)]
    assert sum(both[:-1]) < tokens
    assert len(both) == len(blocks[0]._states) if tokens == 10_000 else sum(both) >= tokens


def test_gptq_loses_less_than_rounding_in_both_halves() -> None:
    kind = "t5 v1.1"
    rows = sentences(300, seed=8)
    baseline, fields = tiny_seq2seq(kind), {"encoding": "int3", "group_size": 16, "embeddings": "int8"}
    texts = [baseline.encode(joined(row["source"], row["target"])) for row in rows]
    context = Context(seed=0, calibration=[torch.tensor(ids) for ids in texts[:200]])
    losses = {}
    for name in ("quantize.rtn", "quantize.gptq"):
        model, step = tiny_seq2seq(kind), plugin.step(name)(**fields)
        step.apply(model, context)
        assert {n: e.encoding for n, e in model.encoded.items()} == dict(step.encodings(model.facts))
        p, q = (torch.cat(list(m.logits(texts[200:]))) for m in (baseline, model))
        losses[name] = float(divergence(p, q).kl.mean())
    assert losses["quantize.gptq"] < 0.8 * losses["quantize.rtn"], losses


def test_layer_errors_name_both_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, baseline = tiny_seq2seq(), tiny_seq2seq()
    plugin.step("quantize.rtn")(encoding="int4", group_size=16).apply(model, Context(seed=0))
    monkeypatch.chdir(tmp_path)  # which documents are drawn follows from the path, too
    path = write_pairs(Path("rows.jsonl"), sentences(400))
    (part,) = split([Request("selection", f"file:{path}", tokens=200, length=24)], 0)
    windows = whole(part, model.encode)
    assert 3 < len(windows) < 20 and sum(map(len, windows[:-1])) < 200 <= sum(map(len, windows))
    errors = inspection.layer_errors(model, baseline, windows)
    assert errors.keys() == baseline.facts.linears.keys() and all(0 < e < 0.5 for e in errors.values())


RECIPE = """
model: {model}
data:
  calibration: {{source: "{source}", tokens: 512, length: 96}}
  selection: {{source: "{source}", tokens: 512, length: 96}}
  evaluation: [{{source: "{source}", length: 96}}]
release: [{{perplexity: {{max_increase: 5%}}}}]
gate: off
steps: [{step}]
export: [{export}]
"""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"step": "{quantize.awq: {}}"},
            "awq: takes models that go on with a text, .*; use quantize.cast, quantize.gptq",
        ),
        ({"step": "{prune.wanda: {sparsity: 0.5}}"}, "t5 reads one and writes another"),
        ({"export": "gguf: {}"}, "gguf cannot write architecture 't5'"),
        ({"export": "checkpoint: {}"}, "t5 here writes a target given a source; export to onnx"),
        ({"export": "onnx: {}"}, "not of t5; use flavour: portable"),
        ({"source": "pydoc"}, "data.evaluation: pydoc: the model reads a source and writes a target"),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    saved(tiny_seq2seq(), tmp_path / "model")
    path = write_pairs(tmp_path / "rows.jsonl", sentences(150))
    fields = {"model": str(tmp_path / "model"), "source": f"file:{path}", "step": "{quantize.rtn: {}}"}
    fields |= {"export": "onnx: {flavour: portable}"}
    found = source.facts(source.resolve(fields["model"]))
    described = plan.describe(recipe.load(RECIPE.format(**fields)), found)
    assert described["parameters"] == found.parameters and described["steps"][0]["bits_per_weight"] < 10
    with pytest.raises(RecipeError, match=message):
        plan.describe(recipe.load(RECIPE.format(**{**fields, **changed})), found)


def test_bart_is_refused_by_the_plan_before_its_weights_load(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"d_model": 16, "vocab_size": 60, "max_position_embeddings": 32}
    for half in ("encoder", "decoder"):
        shape |= {f"{half}_layers": 1, f"{half}_ffn_dim": 32, f"{half}_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(**shape)).save_pretrained(tmp_path / "bart")
    (tmp_path / "bart" / "model.safetensors").unlink()
    path = write_pairs(tmp_path / "rows.jsonl", sentences(150))
    fields = {"model": str(tmp_path / "bart"), "source": f"file:{path}", "step": "{quantize.rtn: {}}"}
    asked = recipe.load(RECIPE.format(**fields, export="onnx: {flavour: portable}"))
    wanted = (
        "architecture 'bart' is not supported: it reads a source and writes a target, and of such models t5 and mt5"
    )
    with pytest.raises(RecipeError, match=wanted):
        plan.describe(asked, source.facts(source.resolve(asked.model)))


def test_pairs_are_refused_for_a_model_of_text(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "rows.jsonl", sentences(150))
    asked = recipe.load(RECIPE.format(model="m", source=f"file:{path}", step="{quantize.rtn: {}}", export="gguf: {}"))
    with pytest.raises(RecipeError, match="data.evaluation: .*the model goes on with a text"):
        refusals.check_documents(asked, tiny_model().facts, split([Request("evaluation", f"file:{path}")], 0))


def test_checks_say_what_takes_pairs() -> None:
    taking = {name for name in plugin.names("evaluator") if evaluator(name).takes_pairs}
    assert taking == {"perplexity", "divergence", "footprint", "size"}
    assert not pairs.paired(tiny_model()) and pairs.paired(tiny_seq2seq())
