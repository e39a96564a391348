"""The torch model, the sources it opens from, the channel permutation, and artifacts."""

import json
import os
import shutil

import pytest
import torch

from compress import artifact, source
from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError, Corrupt, NetworkError, NumericalError, RecipeError, UnsafeInput
from compress.interfaces import Context
from compress.model import Recalled
from compress.permutation import permute_channels
from compress.plugin import step
from tests.tiny import tiny_model

WINDOWS = [[5, 6, 7, 8, 9, 10], [1, 2], [200] * 30, [3]]


def plain_logits(model, window):
    return model.module(input_ids=torch.tensor([window])).logits[0]


def test_batched_logits_equal_a_plain_forward_in_any_order():
    model = tiny_model()
    for budget in (1, 40, 4096):
        model.tokens_per_batch = budget
        found = list(model.logits(WINDOWS))
        assert [len(x) for x in found] == [len(w) for w in WINDOWS]
        for window, logits in zip(WINDOWS, found):
            torch.testing.assert_close(logits, plain_logits(model, window), rtol=1e-4, atol=1e-4)


def test_what_is_recalled_is_what_would_be_computed(monkeypatch):
    model, passes = tiny_model(), []
    model.module.base_model.register_forward_pre_hook(lambda module, args: passes.append(module))
    plain = [x.clone() for x in model.logits(WINDOWS)]
    model.recalled = Recalled()
    first = [x.clone() for x in model.logits(WINDOWS)]
    passes.clear()
    again = [x.clone() for x in model.logits([*WINDOWS[::-1], [9, 9]])]
    assert len(passes) == 1  # the new window's
    for a, b, c in zip(plain, first, again[:-1][::-1], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)  # the head's rows come in another order
    monkeypatch.setattr("compress.model.RECALLED_BYTES", 10 * 32 * 4)  # ten positions
    model.recalled = Recalled()
    list(model.logits(WINDOWS))
    assert [model.recalled.get(w) is not None for w in WINDOWS] == [True, True, False, True]


def test_nothing_is_recalled_once_weights_changed():
    model = tiny_model()
    model.recalled = Recalled()
    before = next(model.logits([WINDOWS[0]])).clone()
    name = "model.layers.0.mlp.up_proj.weight"
    model.store(name, EncodedTensor(Encoding("fp16"), model.parameter(name).detach().half() * 2))
    assert model.recalled is None
    assert not torch.allclose(before, next(model.logits([WINDOWS[0]])))


def test_decoding_and_generation_follow_the_forward_pass():
    model = tiny_model()
    torch.testing.assert_close(model.decode_logits(WINDOWS[0]), plain_logits(model, WINDOWS[0]), rtol=1e-4, atol=1e-4)
    tokens = list(WINDOWS[0])
    for token in model.generate(tokens[:], 5):
        assert token == int(plain_logits(model, tokens)[-1].argmax())
        tokens.append(token)


def test_decoding_writes_every_token_out():
    model = tiny_model()
    text = "Straße  , don ' t\n"  # spaces before punctuation stay
    assert model.decode(model.encode(text)) == text
    assert model.decode([]) == ""
    assert model.decode(model.encode("ß")[:1]) == "\ufffd"  # half a character


def test_store_writes_the_decoded_weight_and_changes_the_digest():
    model = tiny_model()
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.digest
    assert before == tiny_model().digest
    W = model.parameter(name).detach()
    encoded = EncodedTensor(Encoding("fp16"), W.half())
    model.store(name, encoded)
    assert torch.equal(model.parameter(name), W.half().float()) and model.digest != before
    with pytest.raises(NumericalError, match="up_proj"):
        model.store(name, EncodedTensor(Encoding("fp16"), torch.full_like(W.half(), torch.inf)))


def test_store_refuses_to_resurrect_pruned_weights():
    model = tiny_model()
    name = "model.layers.0.mlp.up_proj.weight"
    model.masks[name] = torch.zeros_like(model.parameter(name), dtype=torch.bool)
    with pytest.raises(CompressError, match="resurrect"):
        model.store(name, EncodedTensor(Encoding("fp16"), model.parameter(name).detach().half()))


def test_permutation_keeps_the_function_and_moves_the_weights():
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    expected = plain_logits(model, WINDOWS[2])
    permute_channels(model.module, model.facts, seed=3)
    torch.testing.assert_close(plain_logits(model, WINDOWS[2]), expected, rtol=1e-4, atol=1e-4)
    moved = [n for n, p in model.module.named_parameters() if p.dim() == 2 and not torch.equal(p, before[n])]
    assert len(moved) == len(model.facts.matrices)


@pytest.mark.model
def test_permutation_keeps_the_real_model(real_model):
    model = real_model()
    ids = model.encode("Mathematics is the study of numbers, shapes and structures.")
    expected = next(model.logits([ids]))
    permute_channels(model.module, model.facts, seed=1)
    # 1e-4 of logits that reach 30: float32 sums in another order
    torch.testing.assert_close(next(model.logits([ids])), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.model
def test_the_real_tokenizer_splits_digits_as_its_gguf_says(real_baseline):
    ids = real_baseline.encode("In 1999,  42")
    assert [real_baseline.tokenizer.decode([i]) for i in ids] == ["In", " ", "1", "9", "9", "9", ",", "  ", "4", "2"]


@pytest.fixture
def compressed():
    """A tiny model with a mask, mixed encodings, zero points and a float embedding."""
    model = tiny_model()
    windows = [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    step("prune.magnitude")(sparsity=0.3).apply(model, Context(seed=0))
    fields = {"encoding": "int3", "group_size": 16, "symmetric": False, "keep": {"*.q_proj": "bf16"}}
    step("quantize.gptq")(**fields, embeddings="int8").apply(model, Context(seed=0, calibration=windows))
    return model


def test_artifact_round_trip_is_exact(compressed, tmp_path):
    digest = artifact.save(compressed, tmp_path / "a")
    back = artifact.load(tmp_path / "a")
    assert back.digest == compressed.digest and artifact.digest(tmp_path / "a") == digest
    assert back.masks.keys() == compressed.masks.keys()
    for name in compressed.masks:
        assert torch.equal(back.masks[name], compressed.masks[name])
    assert torch.equal(plain_logits(back, WINDOWS[2]), plain_logits(compressed, WINDOWS[2]))
    assert artifact.save(back, tmp_path / "b") == digest
    artifact.verify(tmp_path / "a")
    facts = artifact.manifest(tmp_path / "a")
    assert facts["bits_per_weight"] == pytest.approx(artifact.bits_per_weight(compressed))


@pytest.mark.parametrize("offset", [100, -1])
def test_a_flipped_bit_is_found(compressed, tmp_path, offset):
    artifact.save(compressed, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Corrupt, match="model.safetensors"):
        artifact.verify(tmp_path / "a")


def test_a_changed_code_does_not_load(compressed, tmp_path):
    artifact.save(compressed, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Corrupt, match="not those that were saved"):
        artifact.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_beside_the_weights_that_changed_does_not_load(compressed, tmp_path, name):
    """What ends a text and how one is read decide scores as weights do."""
    artifact.save(compressed, tmp_path / "a")
    file = tmp_path / "a" / name
    file.write_text(file.read_text() + " ")
    with pytest.raises(Corrupt, match=f"{name}: sha256 .*, expected "):
        artifact.load(tmp_path / "a")


def saved_folder(path):
    model = tiny_model()
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return model


def test_a_folder_opens_as_it_was_saved(tmp_path):
    model = saved_folder(tmp_path)
    found = source.load(str(tmp_path))
    assert torch.equal(plain_logits(found, WINDOWS[0]), plain_logits(model, WINDOWS[0]))
    assert source.facts(source.resolve(str(tmp_path))).parameters == found.facts.parameters
    first = source.digest(source.resolve(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text()) | {"rope_theta": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (second := source.digest(source.resolve(str(tmp_path)))) != first
    (tmp_path / "merges.txt").write_text("a b\n")  # which some tokenizers are made of
    assert source.digest(source.resolve(str(tmp_path))) != second


def test_a_file_with_its_time_set_back_is_another_file(tmp_path):
    saved_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    first, stat, data = source.digest(source.resolve(str(tmp_path))), path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert source.digest(source.resolve(str(tmp_path))) != first


def test_unsafe_folders_are_refused(tmp_path):
    saved_folder(tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    (tmp_path / "code" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UnsafeInput, match="auto_map"):
        source.load(str(tmp_path / "code"))
    saved_folder(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match="pytorch_model.bin"):
        source.load(str(tmp_path / "pickle"))
    saved_folder(tmp_path / "link")
    shutil.move(tmp_path / "link" / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (tmp_path / "link" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsafeInput, match="links outside"):
        source.load(str(tmp_path / "link"))


def test_what_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    cases = [
        ("pkg:no-such-package", RecipeError, "pip install"),
        ("pkg:numpy", RecipeError, "expected one .gguf"),
        ("./nowhere", RecipeError, "no such file"),
        ("a/b/c", RecipeError, "no such file"),
        (str(tmp_path), RecipeError, "config.json"),
        (str(tmp_path / "bad.gguf"), Corrupt, "not a readable GGUF"),
    ]
    for spec, kind, message in cases:
        with pytest.raises(kind, match=message):
            source.load(spec)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    saved_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    fewer = {key: value for key, value in weights.items() if key != name}
    save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Corrupt, match=f"tensor {name} is missing; weights and config"):
        source.load(str(tmp_path))
    more = {**weights, "model.layers.1.mlp.up_proj.bias": torch.ones(64), "model.layers.9.x.weight": torch.ones(1)}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Corrupt, match=r"tensor model.layers.1.mlp.up_proj.bias is not part .* \(and 1 more\)"):
        source.load(str(tmp_path))


def test_a_gguf_without_a_tensor_is_refused(tmp_path, monkeypatch):
    from export._llama_cpp import find
    from export.gguf import Gguf
    from tests.tiny_gguf import tiny

    model, name = tiny(), "model.layers.1.mlp.up_proj.weight"
    tensors = [(key, tensor) for key, tensor in model.tensors() if key != name]
    monkeypatch.setattr(model, "tensors", lambda: iter(tensors))
    Gguf().write(model, tmp_path)
    with pytest.raises(Corrupt, match=f"model-.*-F32.gguf: tensor {name} is missing"):
        source.load(str(find(tmp_path)))


def test_a_model_has_the_name_of_its_folder_or_of_what_names_it(tmp_path, monkeypatch):
    folder = tmp_path / "mine@2"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {f"{folder}/": "mine@2", ".": "mine@2", "../mine@2": "mine@2", "org/name@v1": "name", "pkg:x": "pkg:x"}
    assert {spec: source._name(source.Source(spec, "folder", None)) for spec in names} == names
    names = {
        "a-Q4_0": "a",
        "SmolLM2.Q4_1": "SmolLM2",
        "m-BF16": "m",
        "m-fp16": "m",
        "Qwen2": "Qwen2",
        "a-qwen2": "a-qwen2",
    }
    assert {name: source._TYPE.sub("", name) for name in names} == names


def test_a_hub_id_without_network_is_a_network_error(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=r"org-name/model-name@v1.*local path"):
        source.load("org-name/model-name@v1")
    assert NetworkError.exit_code == 9


def test_an_unknown_architecture_is_refused(tmp_path):
    saved_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(RecipeError, match="'mamba' is not supported; supported: llama"):
        source.load(str(tmp_path))


def test_a_saved_tokenizer_neither_pads_nor_truncates(tmp_path):
    model = tiny_model()
    model.tokenizer.pad_token = model.tokenizer.convert_ids_to_tokens(0)
    model.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)
    model.save_tokenizer(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None
