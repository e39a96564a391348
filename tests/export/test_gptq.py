"""GPTQ checkpoints: the words of the layout, and folders that hold what was gated."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.encodings import EncodedTensor, Encoding, same_stored
from compress.errors import Corrupt, RecipeError
from compress.exporting import weights_exact
from compress.measure import open_model
from compress.model import Model
from compress.plugin import exporter
from compress.steps.quantize._fields import round_to_nearest
from export._gptq import CONFIG, pack, unpack
from export.checkpoint import WEIGHTS, Checkpoint
from tests.tiny_gguf import tiny, windows

pytestmark = pytest.mark.usefixtures("one_thread")
GPTQ = Checkpoint(format="gptq")
KINDS = {
    "int4 g32": Encoding("int4", 32),
    "int8 g32": Encoding("int8", 32),
    "int2 g16": Encoding("int2", 16),
    "int4 per channel": Encoding("int4"),
}


def encoded(model: Model, encoding: Encoding) -> Model:
    for name in model.facts.linears:
        tensor = f"{name}.weight"
        model.store(tensor, round_to_nearest(tensor, model.parameter(tensor).detach(), encoding, search=False))
    name = model.facts.embedding_tensor
    model.store(name, EncodedTensor(Encoding("fp16"), model.parameter(name).detach().half()))
    return model


def slowly_packed(tensor: EncodedTensor) -> dict[str, list[list[int]]]:
    """qweight and qzeros, word by word in Python's integers."""
    bits, (n, m) = tensor.encoding.bits, tensor.codes.shape
    per, middle, groups = 32 // bits, 2 ** (bits - 1), tensor.scales.shape[1]

    def word(numbers: list[int]) -> int:
        total = 0
        for place, number in enumerate(numbers):
            assert 0 <= number < 2**bits
            total |= number << (bits * place)
        return total - 2**32 if total >= 2**31 else total

    codes = tensor.codes.tolist()
    weights = [[word([codes[o][i + k] + middle for k in range(per)]) for o in range(n)] for i in range(0, m, per)]
    zeros = [[word([middle - 1] * per) for _ in range(n // per)] for _ in range(groups)]
    return {"qweight": weights, "qzeros": zeros}


@given(st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64, None]), st.integers(1, 3), st.integers(0, 2**31))
def test_words_are_those_of_a_slow_packer_and_unpack_to_the_same_codes(bits, group, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    encoding = Encoding(f"int{bits}", group)
    n, m = 32, 64 * blocks
    low, high = encoding.code_range
    codes = torch.randint(low, high + 1, (n, m), generator=generator).to(torch.int8)
    tensor = EncodedTensor(encoding, codes, torch.randn(n, encoding.groups(m), generator=generator).half())
    parts = pack(tensor)
    for name, expected in slowly_packed(tensor).items():
        assert parts[name].dtype == torch.int32 and parts[name].tolist() == expected
    assert torch.equal(parts["scales"], tensor.scales.T) and parts["scales"].dtype == torch.float16
    assert parts["g_idx"].tolist() == [i // (group or m) for i in range(m)]
    back = unpack("w", parts, encoding)
    assert same_stored(tensor, back) and torch.equal(back.decode(), tensor.decode())


def test_words_by_hand():
    codes = torch.zeros(32, 32, dtype=torch.int8)
    codes[5, 8:16] = torch.tensor([-8, -7, -1, 0, 1, 5, 6, 7])
    parts = pack(EncodedTensor(Encoding("int4", 32), codes, torch.ones(32, 1, dtype=torch.float16)))
    assert parts["qweight"].shape == (4, 32) and parts["qweight"][1, 5] == 0xFED98710 - 2**32
    assert (parts["qzeros"] == 0x77777777).all() and parts["qzeros"].shape == (1, 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_the_very_codes_and_computes_the_same_logits(kind, tied, tmp_path):
    model = encoded(tiny(tied=tied), KINDS[kind])
    GPTQ.write(model, tmp_path)
    assert weights_exact(model, GPTQ, tmp_path)
    opened = open_model(str(tmp_path))
    (window,) = windows(model, 60)
    assert torch.equal(next(opened.logits([window])), next(model.logits([window])))
    assert opened.generate(window[:20], 12) == model.generate(window[:20], 12)
    assert "no kernel of GPTQModel's" in opened.runtime and opened.compute.startswith(f"fp16 + {kind} weights")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / CONFIG).read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["quant_method"]) == (
        KINDS[kind].bits, KINDS[kind].group_size or -1, True, "gptq",
    )  # fmt: skip
    names = set(load_file(tmp_path / WEIGHTS))
    assert {f"model.layers.0.mlp.up_proj.{p}" for p in ("qweight", "qzeros", "scales", "g_idx")} <= names
    assert "model.layers.0.mlp.up_proj.weight" not in names and ("lm_head.weight" in names) == (not tied)


def test_the_usage_names_who_opens_it():
    assert {"transformers", "GPTQModel", "vLLM"} == set(GPTQ.usage_of()) and len(Checkpoint().usage_of()) == 2


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding("int3", 32), "2, 4 or 8 bits, not int3 g32; use int4 or int8"),
        (Encoding("fp32"), "every linear in 2, 4 or 8 bits, not fp32"),
        (Encoding("int4", 32, symmetric=False), "zero points less one, and has no place for 0"),
        (Encoding("nf4", 32), "gptq packs integer codes, not nf4"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_a_remedy(encoding, message):
    assert message in (GPTQ.refuses(encoding, "model.layers.0.mlp.up_proj.weight") or "")


def test_mixtures_and_odd_shapes_are_refused(tmp_path):
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
    mixed = dict(zip(names, (Encoding("int4", 32), Encoding("int8", 32), Encoding("fp16"))))
    reason = GPTQ.refuses_together(mixed)
    assert reason is not None and "one encoding for all linears" in reason and "int8 g32" in reason
    assert Checkpoint().refuses_together(mixed) is None
    assert GPTQ.refuses_together({names[0]: Encoding("int4", 32), names[2]: Encoding("fp16")}) is None
    model = encoded(tiny(), Encoding("int4", 32))
    tensor = names[1]
    model.store(tensor, round_to_nearest(tensor, model.parameter(tensor).detach(), Encoding("int8", 32), search=False))
    with pytest.raises(RecipeError, match="checkpoint: gptq has one encoding for all linears"):
        GPTQ.write(model, tmp_path / "out")
    with pytest.raises(RecipeError, match="multiples of 32 channels, and .*gate_proj has 64 inputs and 80 outputs"):
        GPTQ.check(tiny(intermediate_size=80).facts)


def changed(tmp_path, change):
    model = encoded(tiny(), Encoding("int4", 32))
    GPTQ.write(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return model


DOWN = "model.layers.1.mlp.down_proj"


def test_one_other_number_is_not_exact(tmp_path):
    def flip(tensors):
        tensors[f"{DOWN}.qweight"][3, 5] ^= 16

    assert not weights_exact(changed(tmp_path / "a", flip), GPTQ, tmp_path / "a")

    def scale(tensors):
        tensors[f"{DOWN}.scales"][0, 0] *= 2

    assert not weights_exact(changed(tmp_path / "b", scale), GPTQ, tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{DOWN}.qzeros"].add_(1), "zero points are not those of int4 g32"),
        (lambda t: t[f"{DOWN}.g_idx"].copy_(t[f"{DOWN}.g_idx"].flip(0)), "groups or zero points are not those"),
        (lambda t: t.pop(f"{DOWN}.g_idx"), "g_idx' is missing"),
        (lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"].float()}), "do not fit int4 g32"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is not in both"),
    ],
)
def test_parts_that_say_something_else_are_corrupt(change, message, tmp_path):
    changed(tmp_path, change)
    with pytest.raises(Corrupt, match=message):
        GPTQ.open(tmp_path)


def test_configurations_that_disagree_are_corrupt(tmp_path):
    changed(tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "group_size": 64}))
    with pytest.raises(Corrupt, match=r"quantize_config.json and config.json disagree"):
        GPTQ.open(tmp_path)
    assert exporter("checkpoint") is Checkpoint
