"""The portable flavour of the ONNX exporter: standard operators, run by a plain onnxruntime session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from compress import measure, opening
from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError, Corrupt, RecipeError
from compress.exporting import weights_exact
from compress.model import Model
from export._onnx_portable import OPSET, build
from export.onnx import Onnx
from tests.tiny import byte_tokenizer
from tests.tiny_onnx import WINDOWS, divergence, encode, rounded, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PORTABLE = Onnx(flavour="portable")


def everything(name: str) -> Encoding | None:
    """Every width, with zero points and without, groups that are no power of two, whole rows, and floats."""
    table = {
        "q_proj": Encoding("int4", 64),
        "k_proj": Encoding("int2", 16, symmetric=False),
        "v_proj": None,
        "o_proj": Encoding("int3", 4),
        "gate_proj": Encoding("fp16"),
        "up_proj": Encoding("bf16"),
        "down_proj": Encoding("int8", 16, symmetric=False) if ".0." in name else Encoding("int4"),
        "embed_tokens": Encoding("int8", 32) if ".0." not in name else None,
    }
    return next(encoding for part, encoding in table.items() if part in name)


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool
    choose: Callable[[str], Encoding | None]
    hidden: int = 64


CASES = {
    "everything": Case("llama", True, everything),
    "int4": Case("llama", True, lambda name: Encoding("int4", 32), hidden=128),
    "asymmetric": Case("qwen2", False, lambda name: Encoding("int4", 8, symmetric=False), hidden=48),
    "channel": Case("qwen3", True, lambda name: Encoding("int8", symmetric="k_proj" not in name)),
    "fp16": Case("qwen3", False, lambda name: Encoding("fp16")),
    "plain": Case("qwen2", True, lambda name: None),
}


@dataclass(frozen=True)
class Export:
    model: Model
    path: Path


def mistral() -> Model:
    torch.manual_seed(7)
    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 12}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128}
    config = MistralConfig(**shape, sliding_window=None, initializer_range=0.3, tie_word_embeddings=False)
    return Model(MistralForCausalLM(config), byte_tokenizer())


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """Exports by case name, each written once."""
    done: dict[str, Export] = {}

    def make(name: str) -> Export:
        if name not in done:
            if name == "mistral":
                model = mistral()
            else:
                case = CASES[name]
                model = encode(tiny(case.family, case.tied, case.hidden), case.choose)
            path = tmp_path_factory.mktemp("onnx") / "out"
            PORTABLE.write(model, path)
            done[name] = Export(model, path)
        return done[name]

    return make


def run(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits by a session with onnxruntime's own defaults, and nothing of ours around it."""
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    return logits


@pytest.mark.parametrize("name", [*CASES, "mistral"])
def test_files_hold_the_very_tensors_and_onnxruntime_computes_the_same_logits(export: Any, name: str) -> None:
    done = export(name)
    assert weights_exact(done.model, PORTABLE, done.path)
    assert [n for n, _ in PORTABLE.stored(done.path)] == [n for n, _ in done.model.tensors()]
    runtime = Onnx().open(done.path)
    for expected, found in zip(done.model.logits(WINDOWS), runtime.logits(WINDOWS), strict=True):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert abs(divergence(expected, found)) <= 1e-9  # rounding of float32 sums
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    runtime.close()


@pytest.mark.parametrize("name", ["everything", "int4", "asymmetric"])
def test_default_settings_compute_the_same_and_padding_on_either_side_is_not_seen(export: Any, name: str) -> None:
    done = export(name)
    (expected,) = done.model.logits([WINDOWS[3]])
    for left in (0, 5):
        ids, mask = np.full((2, 12), 99), np.zeros((2, 12), np.int64)
        ids[0, left : left + 7], mask[0, left : left + 7] = WINDOWS[3], 1
        found = run(done.path, ids, mask)
        assert found.shape == (2, 12, 256) and np.isfinite(found).all()  # a row of padding alone is no NaN
        torch.testing.assert_close(torch.from_numpy(found[0, left : left + 7]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["everything", "int4", "plain"])
def test_every_operator_is_standard_and_the_opset_is_stated(export: Any, name: str) -> None:
    graph = onnx.load(export(name).path / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)] == [("", 21)] and graph.ir_version == 10
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input]
    assert shapes == [["batch", "sequence"]] * 2
    kinds = {node.op_type for node in graph.graph.node}
    assert ("DequantizeLinear" in kinds) == (name != "plain") and {"Gather", "MatMul", "Softmax"} <= kinds
    assert [path.name for path in export(name).path.glob("model.onnx*")].count("model.onnx.data") == 1


def test_no_kernel_with_rounded_activations_takes_the_place_of_a_product(export: Any, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(export("int4").path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert "DequantizeLinear" in kinds and "MatMulNBits" not in kinds


def test_the_embedding_is_stored_once_in_four_bits(export: Any) -> None:
    done = export("int4")
    matrices = sum(encoded.nominal_bytes for encoded in done.model.encoded.values())
    floats = sum(4 * t.numel() for _, t in done.model.tensors() if isinstance(t, Tensor))
    assert (done.path / "model.onnx.data").stat().st_size == pytest.approx(matrices + floats, rel=0.02)


def test_generation_and_decoding_without_a_cache(export: Any) -> None:
    done = export("everything")
    runtime: Any = Onnx().open(done.path)
    for prompt in WINDOWS:
        assert runtime.generate(prompt, 12) == done.model.generate(prompt, 12)
    (expected,) = done.model.logits([WINDOWS[3]])
    torch.testing.assert_close(runtime.decode_logits(WINDOWS[3]), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(list(runtime.stream(WINDOWS[3], 5))), expected[4:], atol=1e-4, rtol=0)
    with pytest.raises(RecipeError, match="takes 1 to 128"):
        runtime.generate([], 3)


def test_the_runtime_describes_the_model(export: Any, tmp_path: Path) -> None:
    done = export("int4")
    runtime = measure.open_model(str(done.path))
    assert (runtime.vocabulary_size, runtime.context_length, runtime.eos_ids) == (256, 128, {1, 2})
    assert runtime.compute == "int4 g32 weights, float32 activations, no cache"
    assert runtime.encode("Straße 🙂") == done.model.encode("Straße 🙂") and runtime.bos_id == done.model.bos_id
    assert list(PORTABLE.usage_of()) == ["onnxruntime"] and len(Onnx().usage_of()) == 2
    with pytest.raises(RecipeError, match="is an export"):
        opening.locate(str(done.path))


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "llama3", "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}])  # fmt: skip
def test_scaled_rotary_frequencies(tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 256}
    config = LlamaConfig(
        **shape, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5, attention_bias=True,
        mlp_bias=True, rope_parameters={**rope, "rope_theta": 1e4},
    )  # fmt: skip
    model = Model(LlamaForCausalLM(config), byte_tokenizer())
    PORTABLE.write(model, tmp_path / "out")
    (expected,), (found,) = model.logits([WINDOWS[1]]), Onnx().open(tmp_path / "out").logits([WINDOWS[1]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert weights_exact(model, PORTABLE, tmp_path / "out")


def test_exports_repeat_byte_for_byte(export: Any, tmp_path: Path) -> None:
    done = export("everything")
    PORTABLE.write(done.model, tmp_path / "again")
    for path in done.path.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_it_cannot_carry_is_refused_with_a_remedy() -> None:
    for name in ("nf4", "mxfp4", "q4_k"):
        encoding = Encoding(name, None if name == "q4_k" else 32)
        assert f"integer codes, not {name}; use int4" in (PORTABLE.refuses(encoding, "a.weight") or "")
    for encoding in (Encoding("int4", 24), Encoding("int5", 40, symmetric=False), Encoding("int8"), Encoding("bf16")):
        assert PORTABLE.refuses(encoding, "a.weight") is None
    base: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 256}
    base |= {"num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 64}
    PORTABLE.check(Facts.from_config(base))
    for change, message in (
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' depends on the length"),
        ({"hidden_act": "quick_gelu"}, "computes silu, gelu, gelu_tanh, relu, not 'quick_gelu'; use flavour: genai"),
        ({"sliding_window": 16}, "no sliding window, and here it is 16"),
    ):
        with pytest.raises(RecipeError, match=message):
            PORTABLE.check(Facts.from_config({**base, **change}))
    with pytest.raises(ValueError, match="no standard operator rounds activations"):
        Onnx(flavour="portable", activations="int8")


def test_a_tensor_that_the_graph_does_not_use_is_an_error() -> None:
    model = tiny("llama", True)
    model.module.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(CompressError, match="does not use model.extra"):
        build(model)


def copied(done: Export, folder: Path) -> Path:
    return Path(shutil.copytree(done.path, folder / "copy"))


def test_a_flipped_bit_is_noticed(export: Any, tmp_path: Path) -> None:
    import onnx_ir

    done = export("everything")
    for name in (
        "model.layers.1.self_attn.q_proj.weight.codes",
        "model.embed_tokens.weight.scales",
        "model.norm.weight",
    ):
        path = copied(done, tmp_path / name)
        offset = onnx_ir.load(path / "model.onnx").graph.initializers[name].const_value.offset
        data = bytearray((path / "model.onnx.data").read_bytes())
        data[offset + 1] ^= 1
        (path / "model.onnx.data").write_bytes(data)
        assert not weights_exact(done.model, PORTABLE, path)


@pytest.mark.parametrize("change", ["axis", "scales", "block"])
def test_nodes_that_read_the_codes_otherwise_are_corrupt(export: Any, tmp_path: Path, change: str) -> None:
    path = copied(export("int4"), tmp_path)
    proto = onnx.load(path / "model.onnx", load_external_data=False)
    first, second = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"][1:3]
    if change == "scales":
        first.input[1], second.input[1] = second.input[1], first.input[1]
    else:
        attribute = next(a for a in first.attribute if a.name == ("axis" if change == "axis" else "block_size"))
        attribute.i = 0 if change == "axis" else 64
    onnx.save(proto, path / "model.onnx")
    with pytest.raises(Corrupt, match="does not read int4 g32 in blocks of 32"):
        list(PORTABLE.stored(path))


def test_damaged_folders_are_refused(export: Any, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"):
        path = copied(export("int4"), tmp_path / name)
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Corrupt):
            Onnx().open(path)
        (path / name).unlink()
        with pytest.raises(Corrupt):
            Onnx().open(path)


def test_codes_out_of_range_are_corrupt(export: Any, tmp_path: Path) -> None:
    path = copied(export("everything"), tmp_path)
    proto = onnx.load(path / "model.onnx", load_external_data=False)
    entry = next(p for p in proto.metadata_props if p.key == "compress.encodings")
    kinds = json.loads(entry.value)
    kinds["model.layers.0.self_attn.q_proj.weight"]["name"] = "int2"
    entry.value = json.dumps(kinds)
    onnx.save(proto, path / "model.onnx")
    with pytest.raises(Corrupt, match="do not fit int2"):
        list(PORTABLE.stored(path))


@pytest.mark.model
def test_real_model(tmp_path: Path, real_model: Callable[[], Model]) -> None:
    model = real_model()
    for name in model.facts.matrices:
        W = model.parameter(name).detach()
        model.store(name, rounded(W, Encoding("int8" if "embed" in name else "int4", 32)))
    PORTABLE.write(model, tmp_path / "out")
    assert weights_exact(model, PORTABLE, tmp_path / "out")
    runtime = Onnx().open(tmp_path / "out")
    window = runtime.encode("Water boils at 100 degrees.\n\n<|im_start|>user\nWhy? 東京🙂<|im_end|>\n")
    (expected,), (found,) = model.logits([window]), runtime.logits([window])
    assert abs(divergence(expected, found)) <= 1e-7
    assert runtime.generate(window[:20], 8) == model.generate(window[:20], 8)
    assert isinstance(model.encoded[model.facts.embedding_tensor], EncodedTensor)
    nominal = sum(encoded.nominal_bytes for encoded in model.encoded.values())
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("model.onnx*"))
    assert nominal < size < 1.02 * nominal
