"""Encoder-decoders as portable ONNX: exact weights, standard operators, onnxruntime's logits, and a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from compress import measure, opening, pairs, parity, provenance, run, ungated, verify
from compress import recipe as recipes
from compress.encodings import Encoding
from compress.errors import Corrupt, RecipeError
from compress.exporting import weights_exact
from compress.interfaces import Documents
from compress.pairs import joined
from compress.seq2seq import Seq2Seq
from compress.store import Store
from export.onnx import Onnx
from tests.tiny_onnx import encode
from tests.tiny_seq2seq import KINDS, saved, sentences, tiny_seq2seq, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
PORTABLE = Onnx(flavour="portable")
TEXTS = [joined(row["source"], row["target"]) for row in sentences(5, seed=3)]
TEXTS.append(joined("loss " * 60, "zebra <pad> proof " * 60))
DATA = Documents("pairs", [(str(i), text) for i, text in enumerate(TEXTS)], "pairs", 96)
Made = tuple[Seq2Seq, Path]


def mixed(name: str) -> Encoding | None:
    """Codes with zero points and without, in groups and whole rows, and floats, beside each other."""
    if "shared" in name or "lm_head" in name:
        return Encoding("int8", 16)
    if name.endswith("q.weight"):
        return Encoding("int4", 16, symmetric=False)
    if name.endswith("k.weight"):
        return Encoding("int2", 8)
    if name.endswith("v.weight"):
        return Encoding("bf16")
    return None if "DenseReluDense.wi" in name else Encoding("int8")


CASES: dict[str, Callable[[str], Encoding | None]] = {"mixed": mixed, "plain": lambda name: None}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """Exports by kind and case, each written once."""
    done: dict[tuple[str, str], Made] = {}

    def make(kind: str, case: str) -> Made:
        if (kind, case) not in done:
            model = tiny_seq2seq(kind)
            path = tmp_path_factory.mktemp("onnx") / "out"
            PORTABLE.write(encode(model, CASES[case]), path)
            done[kind, case] = model, path
        return done[kind, case]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_files_hold_the_very_tensors_and_onnxruntime_computes_the_same(export: Any, kind: str, case: str) -> None:
    model, path = export(kind, case)
    assert weights_exact(model, PORTABLE, path)
    assert {name for name, _ in PORTABLE.stored(path)} == {name for name, _ in model.tensors()}
    opened: Any = measure.open_model(str(path))
    windows = [model.encode(text) for text in TEXTS]
    assert [opened.encode(text) for text in TEXTS] == windows  # the last one is cut
    for ours, theirs in zip(model.logits(windows), opened.logits(windows), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(opened.decode_logits(windows[0]), next(model.logits(windows[:1])), atol=1e-4, rtol=0)
    for window in windows:
        prompt = pairs.prompt_of(opened, window)
        assert opened.generate(prompt, 12) == model.generate(prompt, 12)
    assert pairs.paired(opened) and opened.eos_ids == model.eos_ids == {1} and "no cache" in opened.compute
    checks = parity.parity_checks(opened, model, [DATA])
    assert [(c.metric, c.verdict) for c in checks] == [
        ("parity", "PASS"),
        ("parity_max", "PASS"),
        ("parity_tokens", "PASS"),
    ]
    (decoded,) = parity.decode_check(opened, [DATA])
    assert decoded.verdict == "PASS" and decoded.tokens > 100
    with pytest.raises(RecipeError, match="reads a source and writes a target"):
        opened.stream([2, 3], 1)
    opened.close()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_sessions_take_any_batch_and_padding_of_the_source_on_either_side(export: Any, kind: str) -> None:
    model, path = export(kind, "mixed")
    sessions = {}
    for half, names in (
        ("encoder", ["input_ids", "attention_mask"]),
        ("decoder", ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]),
    ):
        graph = onnx.load(path / f"{half}_model.onnx", load_external_data=False)
        assert {node.domain for node in graph.graph.node} == {""} and graph.opset_import[0].version == 21
        assert [value.name for value in graph.graph.input] == names
        sessions[half] = onnxruntime.InferenceSession(
            str(path / f"{half}_model.onnx"), providers=["CPUExecutionProvider"]
        )
    sources, targets = zip(*(pairs.parted(text) for text in TEXTS[:4]), strict=True)
    written = model.tokenizer(list(targets), padding=True, return_tensors="pt")["input_ids"]
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        read = model.tokenizer(list(sources), padding=True, return_tensors="pt")
        model.tokenizer.padding_side = "right"
        ids, mask = read["input_ids"], read["attention_mask"]
        with torch.no_grad():
            expected = model.module(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
        (states,) = sessions["encoder"].run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        feed = {"encoder_hidden_states": states, "encoder_attention_mask": mask.numpy(), "input_ids": written.numpy()}
        (found,) = sessions["decoder"].run(None, feed)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_distances_beyond_the_farthest_are_alike_as_in_the_model(export: Any) -> None:
    model, path = export("t5", "plain")
    window = model.encode(TEXTS[-1])
    assert len(window) == 96  # 48 a side, and all distances from 20 on share a bucket
    opened: Any = Onnx().open(path)
    torch.testing.assert_close(next(opened.logits([window])), next(model.logits([window])), atol=1e-4, rtol=0)
    opened.close()


def test_a_shared_embedding_is_stored_once(export: Any) -> None:
    model, path = export("t5", "mixed")
    matrices = sum(encoded.nominal_bytes for encoded in model.encoded.values())
    floats = sum(4 * t.numel() for _, t in model.tensors() if isinstance(t, Tensor))
    widened = sum(e.codes.numel() // 4 for e in model.encoded.values() if e.encoding.name == "int2")  # in 4 bits
    assert (path / "model.onnx.data").stat().st_size == pytest.approx(matrices + floats + widened, rel=0.002)


def test_where_two_models_part_is_named(export: Any) -> None:
    model, path = export("t5", "plain")
    for name, expected in (
        ("encoder.block.1.layer.0.SelfAttention.o.weight", "encoder.block.1.layer.0"),
        ("decoder.block.2.layer.1.EncDecAttention.v.weight", "decoder.block.2.layer.1"),
        ("decoder.block.0.layer.2.DenseReluDense.wi.weight", "decoder.block.0.layer.2"),
    ):
        twin = tiny_seq2seq()
        with torch.no_grad():
            twin.parameter(name).mul_(3)
        twin.touch()
        opened = Onnx().open(path)
        failed = [c for c in parity.parity_checks(opened, twin, [DATA]) if c.verdict == "FAIL"]
        assert failed and all(f"part in {expected}:" in c.definition for c in failed)
        opened.close()


def test_damaged_folders_are_refused(export: Any, tmp_path: Path) -> None:
    _, whole = export("t5", "mixed")
    files = ("encoder_model.onnx", "decoder_model.onnx", "model.onnx.data", "config.json", "generation_config.json")
    for name in (*files, "tokenizer.json"):
        copied = Path(shutil.copytree(whole, tmp_path / name))
        held = (copied / name).read_bytes()
        (copied / name).write_bytes(held[: len(held) // 2])
        with pytest.raises(Corrupt):
            Onnx().open(copied)
        (copied / name).unlink()
        with pytest.raises(Corrupt):
            Onnx().open(copied)


def test_halves_that_read_one_tensor_from_two_places_are_refused(export: Any, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(export("t5", "mixed")[1], tmp_path / "copy"))
    graph = onnx.load(copied / "decoder_model.onnx", load_external_data=False)
    held = {tensor.name: tensor for tensor in graph.graph.initializer}
    entry = next(e for e in held["shared.weight.scales"].external_data if e.key == "offset")
    entry.value = str(int(entry.value) + 2)
    onnx.save(graph, copied / "decoder_model.onnx")
    with pytest.raises(Corrupt, match="shared.weight.scales: two graphs read it from different places"):
        list(PORTABLE.stored(copied))


def test_exports_repeat_byte_for_byte(export: Any, tmp_path: Path) -> None:
    model, path = export("t5 v1.1", "mixed")
    PORTABLE.write(model, tmp_path / "again")
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


RECIPE = """
model: {place}/model
data:
  evaluation: [{{source: "file:{place}/rows.jsonl", length: 96}}]
  calibration: {{source: "file:{place}/rows.jsonl", tokens: 1024, length: 32}}
  selection: {{source: "file:{place}/rows.jsonl", tokens: 512, length: 32}}
release:
  - perplexity: {{max_increase: 5%}}
  - divergence: {{max_mean: 0.05}}
gate: [{{divergence: {{max_mean: 0.05}}}}]  # random weights predict nothing, so that perplexity hardly moves
steps:
  - quantize.rtn: {{encoding: int2, group_size: 32}}
    otherwise: [{{quantize.gptq: {{encoding: int8, group_size: 32}}}}]
export: [onnx: {{flavour: portable}}]
"""


def test_a_run_rejects_accepts_and_ships_what_verifies(tmp_path: Path) -> None:
    saved(tiny_seq2seq(), tmp_path / "model")
    write_pairs(tmp_path / "rows.jsonl", sentences(400, seed=5))
    recipe = recipes.load(RECIPE.format(place=tmp_path))
    record, folder = run.apply(recipe, tmp_path / "run", Store(tmp_path / "home"))
    assert record.status == "passed", record.error
    (step,) = record.steps
    assert [a.verdict for a in step.attempts] == ["FAIL", "PASS"]
    assert {a.verdict for a in record.assays} == {"SEEN"} and record.baseline
    assert record.baseline.metrics[0].metric == "perplexity"
    assert len(step.layer_errors) == 2 * 6 + 3 * 10 and all(0 < e < 0.01 for e in step.layer_errors.values() if e)
    (made,) = record.exports
    assert made.weights_exact and made.runtime.startswith("onnxruntime")
    names = {"perplexity", "divergence", "decode", "parity", "parity_max", "parity_tokens"}
    assert {c.metric for c in made.gate.checks} == names
    out = folder / made.path
    assert "match" in verify.verify(out)[0]
    verify.verify(folder)
    facts = provenance.read(out)
    assert facts["task"] == "text2text-generation" and "ORTModelForSeq2SeqLM" in facts["usage"]["optimum"]
    assert "pipeline_tag: text2text-generation" in (out / "README.md").read_text()
    with pytest.raises(RecipeError, match="is an export"):
        opening.locate(str(out))


def test_an_export_by_hand_is_exact_and_says_how_to_measure_it(tmp_path: Path) -> None:
    made = ungated.export(tiny_seq2seq(), "onnx", tmp_path / "out", flavour="portable")
    assert made.weights_exact and "perplexity,divergence" in made.hint
    assert {file.name for file in made.files} >= {"encoder_model.onnx", "decoder_model.onnx", "model.onnx.data"}
    with pytest.raises(RecipeError, match="use flavour: portable"):
        ungated.export(tiny_seq2seq(), "onnx", tmp_path / "other")
