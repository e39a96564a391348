"""The ONNX exporter, and onnxruntime running what it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from compress import plugin
from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding, same_stored
from compress.errors import CompressError, Corrupt, RecipeError, UnsafeInput
from compress.model import Model
from compress.numerics.sampling import gumbel
from compress.steps.quantize._fields import round_to_nearest
from export import onnx as exporter
from export._onnx_packing import packed, unpacked
from export.onnx import Onnx
from tests.tiny_onnx import WINDOWS, divergence, encode, rounded, tiny


def everything(name: str) -> Encoding | None:
    """Each encoding, symmetric and not, in one model; one matrix stays float32."""
    table = {
        "q_proj": Encoding("int4", 64),
        "k_proj": Encoding("int2", 16, symmetric=False),
        "v_proj": None,
        "o_proj": Encoding("int3", 32),
        "gate_proj": Encoding("fp16"),
        "up_proj": Encoding("bf16"),
        "down_proj": Encoding("int8", 16, symmetric=False) if ".0." in name else Encoding("int2", 32),
        "embed_tokens": Encoding("int8", 32),
    }
    return next(encoding for part, encoding in table.items() if part in name)


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool
    choose: Callable[[str], Encoding | None]
    hidden: int = 64
    activations: Any = "float32"


CASES = {
    "everything": Case("llama", True, everything),
    "int4": Case("llama", True, lambda name: Encoding("int4", 32), hidden=128),
    # 48 channels in groups of 16: rows of three blocks, whose zero points do not fill whole bytes
    "asymmetric": Case("qwen2", False, lambda name: Encoding("int4", 16, symmetric=False), hidden=48),
    "joined, asymmetric": Case("llama", False, lambda name: Encoding("int4", 16, symmetric=False), hidden=48),
    "channel": Case("qwen3", True, lambda name: Encoding("int8", symmetric="k_proj" not in name)),
    "int8 activations": Case("llama", True, lambda name: Encoding("int4", 32), activations="int8"),
    "plain": Case("qwen2", True, lambda name: None),
}


@dataclass(frozen=True)
class Export:
    model: Model
    path: Path
    case: Case


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """Exports by case name, each written once."""
    done: dict[str, Export] = {}

    def make(name: str) -> Export:
        if name not in done:
            case = CASES[name]
            model = encode(tiny(case.family, case.tied, case.hidden), case.choose)
            path = tmp_path_factory.mktemp("onnx") / "out"
            Onnx(activations=case.activations).write(model, path)
            done[name] = Export(model, path, case)
        return done[name]

    return make


def assert_same(model: Model, path: Path) -> None:
    read, held = dict(Onnx().stored(path)), dict(model.tensors())
    assert list(read) == list(held)
    for name, tensor in held.items():
        other = read[name]
        if isinstance(tensor, Tensor):
            assert isinstance(other, Tensor) and torch.equal(tensor, other), name
        else:
            assert isinstance(other, EncodedTensor) and other.encoding == tensor.encoding, name
            assert same_stored(tensor, other), name
            assert torch.equal(tensor.decode(), other.decode()), name


def genai_greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(path))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def test_is_found_by_name() -> None:
    assert plugin.exporter("onnx") is Onnx


@pytest.mark.parametrize("name", CASES)
def test_files_hold_the_models_very_tensors(export: Callable[[str], Export], name: str) -> None:
    done = export(name)
    assert_same(done.model, done.path)
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"} <= {
        path.name for path in done.path.iterdir()
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_are_torchs(export: Callable[[str], Export], name: str) -> None:
    done = export(name)
    runtime = Onnx().open(done.path)
    for expected, found in zip(done.model.logits(WINDOWS), runtime.logits(WINDOWS), strict=True):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        if done.case.activations == "float32":
            assert abs(divergence(expected, found)) <= 1e-9  # measured 1e-12: rounding of float32 sums
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    runtime.close()


@pytest.mark.parametrize(
    ("name", "products"),
    [("int4", 5), ("joined, asymmetric", 5), ("asymmetric", 7), ("everything", 2)],
)
def test_projections_of_one_form_are_one_product(export: Callable[[str], Export], name: str, products: int) -> None:
    """Not those with biases (qwen2) behind them, nor those of several encodings."""
    import onnx

    done = export(name)
    graph = onnx.load(done.path / "model.onnx", load_external_data=False).graph
    layers = done.model.facts.layers
    blocks = [n for n in graph.node if n.op_type == "MatMulNBits" and "lm_head" not in n.name]
    assert len(blocks) == products * layers
    assert sum("qkv_proj" in n.name for n in blocks) == (layers if products == 5 else 0)


def test_int8_activations_are_measurably_different(export: Callable[[str], Export]) -> None:
    done = export("int8 activations")
    runtime = Onnx().open(done.path)
    assert runtime.compute == "int4 g32 weights, int8 activations"
    (expected,) = done.model.logits(WINDOWS[1:2])
    (found,) = runtime.logits(WINDOWS[1:2])
    assert 1e-6 < divergence(expected, found) < 0.05  # measured .001


@pytest.mark.parametrize("name", ["everything", "asymmetric", "channel"])
def test_decoding_through_the_cache_is_prefill(export: Callable[[str], Export], name: str) -> None:
    runtime = Onnx().open(export(name).path)
    (prefill,) = runtime.logits(WINDOWS[1:2])
    torch.testing.assert_close(runtime.decode_logits(WINDOWS[1]), prefill, atol=1e-4, rtol=0)


def test_a_long_window_is_read_in_chunks(export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Onnx().open(export("everything").path)
    prefill = [x.clone() for x in runtime.logits(WINDOWS)]
    longest = max(map(len, WINDOWS))
    monkeypatch.setattr("export._onnxruntime.TOKENS_PER_RUN", longest - 1)
    monkeypatch.setattr("export._onnxruntime.TOKENS_PER_CHUNK", 3)
    for expected, found in zip(prefill, runtime.logits(WINDOWS), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["everything", "asymmetric", "channel", "int8 activations"])
def test_generation_is_genais(export: Callable[[str], Export], name: str) -> None:
    done = export(name)
    runtime = Onnx().open(done.path)
    for prompt in WINDOWS:
        found = runtime.generate(prompt, 20)
        # genai stops at an end-of-sequence token without returning it.
        assert [token for token in found if token not in runtime.eos_ids] == genai_greedy(done.path, prompt, 20)
        assert len(found) == 20 or found[-1] in runtime.eos_ids
        if done.case.activations == "float32":
            assert found == done.model.generate(prompt, 20)


def test_long_prompts_are_read_in_pieces(export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch) -> None:
    done = export("everything")
    runtime = Onnx().open(done.path)
    monkeypatch.setattr("export._onnxruntime.TOKENS_PER_CHUNK", 7)
    assert runtime.generate(WINDOWS[1], 12) == done.model.generate(WINDOWS[1], 12)
    drawn = [model.generate(WINDOWS[1], 12, gumbel(2.0, 5)) for model in (runtime, done.model)]
    assert drawn[0] == drawn[1] != done.model.generate(WINDOWS[1], 12)


def test_runtime_describes_the_model(export: Callable[[str], Export]) -> None:
    done = export("int4")
    runtime = Onnx().open(done.path)
    assert (runtime.vocabulary_size, runtime.context_length, runtime.eos_ids) == (256, 128, {1, 2})
    assert runtime.compute == "int4 g32 weights, float32 activations"
    assert runtime.runtime.startswith("onnxruntime 1.")
    text = "Straße, 東京 and 🙂\n\n  twice "
    assert runtime.encode(text) == done.model.encode(text)
    ids = [*done.model.encode(text), *runtime.eos_ids]
    assert runtime.decode(ids) == done.model.decode(ids) and runtime.decode(ids).startswith(text)
    assert len(runtime.digest) == 64 and runtime.digest == Onnx().open(done.path).digest
    assert runtime.digest != Onnx().open(export("everything").path).digest


def test_windows_are_checked(export: Callable[[str], Export]) -> None:
    runtime = Onnx().open(export("int4").path)
    for window in ([], [256], [-1], [0] * 129):
        with pytest.raises(RecipeError):
            list(runtime.logits([window]))


def test_embedding_is_stored_once_and_size_is_nominal(export: Callable[[str], Export]) -> None:
    done = export("int4")
    matrices = sum(encoded.nominal_bytes for encoded in done.model.encoded.values())
    floats = sum(4 * t.numel() for _, t in done.model.tensors() if isinstance(t, Tensor))
    rotary = 2 * 4 * 128 * 8  # cos and sin, (context, head_size / 2)
    assert (done.path / "model.onnx.data").stat().st_size == pytest.approx(matrices + floats + rotary, rel=0.02)


def test_exports_repeat_byte_for_byte(export: Callable[[str], Export], tmp_path: Path) -> None:
    done = export("everything")
    Onnx().write(done.model, tmp_path / "again")
    for path in done.path.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_graph_does_not_name_the_repository_around_it(export: Callable[[str], Export]) -> None:
    import onnx
    import onnxruntime_genai

    graph = onnx.load(export("everything").path / "model.onnx", load_external_data=False)
    assert graph.producer_version == onnxruntime_genai.__version__  # the builder adds the commit of what is checked out


def copied(done: Export, folder: Path) -> Path:
    return Path(shutil.copytree(done.path, folder / "copy"))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight.codes", "model.norm.weight"])
def test_a_flipped_bit_is_noticed(export: Callable[[str], Export], tmp_path: Path, name: str) -> None:
    import onnx_ir

    path = copied(export("everything"), tmp_path)
    offset = onnx_ir.load(path / "model.onnx").graph.initializers[name].const_value.offset
    data = bytearray((path / "model.onnx.data").read_bytes())
    data[offset + 1] ^= 1
    (path / "model.onnx.data").write_bytes(data)
    with pytest.raises(AssertionError, match=name.removesuffix(".codes")):
        assert_same(export("everything").model, path)


def test_damaged_folders_are_refused(export: Callable[[str], Export], tmp_path: Path) -> None:
    done = export("int4")
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        path = copied(done, tmp_path / name)
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Corrupt):
            Onnx().open(path)
        (path / name).unlink()
        with pytest.raises(Corrupt):
            Onnx().open(path)


def test_data_outside_the_folder_is_refused(export: Callable[[str], Export], tmp_path: Path) -> None:
    import onnx

    path = copied(export("int4"), tmp_path)
    proto = onnx.load(path / "model.onnx", load_external_data=False)
    entry = next(e for e in proto.graph.initializer[0].external_data if e.key == "location")
    entry.value = "../secret"
    onnx.save(proto, path / "model.onnx")
    for use in (Onnx().open, lambda p: list(Onnx().stored(p))):
        with pytest.raises(UnsafeInput, match="secret"):
            use(path)
    shutil.copy(export("int4").path / "model.onnx", path / "model.onnx")
    (path / "model.onnx.data").rename(tmp_path / "elsewhere")
    (path / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInput, match="symbolic link"):
        Onnx().open(path)


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    reason = Onnx().refuses(Encoding("int4", 24), "a.weight")
    assert reason is not None and "a.weight" in reason and "group_size=24" in reason
    for encoding in (Encoding("int4", 48), Encoding("int8"), Encoding("int3", 16), Encoding("fp16")):
        assert Onnx().refuses(encoding, "a.weight") is None
    with pytest.raises(RecipeError, match="40 channels"):
        packed("w", rounded(torch.randn(4, 40), Encoding("int4")))
    for name in ("nf4", "mxfp4"):
        assert f"integer codes, not {name}; use int4" in (Onnx().refuses(Encoding(name, 32), "a.weight") or "")
    (tmp_path / "occupied").touch()
    with pytest.raises(RecipeError, match="not empty"):
        Onnx().write(tiny("llama", True), tmp_path)


def test_codes_without_an_exact_form_are_not_written_as_floats(tmp_path: Path) -> None:
    model = tiny("llama", True)
    name = "model.layers.0.mlp.up_proj.weight"
    model.store(name, round_to_nearest(name, model.parameter(name).detach(), Encoding("nf4", 32), search=False))
    with pytest.raises(RecipeError, match=f"onnx: {name}: .*not nf4"):
        Onnx().write(model, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_head_sizes_without_a_kernel_are_refused() -> None:
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=32, num_attention_heads=4)
    with pytest.raises(RecipeError, match="multiple of 16, this llama has 8"):
        Onnx().check(Facts.from_config(config.to_dict()))


def test_a_linear_as_wide_as_the_vocabulary_is_refused() -> None:
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=1)
    with pytest.raises(RecipeError, match=r"gate_proj has as many outputs as the vocabulary has tokens \(256\)"):
        Onnx().check(Facts.from_config(config.to_dict()))


def test_a_model_without_end_of_sequence_never_ends(tmp_path: Path) -> None:
    model = tiny("llama", True)
    model.module.config.eos_token_id = model.module.generation_config.eos_token_id = None
    Onnx().write(model, tmp_path / "out")
    runtime = Onnx().open(tmp_path / "out")
    assert runtime.eos_ids == frozenset()
    expected = model.generate([7, 8], 40)
    assert len(expected) == 40
    assert runtime.generate([7, 8], 40) == expected == genai_greedy(tmp_path / "out", [7, 8], 40)


def test_missing_packages_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PACKAGES", ("onnxruntime", "no_such_runtime"))
    with pytest.raises(RecipeError, match=r"no_such_runtime: pip install 'compress-toolkit\[onnx\]'"):
        Onnx().open(Path("anywhere"))


def test_a_failing_builder_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CompressError, match="builder failed with code 1"):
        exporter.build(tmp_path, tmp_path / "built", "fp32")


@given(
    st.sampled_from(["int2", "int3", "int4", "int5", "int8"]),
    st.booleans(),
    st.sampled_from([16, 32, 48, 96, 256, None]),
    st.integers(0, 2**31),
)
def test_unpacking_undoes_packing(name: str, symmetric: bool, group: int | None, seed: int) -> None:
    encoding = Encoding(name, group, symmetric)
    generator = torch.Generator().manual_seed(seed)
    n, groups = 3, 3
    m = groups * (group or 32)
    low, high = encoding.code_range
    codes = torch.randint(low, high + 1, (n, m), generator=generator)
    shape = (n, encoding.groups(m))
    scales = torch.randn(shape, generator=generator).half()
    zeros = None if symmetric else torch.randint(0, high + 1, shape, generator=generator).to(torch.uint8)
    tensor = EncodedTensor(encoding, codes.to(torch.int8 if symmetric else torch.uint8), scales, zeros)
    read = unpacked("w", packed("w", tensor), encoding)
    assert same_stored(tensor, read) and torch.equal(tensor.decode(), read.decode())


@pytest.mark.model
def test_real_model(tmp_path: Path, real_model: Callable[[], Model]) -> None:
    model = real_model()
    encode(model, lambda name: Encoding("int8" if "embed" in name else "int4", 32))
    Onnx().write(model, tmp_path / "out")
    assert_same(model, tmp_path / "out")
    text = "Water boils at 100 degrees.\n\n<|im_start|>user\nWhy does the Moon  not fall? 東京🙂<|im_end|>\n"
    runtime = Onnx().open(tmp_path / "out")
    window = runtime.encode(text)
    assert window == model.encode(text) and runtime.eos_ids == model.eos_ids
    (expected,), (found,) = model.logits([window]), runtime.logits([window])
    assert abs(divergence(expected, found)) <= 1e-7  # measured 2e-10
    torch.testing.assert_close(runtime.decode_logits(window), found, atol=2e-3, rtol=0)  # logits reach 30
    prompt = window[:20]
    generated = [token for token in runtime.generate(prompt, 12) if token not in runtime.eos_ids]
    assert generated == genai_greedy(tmp_path / "out", prompt, 12)
    nominal = sum(encoded.nominal_bytes for encoded in model.encoded.values())
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("model.onnx*"))
    assert nominal < size < 1.05 * nominal
