"""llama.cpp's named mixes, against what llama.cpp's own tool makes of the same file."""

import ctypes
import importlib
from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
import torch
from torch import Tensor

from compress import ggml_mixes
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import exporter, step
from export import _llama_cpp
from tests import tiny_gguf
from tests.tiny_gguf import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PRESETS = get_args(ggml_mixes.Preset)
SHAPES: dict[str, dict[str, Any]] = {
    # every rule about layers: a 16th and an 8th of the blocks, thirds between, groups of four query heads
    "deep": {"num_hidden_layers": 17, "hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 32},
    "wide": {"hidden_size": 256, "num_attention_heads": 4},
    "wide, grouped and tied": {"hidden_size": 256, "num_attention_heads": 8, "tied": True},
    # rows of 96 weights: 256 to a block fit down_proj alone
    "narrow": {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6},
    "narrow and tied": {"hidden_size": 64, "num_attention_heads": 4, "tied": True},
}


def shaped(name: str) -> Model:
    options = {"intermediate_size": 256, "initializer_range": 0.08, **SHAPES[name]}
    return tiny(
        tied=options.pop("tied", False), head_dim=options["hidden_size"] // options["num_attention_heads"], **options
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Model, Path]]:
    """Each shape, with its float32 file."""
    made = {}
    for name in SHAPES:
        folder = tmp_path_factory.mktemp("float32")
        model = shaped(name)
        exporter("gguf")().write(model, folder)
        made[name] = (model, _llama_cpp.find(folder))
    return made


def quantized(source: Path, out: Path, preset: str, importances: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """llama.cpp's own file: GGUF tensor by name; importances by GGUF name, as an importance matrix."""
    library = _llama_cpp.library()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{preset}"])
    parameters.nthread = 1
    if importances is not None:
        rows = (library.llama_model_imatrix_data * (len(importances) + 1))()
        for row, (name, values) in zip(rows, importances.items()):
            row.name, row.size = name.encode(), values.numel()
            row.data = ctypes.cast(values.data_ptr(), type(row.data))
        parameters.imatrix = rows
    assert library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)) == 0
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == parameters.ftype
    return {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(shape, importance, models, tmp_path):
    model, source = models[shape]
    names = gguf_names(model)
    data = {names[t]: torch.ones(m) for t, (_, m) in model.facts.matrices.items()} if importance else None
    for preset in PRESETS:
        theirs = quantized(source, tmp_path / f"{preset}.gguf", preset, data)
        asked = ggml_mixes.types(preset, model.facts, importance)
        ours = {t: ggml_mixes.fitted(kind, model.facts.matrices[t][1]) for t, kind in asked.items()}
        found = {t: theirs[names[t]].tensor_type.name.lower().replace("f16", "fp16") for t in model.facts.matrices}
        assert ours == found, preset


def gguf_names(model: Model) -> dict[str, str]:
    return importlib.import_module("export.gguf")._names("llama", model.facts.layers)


@pytest.mark.parametrize(("shape", "preset", "fields"), [
    ("wide", "Q4_K_M", {}), ("wide, grouped and tied", "Q2_K", {}), ("wide", "IQ4_XS", {}),
    ("deep", "Q4_0", {"fallback": "llama.cpp"}), ("narrow", "Q5_K_M", {"fallback": "llama.cpp"}),
])  # fmt: skip
def test_the_step_makes_llama_cpps_very_bytes_from_the_same_importances(
    shape, preset, fields, models, tmp_path, monkeypatch
):
    source = models[shape][1]
    model = shaped(shape)
    module = importlib.import_module("compress.steps.quantize.ggml")
    seen: dict[str, Tensor] = {}
    store = module._store

    def recording(model: Model, tensor: str, kind: Any, importance: Tensor | None) -> None:
        if importance is not None:
            seen[tensor] = importance
        store(model, tensor, kind, importance)

    monkeypatch.setattr(module, "_store", recording)
    generator = torch.Generator().manual_seed(0)
    calibration = [torch.randint(0, 900, (64,), generator=generator) for _ in range(2)]
    context = Context(seed=0, calibration=calibration)
    step("quantize.ggml")(preset=preset, **fields).apply(model, context)
    exporter("gguf")().write(model, tmp_path)
    ours = gguf.GGUFReader(_llama_cpp.find(tmp_path))
    names = gguf_names(model)
    importances = {names[tensor]: values.contiguous() for tensor, values in seen.items()}
    assert len(importances) == len(model.facts.linears)
    theirs = quantized(source, tmp_path / "theirs.gguf", preset, importances)
    assert ours.fields["general.file_type"].contents() == int(gguf.LlamaFileType[f"MOSTLY_{preset}"])
    for tensor in ours.tensors:
        other = theirs[tensor.name]
        assert tensor.tensor_type == other.tensor_type and tensor.data.tobytes() == other.data.tobytes(), tensor.name
    assert len(theirs) == len(ours.tensors)
    assert bool(context.notes) == bool(fields)


def test_rows_that_the_blocks_do_not_divide_need_a_word_of_the_user(models):
    model = models["narrow"][0]
    facts = model.facts
    ask = step("quantize.ggml")
    message = (
        r"preset Q4_K_M: model.layers.0.self_attn.q_proj.weight has 96 input channels, which q4_k's blocks of 256 do "
        r"not divide, nor do those of 19 more matrices; llama.cpp would store 18 q5_0, 2 q8_0 instead: ask for that "
        r"with fallback: llama.cpp, or name a type"
    )
    with pytest.raises(RecipeError, match=message):
        ask(preset="Q4_K_M").check(facts)
    ask(preset="Q4_0", embeddings="q8_0").check(facts)  # blocks of 32 alone
    for fallback, expected in (("llama.cpp", {"q5_0", "q8_0"}), ("iq4_nl", {"iq4_nl"})):
        chosen = ask(preset="Q4_K_M", fallback=fallback)
        chosen.check(facts)
        types = chosen._types(facts)
        misfits = {types[name] for name, (_, m) in facts.matrices.items() if m % 256}
        assert misfits == expected and types["model.layers.0.mlp.down_proj.weight"] in ("q4_k", "q6_k")
    context = Context(seed=0, calibration=[torch.arange(32)])
    ask(preset="Q4_K_M", fallback="q4_0").apply(shaped("narrow"), context)
    assert context.notes == [
        "quantize.ggml: 20 of 23 matrices have rows that blocks of 256 weights do not divide "
        "(18 q4_k, 2 q6_k were asked for); fallback: q4_0 stores 20 q4_0"
    ]


def test_keep_and_embeddings_overrule_a_preset_and_a_type_contradicts_it():
    facts = shaped("wide, grouped and tied").facts
    ask = step("quantize.ggml")
    kept = ask(preset="Q4_K_M", keep={"*.q_proj": "q8_0"}, embeddings="q4_0")._types(facts)
    assert kept["model.layers.1.self_attn.q_proj.weight"] == "q8_0" and kept[facts.embedding_tensor] == "q4_0"
    assert facts.embedding_tensor not in ask(preset="Q4_K_M", embeddings=None).encodings(facts)
    assert ask()._types(facts) == ask(type="q4_k", embeddings="q8_0")._types(facts)
    with pytest.raises(RecipeError, match="type=q6_k and preset=Q4_K_M both choose"):
        ask(preset="Q4_K_M", type="q6_k")


def test_a_mix_of_the_users_own_has_the_name_of_most_of_its_weights(tmp_path):
    model = shaped("wide, grouped and tied")
    fields: dict[str, Any] = {"preset": "Q4_K_M", "keep": {"*.o_proj": "q5_k"}}
    step("quantize.ggml")(**fields).apply(model, Context(seed=0, calibration=[torch.arange(32)]))
    exporter("gguf")().write(model, tmp_path)
    kind = gguf.GGUFReader(_llama_cpp.find(tmp_path)).fields["general.file_type"].contents()
    assert kind == int(gguf.LlamaFileType.MOSTLY_Q4_K_S)
    assert tiny_gguf.differing(model, tmp_path) == set()
