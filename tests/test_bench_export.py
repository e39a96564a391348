"""The parts of scripts/bench_export.py that its figures rest on: two files of the same kind, made by two tools."""

import importlib.util
import sys
from pathlib import Path

import gguf
import pytest

from compress import artifact
from compress.plugin import exporter
from export._llama_cpp import find
from tests.tiny_gguf import tiny, windows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "bench_export.py"
    spec = importlib.util.spec_from_file_location("bench_export", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_export"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_export"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    artifact.save(tiny(initializer_range=0.05), folder)
    return folder


def test_llama_cpps_own_file_is_as_large_as_ours_and_computes_much_the_same(script, model_folder, tmp_path):
    (ours, seconds), (theirs, peer_seconds), proof = script.gguf_pair(str(model_folder), "Q4_0", tmp_path)
    # Q4_1 in a first eighth needs importances and more than seven blocks: here the types are the same
    heads = [gguf.GGUFReader(find(folder)).data_offset for folder in (ours, theirs)]  # our keys say more
    assert script.weights_bytes(ours) - heads[0] == script.weights_bytes(theirs) - heads[1] > 0
    assert proof["weights_exact"] and 0.5 < proof["size over nominal"] <= 1.03
    assert 1e-7 < proof["kl_from_the_model"] < 0.1 and proof["kl_of_decoding"] < 0.01  # 8-bit activations
    assert min(seconds["rounding"], seconds["writing"], peer_seconds["both"]) > 0
    model = artifact.load(model_folder)
    (window,) = windows(model, 40)
    for folder in (ours, theirs):
        runtime = exporter("gguf")().open(folder)
        difference = next(runtime.logits([window])) - next(model.logits([window]))
        assert 0 < difference.abs().mean() < 0.5 * next(model.logits([window])).std()  # 4 bits
        runtime.close()


def test_a_changed_byte_is_not_exact(script, model_folder, tmp_path):
    model, made = artifact.load(model_folder), exporter("gguf")()
    made.write(model, tmp_path)
    raw = bytearray(find(tmp_path).read_bytes())
    raw[-5] ^= 1
    find(tmp_path).write_bytes(raw)
    assert not script.proven(model, made, tmp_path)["weights_exact"]


def test_genais_own_int4_file_opens_in_the_same_runtime(script, model_folder, tmp_path):
    (ours, _), (theirs, _), proof = script.onnx_pair(str(model_folder), "float32", "int8", tmp_path / "pair")
    assert script.rotary_tables(ours) == 2 * 4 * 256 * 8  # cos and sin: (context, head_size / 2) float32
    assert proof["weights_exact"] and proof["kl_from_the_model"] < 1e-5 and proof["kl_of_decoding"] < 1e-5
    model = artifact.load(model_folder)
    (window,) = windows(model, 40)
    expected = next(model.logits([window]))
    for folder in (ours, theirs):
        runtime = exporter("onnx")().open(folder)
        assert "float32 activations" in runtime.compute
        found = next(runtime.logits([window]))
        assert 0 < (found - expected).abs().mean() < 0.5 * expected.std()
        runtime.close()
    assert script.weights_bytes(theirs) > script.weights_bytes(ours)  # its embedding stays in float32
