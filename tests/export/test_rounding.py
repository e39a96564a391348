"""What a model rounds while it runs, in the files and in the runtimes that execute them."""

from pathlib import Path

import onnx
import pytest
import torch

from compress import refusals
from compress.errors import Corrupt, RecipeError
from compress.exporting import refuse_rounding, weights_exact, write_exactly
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import exporter, step
from compress.rounding import InputRounding
from export import _gguf_cache
from tests import tiny_gguf, tiny_onnx
from tests.recipes import SMOL, recipe, refusal
from tests.tiny_gguf import kl

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}


def smoothed(model: Model, **fields) -> Model:
    calibration = [torch.randint(3, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    step("quantize.smoothquant")(**fields).apply(model, Context(seed=0, calibration=calibration))
    return model


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model with static scales in one block and dynamic ones in the other, and its ONNX folder."""
    model, path = tiny_onnx.tiny("qwen2", True), tmp_path_factory.mktemp("integers") / "x"
    step("quantize.rtn")(encoding="int8", group_size="channel").apply(model, Context(seed=0))
    for name in model.facts.linears:
        static = InputRounding("static", float(torch.tensor(0.03 if "down" in name else 0.02)))
        model.round_inputs(name, static if ".0." in name else InputRounding("dynamic"))
    write_exactly(model, exporter("onnx")(), path)
    return model, path


def test_onnxruntime_multiplies_the_integers_of_the_gated_model(integers):
    model, path = integers
    opened = exporter("onnx")().open(path)
    assert opened.compute == "int8 per channel weights, float32 + int8 activations"
    theirs = [x.clone() for x in opened.logits(tiny_onnx.WINDOWS)]
    opened.close()
    ours = [x.clone() for x in model.logits(tiny_onnx.WINDOWS)]
    floats = tiny_onnx.tiny("qwen2", True)
    step("quantize.rtn")(encoding="int8", group_size="channel").apply(floats, Context(seed=0))
    for a, b, c in zip(ours, theirs, floats.logits(tiny_onnx.WINDOWS)):
        assert (a - b).abs().median() < 1e-5 * a.abs().max() < 1e-2 * (a - c).abs().median()  # float32 sums
    products = [n for n in onnx.load(path / "model.onnx").graph.node if n.op_type == "MatMulInteger"]
    assert len(products) == len(model.facts.linears)
    assert len({n.input[0] for n in products}) == 8  # linears that share an input share its codes


def test_a_changed_scale_or_none_is_not_what_was_gated(integers, tmp_path):
    model, path = integers
    assert weights_exact(model, exporter("onnx")(), path)
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    scale = next(
        n
        for n in graph.graph.node
        if n.op_type == "Constant" and ".static." in n.output[0] and n.output[0].endswith("scale")
    )
    for attribute in scale.attribute:
        attribute.t.CopyFrom(onnx.helper.make_tensor("value", onnx.TensorProto.FLOAT, [], [0.125]))
    onnx.save(graph, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes((path / "model.onnx.data").read_bytes())
    assert not weights_exact(model, exporter("onnx")(), tmp_path)
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear":
            node.op_type = "DequantizeLinear"
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(Corrupt, match=r"rounds its inputs otherwise than 'static'"):
        weights_exact(model, exporter("onnx")(), tmp_path)


def test_llama_cpp_computes_with_the_blocks_of_the_gated_model(tmp_path):
    model = smoothed(tiny_gguf.tiny(**HEADS), activations="block", embeddings=None)
    windows = tiny_gguf.windows(model, 60, 100)
    write_exactly(model, exporter("gguf")(), tmp_path / "x")
    opened = exporter("gguf")().open(tmp_path / "x")
    theirs = [x.clone() for x in opened.logits(windows)]
    opened.close()
    ours = [x.clone() for x in model.logits(windows)]
    for name in model.inputs:
        model.module.get_submodule(name)._forward_pre_hooks.clear()
    plain = [x.clone() for x in model.logits(windows)]
    # The rest is llama.cpp's float16 cache, and codes that it tips over an edge.
    assert sum(map(kl, ours, theirs)) < 0.7 * sum(map(kl, plain, theirs))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_llama_cpp_keeps_the_cache_that_was_gated(bits, tmp_path):
    floats, model = tiny_gguf.tiny(**HEADS), tiny_gguf.tiny(**HEADS)
    step("quantize.kv_cache")(keys=bits, values=bits).apply(model, Context(seed=0))
    windows, gguf = tiny_gguf.windows(model, 60, 100), exporter("gguf")()
    write_exactly(model, gguf, tmp_path / "x")
    opened = gguf.open(tmp_path / "x")
    assert opened.compute.endswith(f"{model.cache}")
    theirs, decoded = [x.clone() for x in opened.logits(windows)], opened.decode_logits(windows[0])
    opened.close()
    ours, plain = ([x.clone() for x in m.logits(windows)] for m in (model, floats))
    assert kl(theirs[0], decoded) < 1e-6
    # llama.cpp rounds queries, too: to 8 bits, which is as much again as keys of 8 bits
    assert sum(map(kl, ours, theirs)) < (0.6 if bits == "int8" else 0.1) * sum(map(kl, plain, theirs))
    assert not weights_exact(floats, gguf, tmp_path / "x")  # the same weights, another cache
    kind = "q8_0" if bits == "int8" else "q4_0"
    assert gguf.usage_of(model.cache)["llama.cpp"] == f"llama-cli -m {{file}} -cnv -fa on -ctk {kind} -ctv {kind}"
    assert gguf.usage_of(None) == gguf.usage


def test_a_damaged_header_is_refused():
    assert _gguf_cache.types({}) is None
    for header in ({_gguf_cache.KEYS: "q8_0"}, {_gguf_cache.KEYS: "f8", _gguf_cache.VALUES: "q8_0"}):
        with pytest.raises(Corrupt, match=r"asks for a cache of type (None|'f8'); known: q8_0, q4_0"):
            _gguf_cache.types(header)


REFUSED = [
    ("quantize.smoothquant: {}", "gguf", "llama.cpp rounds inputs in blocks of 32, not int8 inputs per token"),
    ("quantize.smoothquant: {activations: block}", "onnx", "float32 scales of blocks"),
    ("quantize.smoothquant: {group_size: 32}", "onnx", "one scale per row, not int8 g32; use group_size: channel"),
    ("quantize.smoothquant: {embeddings: null}", "checkpoint", "transformers would not round its inputs (int8 inputs"),
    ("quantize.kv_cache: {}", "onnx", "onnxruntime would keep keys and values in floats, and the gated model has a q8"),
    ("quantize.kv_cache: {keys: int4}", "checkpoint", "has a q4_0 keys, q8_0 values (by steps[0] quantize.kv_cache)"),
]


@pytest.mark.parametrize("chosen,format,reason", REFUSED)
def test_the_plan_refuses_a_runtime_that_would_round_otherwise(chosen, format, reason):
    message = refusal(recipe(f"  - {chosen}\n", export=f"export: [{format}: {{}}]\n"))
    assert reason in message and f"export[0] {format}: " in message and "(by steps[0] quantize." in message


def test_the_plan_accepts_what_runtimes_carry_and_lets_nothing_train_through_rounding():
    cases = [("smoothquant: {}", "onnx"), ("smoothquant: {activations: block}", "gguf"), ("kv_cache: {}", "gguf")]
    for chosen, format in cases:
        assert refusals.check(recipe(f"  - quantize.{chosen}\n", export=f"export: [{format}: {{}}]\n"), SMOL) == []
    for chosen in ("smoothquant", "kv_cache"):
        later = "distill.logits: {tokens: 1024}" if chosen == "kv_cache" else "quantize.scales: {tokens: 1024}"
        message = refusal(recipe(f"  - quantize.{chosen}: {{}}\n  - {later}\n"))
        assert f"trains after steps[0] quantize.{chosen} rounds what the model computes" in message


def test_a_model_at_hand_is_refused_before_anything_is_written(tmp_path):
    model = smoothed(tiny_onnx.tiny("llama", True), activations="block")
    with pytest.raises(RecipeError, match=r"export onnx: model.layers.0.self_attn.q_proj: onnxruntime keeps float32"):
        write_exactly(model, exporter("onnx")(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    refuse_rounding(model, exporter("gguf")())
