"""What pruned zeros bring an export, on real files in real runtimes: counts, the twin, bytes, speed, the decision."""

from __future__ import annotations

import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import provenance, run, timing, ungated, zeros
from compress.encodings import EncodedTensor, Encoding
from compress.interfaces import Context
from compress.plugin import exporter, step
from compress.report import summary_lines
from compress.report.zeros import notes, sentence
from compress.steps.quantize._fields import round_to_nearest
from compress.store import Store
from export.gguf import Gguf
from tests.test_run import INT8, load, place  # noqa: F401 (a fixture)
from tests.tiny_classifier import tiny_classifier
from tests.tiny_gguf import tiny
from tests.tiny_seq2seq import tiny_seq2seq

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODINGS = [
    *(Encoding(name, 32) for name in ("int8", "int4", "int2", "nf4", "mxfp4")),
    Encoding("int4", 32, symmetric=False),
    Encoding("fp16"),
    Encoding("fp32"),
]


def pruned(model: Any, sparsity: float = 0.5, **layers: Any) -> Any:
    step("prune.magnitude")(sparsity=sparsity, **layers).apply(model, Context(seed=0))
    return model


def measured(model: Any, name: str, folder: Path, **fields: Any) -> tuple[zeros.Zeros, Path]:
    """What pruned zeros bring the files in the new folder."""
    made, out = exporter(name)(**fields), folder / name
    out.mkdir()
    made.write(model, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    found = zeros.measure(model, made, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before  # the twin leaves nothing, and changes nothing
    assert list(folder.iterdir()) == [out]
    return found, out


# --- the twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_the_twin_has_no_zeros_where_weights_were_pruned_and_equals_elsewhere(encoding):
    model = pruned(tiny())
    for name, mask in model.masks.items():
        mask[0] = False  # a row pruned as a whole: its scales are zero
        W = model.parameter(name).data.masked_fill_(~mask, 0.0)
        if encoding.is_coded:
            model.store(name, round_to_nearest(name, W, encoding, search=False))
        elif encoding.name == "fp16":
            model.store(name, EncodedTensor(encoding, W.half()))
    model.touch()
    digest, twin = model.digest, zeros.without_zeros(model)
    for name, own in model.tensors():
        other = twin.tensor(name)
        a, b = (t.decode() if isinstance(t, EncodedTensor) else t for t in (own, other))
        kept = model.masks.get(name, torch.ones_like(a, dtype=torch.bool))
        assert torch.equal(a[kept], b[kept]) and not a[~kept].any() and b[~kept].all(), name
        if isinstance(own, EncodedTensor):
            assert own.encoding == other.encoding and own.codes.dtype == other.codes.dtype
    assert [name for name, _ in twin.tensors()] == [name for name, _ in model.tensors()]
    model.touch()
    assert model.digest == digest  # it shares memory with the twin, which changes none


# --- what is measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_dense_files_profit_neither_in_bytes_nor_in_speed(name, tmp_path):
    model = pruned(tiny(), layers={"*.self_attn.*": 0.0})
    step("quantize.rtn")(encoding="int8", group_size=32).apply(model, Context(seed=0))
    found, out = measured(model, name, tmp_path)
    mlp = {n: s for n, s in model.facts.linears.items() if ".mlp." in n}
    sizes = {n: a * b for n, (a, b) in mlp.items()}
    assert found.tensors == len(mlp) and found.masked == sum(sizes.values())
    assert found.pruned == found.pruned_linear == sum(s // 2 for s in sizes.values())
    assert found.linear == sum(a * b for a, b in model.facts.linears.values())
    assert found.size_bytes == found.size_bytes_without == sum(p.stat().st_size for p in out.iterdir())
    assert not found.gains and not found.not_measured and found.speeds.keys() == {"prefill", "decode"}
    for speed in found.speeds.values():
        assert (
            speed.lower <= speed.ratio <= speed.upper and 1 / 3 < speed.ratio < 3 and timing.ROUNDS[0] <= speed.rounds
        )
    share = f"{100 * found.pruned / found.linear:.1f} % of all linears"
    assert f"pruned zeros (50.0 % of 6 masked tensors, {share}) bring this file no" in sentence(found)
    assert "as many bytes as without them; prefill " in sentence(found) and sentence(found).isascii()
    lasting = sentence(found, lasting=True)
    assert "times as fast" not in lasting and "not shown to be faster" in lasting


class Squeezed(Gguf):
    """A GGUF file that is compressed on the disk, which profits from zeros."""

    def write(self, model, out):
        """The file, and then its bytes by LZMA."""
        super().write(model, out)
        (file,) = out.iterdir()
        (out / "model.xz").write_bytes(lzma.compress(file.read_bytes()))
        file.unlink()

    def open(self, path):
        """In llama.cpp, from a folder of its own."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model.gguf").write_bytes(lzma.decompress((path / "model.xz").read_bytes()))
            return super().open(Path(folder))


def test_a_file_that_profits_from_zeros_is_said_to(tmp_path):
    model, out = pruned(tiny(), sparsity=0.7), tmp_path / "out"
    step("quantize.rtn")(encoding="int8", group_size=32).apply(model, Context(seed=0))
    out.mkdir()
    Squeezed().write(model, out)
    found = zeros.measure(model, Squeezed(), out)
    assert found.gains == ["bytes"] and found.size_bytes == (out / "model.xz").stat().st_size
    saved = found.size_bytes_without - found.size_bytes
    assert saved > 0.05 * found.size_bytes
    told = f"bring this file fewer bytes: {found.size_bytes / 1e3:.1f} kB, {saved:,} bytes fewer than without them; "
    assert told in sentence(found)


def test_a_runtime_that_is_faster_is_said_to_be(tmp_path):
    # No runtime here skips zeros: a model with a quarter of the width stands for a file that one reads faster.
    opened = []
    for width in (64, 256):
        folder = tmp_path / str(width)
        folder.mkdir()
        Gguf().write(tiny(hidden_size=width, intermediate_size=4 * width, head_dim=width // 4), folder)
        opened.append(timing.stopwatch(Gguf().open(folder)))
    counts = {"pruned": 3, "masked": 6, "tensors": 1, "pruned_linear": 3, "linear": 9}
    sizes = {"size_bytes": 1000, "size_bytes_without": 1000}
    faster = zeros.Zeros(**counts, **sizes, **timing.compare(*opened, seconds=2.0))
    assert faster.gains == ["prefill", "decode"] and not faster.unclear
    text = sentence(faster)
    assert "bring this file a faster prefill and faster decoding: 1.0 kB, as many bytes as without them; " in text
    assert "timed: prefill and decode, prefill and decode faster than without" in sentence(faster, lasting=True)
    slower = zeros.Zeros(**counts, **sizes, **timing.compare(*reversed(opened), seconds=2.0))
    assert not slower.gains and not slower.unclear and slower.decode.upper < 1
    assert "bring this file nothing: " in sentence(slower)
    wide = faster.model_copy(update={"prefill": faster.prefill.model_copy(update={"lower": 1.0})})
    assert wide.gains == ["decode"] and wide.unclear == ["prefill"]  # all of the interval must be beyond the limit
    for own, other in zip(faster.speeds.values(), slower.speeds.values()):
        assert own.tokens_per_second > own.reference_tokens_per_second
        assert other.tokens_per_second < other.reference_tokens_per_second


def test_what_has_no_runtime_of_its_own_says_that_speed_is_not_measured(tmp_path):
    model = pruned(tiny())
    step("quantize.rtn")(encoding="int8", group_size=32, embeddings="fp16").apply(model, Context(seed=0))
    found, _ = measured(model, "checkpoint", tmp_path)
    assert found.size_bytes == found.size_bytes_without and not found.speeds and not found.gains
    assert "bring this file no fewer bytes: " in sentence(found)
    assert "not measured: speed (torch decodes the file to floats" in sentence(found)


def test_classifiers_and_models_of_pairs_are_measured_as_far_as_they_go(tmp_path):
    for kind, model in (("classifier", pruned(tiny_classifier())), ("pairs", pruned(tiny_seq2seq()))):
        (tmp_path / kind).mkdir()
        found, _ = measured(model, "onnx", tmp_path / kind, flavour="portable")
        assert found.size_bytes == found.size_bytes_without and found.pruned == found.pruned_linear > 0
        assert [*found.speeds] == (["prefill"] if kind == "classifier" else ["prefill", "decode"])
        assert ("a classifier decodes nothing" in sentence(found)) == (kind == "classifier")
        assert not found.gains


def test_encodings_without_a_zero_are_said_to_be_unmeasured(tmp_path):
    model = tiny(hidden_size=256, intermediate_size=256, head_dim=64)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.parameter(name).data.zero_()
    model.masks[name] = torch.zeros_like(weight, dtype=torch.bool)
    step("quantize.ggml")(type="q4_k").apply(model, Context(seed=0, calibration=[torch.arange(32)]))
    found, _ = measured(model, "gguf", tmp_path)
    assert found.size_bytes_without is None and not found.speeds and found.pruned == weight.numel()
    assert "an unknown gain: not measured: bytes and speed (q4_k holds no zero to replace)" in sentence(found)


# --- where it is said ------------------------------------------------------------------------------------


def test_a_run_records_reports_and_ships_the_finding(place, tmp_path):  # noqa: F811
    steps = f"[{{prune.magnitude: {{sparsity: 0.02}}}}, {{{INT8}}}]"
    store = Store(tmp_path / "home")
    record, folder = run.apply(load(place, steps, "[gguf: {}]"), tmp_path / "run", store)
    assert record.status == "passed", record.error
    (export,) = record.exports
    found = export.zeros
    assert found.size_bytes == found.size_bytes_without == export.size_bytes and not found.gains
    assert found.pruned == found.pruned_linear > 0.019 * found.linear and found.masked == found.linear
    told = sentence(found)
    assert any(line.strip() == told for line in summary_lines(json.loads((folder / "run.json").read_text())))
    assert f"- gguf: {told}" in (folder / "report.md").read_text()
    assert "bring this file no" in (folder / "report.html").read_text()
    shipped = folder / "artifacts" / "gguf"
    assert f"Measured: {sentence(found, lasting=True)}." in (shipped / "README.md").read_text()
    facts = provenance.read(shipped)["zeros"]
    assert facts["pruned"] == found.pruned and not {"prefill", "decode"} & facts.keys()  # equal runs ship equal bytes
    assert {p.name for p in shipped.iterdir()} == {f.name for f in export.files}
    again, _ = run.apply(load(place, steps, "[gguf: {}]"), tmp_path / "again", store)
    assert again.exports[0].zeros == found  # remembered with the gate's figures
    assert [f.sha256 for f in again.exports[0].files] == [f.sha256 for f in export.files]


def test_an_export_without_a_run_says_it_and_one_without_masks_does_not(tmp_path):
    model = pruned(tiny())
    made = compress.export(model, "gguf", tmp_path / "masked")
    assert made.zeros.size_bytes == made.size_bytes and sentence(made.zeros) in ungated.lines(made)
    assert "Measured: pruned zeros (" in (tmp_path / "masked" / "README.md").read_text()
    plain = compress.export(tiny(), "gguf", tmp_path / "plain")
    assert plain.zeros is None and "zeros" not in " ".join(ungated.lines(plain))
    assert "zeros" not in (tmp_path / "plain" / "README.md").read_text()
    whole = tiny()
    whole.masks = {name: torch.ones_like(mask) for name, mask in model.masks.items()}
    assert not zeros.pruned(whole)


def test_a_record_without_the_figures_says_nothing():
    assert notes(None) == notes({}) == notes({"pruned": "<b>"}) == []
