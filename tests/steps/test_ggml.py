"""llama.cpp's own types: bytes of its library, importances, artifacts, and the file that ships."""

import gguf
import pytest
import torch
from gguf.quants import dequantize

from compress import artifact
from compress.blocks import walk
from compress.encodings import GGML_BLOCKS, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.ggml_blocks import encode_blocks
from compress.plugin import exporter, step
from compress.steps.quantize.ggml import _importances, _store
from export._llama_cpp import find
from tests import tiny_gguf
from tests.numerics.test_ggml_blocks import c_quantize
from tests.tiny import tiny_model

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def windows(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (32,), generator=generator) for _ in range(count)]


def wide() -> Model:
    """A tiny model whose matrices all have 256 or 512 input channels."""
    return tiny_gguf.tiny(hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=0.08)


@pytest.mark.parametrize("kind", GGML_BLOCKS)
def test_blocks_are_those_of_the_library_and_decode_as_gguf_py_decodes_them(kind):
    W = torch.randn(6, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    packed = encode_blocks(W, kind)
    number = gguf.GGMLQuantizationType[kind.upper()]
    assert packed.numpy().tobytes() == c_quantize(W, int(number), packed.numel())
    size, count = gguf.GGML_QUANT_SIZES[number]
    assert GGML_BLOCKS[kind] == (size, count)
    assert Encoding(kind).bits_per_weight(512) == 8 * count / size
    back = torch.from_numpy(dequantize(packed.numpy(), number))
    assert (back - W).norm() < 2.0 ** -(8 * count / size) * 3 * W.norm()


def test_importance_moves_the_error_to_where_it_matters_less():
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) * 0.05
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 8 + 1e-3

    def error(h: torch.Tensor | None) -> float:
        packed = encode_blocks(W, "q4_k", h)
        decoded = torch.from_numpy(dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_K))
        return float(((decoded - W).square() * importance).sum())

    assert error(importance) < 0.85 * error(None)


def test_importances_are_mean_squares_of_the_inputs():
    block = next(walk(tiny_model(), windows(), windows_per_batch=2))
    inputs: dict[str, list[torch.Tensor]] = {}
    block.observe(lambda names, X: inputs.setdefault(names[0], []).append(X))
    found = _importances(block)
    assert set(found) == set(block.linears)
    for name, parts in inputs.items():
        torch.testing.assert_close(found[name], torch.cat(parts).square().mean(0))
    assert torch.equal(found["model.layers.0.mlp.up_proj"], found["model.layers.0.mlp.gate_proj"])


@pytest.mark.parametrize("kind", [*GGML_BLOCKS, "q4_0", "q5_0", "q8_0", "iq4_nl"])
def test_the_artifact_and_the_file_hold_the_very_bytes(kind, tmp_path):
    model = wide()
    fields = {"type": kind, "keep": {"*.o_proj": "fp16", "*.v_proj": "q6_k"}, "embeddings": "q5_0"}
    step("quantize.ggml")(**fields).apply(model, Context(seed=0, calibration=windows()))
    assert {n: e.encoding for n, e in model.encoded.items()} == step("quantize.ggml")(**fields).encodings(model.facts)
    artifact.save(model, tmp_path / "saved")
    back = artifact.load(tmp_path / "saved")
    assert back.digest == model.digest
    assert torch.equal(back.parameter(DOWN), model.encoded[DOWN].decode())
    assert artifact.bits_per_weight(back) == artifact.bits_per_weight(model) < 17
    (tmp_path / "gguf").mkdir()
    exporter("gguf")().write(model, tmp_path / "gguf")
    assert tiny_gguf.differing(model, tmp_path / "gguf") == set()
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(find(tmp_path / "gguf")).tensors}
    assert types["blk.0.ffn_down.weight"] == kind.upper() and types["blk.0.attn_v.weight"] == "Q6_K"


def test_llama_cpp_computes_what_the_gate_decodes(tmp_path):
    model = wide()
    step("quantize.ggml")(type="q6_k").apply(model, Context(seed=0, calibration=windows()))
    exporter("gguf")().write(model, tmp_path)
    runtime = exporter("gguf")().open(tmp_path)
    try:
        (window,) = tiny_gguf.windows(model, 60)
        assert 0 < tiny_gguf.kl(next(model.logits([window])), next(runtime.logits([window]))) < 0.02
        assert "Q6_K" in runtime.compute
    finally:
        runtime.close()


def test_what_the_blocks_do_not_fit_is_refused_with_a_remedy(tmp_path):
    facts = tiny_model().facts
    with pytest.raises(RecipeError, match=r"q_proj: 32 input channels are not a multiple of q4_k's 256; use q4_0"):
        step("quantize.ggml")().check(facts)
    with pytest.raises(RecipeError, match=r"use q4_0, q5_0, q8_0 or iq4_nl, as the type or as its fallback"):
        step("quantize.ggml")().check(facts)
    step("quantize.ggml")(type="q4_1").check(facts)
    with pytest.raises(RecipeError, match=r"'\*.none' matches no linear"):
        step("quantize.ggml")(type="q4_1", keep={"*.none": "q8_0"}).check(facts)
    with pytest.raises(RecipeError, match="48 input channels are not a multiple of q5_1's 32; use fp16"):
        Encoding("q5_1").groups(48)
    with pytest.raises(RecipeError, match="blocks of its own; leave group_size=64 out"):
        Encoding("q4_k", 64)
    reason = exporter("onnx")().refuses(Encoding("q4_k"), UP)
    assert reason is not None and "not q4_k; use int4" in reason


def test_of_overlapping_patterns_the_last_counts():
    kinds = {"*.mlp.*": "fp16", "*.0.*": "q5_1"}
    for order in (list(kinds), list(reversed(kinds))):
        chosen = step("quantize.ggml")(type="q4_1", keep={pattern: kinds[pattern] for pattern in order})
        found = chosen.encodings(tiny_model().facts)
        assert [found[n].name for n in (UP, UP.replace("layers.0", "layers.1"))] == [kinds[order[-1]], "fp16"]


def test_bad_weights_name_the_tensor_and_nothing_is_rounded_twice():
    model = tiny_model()
    model.parameter(UP).data[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=f"{UP}: non-finite weights"):
        _store(model, UP, "q4_1", None)
    model = tiny_model()
    step("quantize.ggml")(type="q5_1").apply(model, Context(seed=0, calibration=windows()))
    with pytest.raises(RecipeError, match="rounding twice"):
        step("quantize.rtn")(group_size=16).apply(model, Context(seed=0))
