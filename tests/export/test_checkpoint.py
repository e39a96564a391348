"""Checkpoints: bit for bit what was gated, and opened by transformers itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, RecipeError
from compress.exporting import weights_exact
from compress.measure import open_model
from compress.model import Model
from compress.steps.quantize._fields import round_to_nearest
from export.checkpoint import WEIGHTS, Checkpoint
from tests.tiny_gguf import tiny, windows

KINDS = {
    "int4 g32": [Encoding("int4", 32)],
    "int8 per channel": [Encoding("int8")],
    "int2 per channel": [Encoding("int2")],
    "int3 g32": [Encoding("int3", 32)],
    "int5 g32": [Encoding("int5", 32)],
    "fp16": [Encoding("fp16")],
    "mixed": [Encoding("int4", 32), Encoding("int8", 32), Encoding("int3", 16), Encoding("bf16")],
}


def encoded(model: Model, encodings: list[Encoding]) -> Model:
    """The model with its linears in turn in these encodings, and its embedding in float16."""
    for i, name in enumerate(model.facts.linears):
        tensor, encoding = f"{name}.weight", encodings[i % len(encodings)]
        model.store(tensor, round_to_nearest(tensor, model.parameter(tensor).detach(), encoding, search=False))
    name = model.facts.embedding_tensor
    model.store(name, EncodedTensor(Encoding("fp16"), model.parameter(name).detach().half()))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_the_very_weights_and_computes_the_same_logits(kind, tied, tmp_path):
    model = encoded(tiny(tied=tied), KINDS[kind])
    exporter = Checkpoint()
    exporter.write(model, tmp_path)
    assert weights_exact(model, exporter, tmp_path)
    opened = exporter.open(tmp_path)
    assert all(torch.equal(opened.parameter(name), p) for name, p in model.module.named_parameters())
    (window,) = windows(model, 60)
    torch.testing.assert_close(next(opened.logits([window])), next(model.logits([window])), rtol=0, atol=1e-4)
    assert opened.generate(window[:20], 12) == model.generate(window[:20], 12)
    assert opened.encode("What now?") == model.encode("What now?") and opened.eos_ids == model.eos_ids
    assert "compressed-tensors" in opened.runtime
    assert ("int" in opened.compute) == (kind != "fp16")


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_other_architectures_and_a_model_in_floats(architecture, tmp_path):
    for i, model in enumerate((tiny(architecture), encoded(tiny(architecture), KINDS["int4 g32"]))):
        Checkpoint().write(model, tmp_path / str(i))
        assert weights_exact(model, Checkpoint(), tmp_path / str(i))
        (window,) = windows(model, 30)
        assert torch.equal(next(Checkpoint().open(tmp_path / str(i)).logits([window])), next(model.logits([window])))


def test_two_writings_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        Checkpoint().write(encoded(tiny(), KINDS["mixed"]), tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert WEIGHTS in files and "tokenizer.json" in files
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize(
    ("encoding", "tensor", "message"),
    [
        (Encoding("nf4", 32), "model.layers.0.mlp.up_proj.weight", "integer codes, not nf4; use int4"),
        (Encoding("int4", 32, False), "model.layers.0.mlp.up_proj.weight", "packed zero points; use symmetric: true"),
        (Encoding("q4_1"), "model.layers.0.mlp.up_proj.weight", "integer codes, not q4_1; use int4"),
        (Encoding("int8", 32), "model.embed_tokens.weight", "no coded embedding or head; use embeddings: fp16"),
        (Encoding("int8", 32), "lm_head.weight", "no coded embedding or head; use embeddings: fp16"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_a_remedy(encoding, tensor, message, tmp_path):
    reason = Checkpoint().refuses(encoding, tensor)
    assert reason is not None and message in reason and tensor in reason
    model = tiny(tied=False)
    held = EncodedTensor(encoding, torch.zeros(96, 40, dtype=torch.uint8))  # two blocks of q4_1 to a row
    if not encoding.is_block:
        held = round_to_nearest(tensor, model.parameter(tensor).detach(), encoding, search=False)
    model.store(tensor, held)
    with pytest.raises(RecipeError, match="checkpoint: "):
        Checkpoint().write(model, tmp_path / "out")


def changed(tmp_path, change):
    """A written checkpoint whose tensors were changed afterwards."""
    model = encoded(tiny(), KINDS["int4 g32"])
    Checkpoint().write(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_one_other_number_is_not_exact(suffix, tmp_path):
    def change(tensors):
        part = tensors[f"model.layers.1.mlp.down_proj.{suffix}"]
        part[0, 0] = part[0, 0] ^ 1 if part.dtype == torch.int32 else part[0, 0] * 2

    assert not weights_exact(changed(tmp_path, change), Checkpoint(), tmp_path)


def test_a_folder_is_measured_in_transformers_too(tmp_path):
    Checkpoint().write(encoded(tiny(), KINDS["int4 g32"]), tmp_path)
    assert open_model(str(tmp_path)).runtime.startswith("transformers")


def test_files_that_do_not_fit_together_are_corrupt(tmp_path):
    module = "model.layers.1.mlp.down_proj"
    changed(tmp_path / "a", lambda tensors: tensors.pop(f"{module}.weight_scale"))
    changed(tmp_path / "b", lambda tensors: tensors[f"{module}.weight_scale"].mul_(1 + 2**-20))
    changed(tmp_path / "c", lambda tensors: None)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"].remove(module)
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    for name, message in (("a", "cannot be read"), ("b", "no float16"), ("c", "does not say how")):
        with pytest.raises(Corrupt, match=message):
            list(Checkpoint().stored(tmp_path / name))
    with pytest.raises(Corrupt, match="transformers cannot open it"):
        Checkpoint().open(tmp_path / "nothing")
