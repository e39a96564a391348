"""Tokenizers of SentencePiece's kind in GGUF: llama.cpp reads the very token ids of tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.errors import RecipeError
from compress.exporting import weights_exact
from compress.model import Model
from export._gguf_vocabulary import _PIECES
from export.gguf import Gguf
from tests.tiny import tiny_module

pytestmark = pytest.mark.usefixtures("one_thread")
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def learned(count: int) -> list[str]:
    """Tokens that byte-pair encoding finds in this file, characters first; a NUL is a byte to SentencePiece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=count, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), *_PIECES], trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted((token for token in vocabulary if "\0" not in token), key=lambda token: vocabulary[token])


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """As conversions write it: every pair of tokens that makes a token is a merge, in the order of what it makes."""
    tokens = [*SPECIAL, *BYTES, *learned(500)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    splits = ((token[:i], token[i:]) for token in tokens[len(SPECIAL) + 256 :] for i in range(1, len(token)))
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    written = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), written]) if prefix else written
    if not prefix:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    named = {name: f"<{name[:3]}>" for name in ("pad_token", "eos_token", "bos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def model_of(tokenizer: Any) -> Model:
    return Model(tiny_module("gemma", vocab_size=len(tokenizer), eos_token_id=1), tokenizer)


@pytest.mark.parametrize("prefix", [False, True])
def test_llama_cpp_reads_the_same_token_ids(prefix: bool, tmp_path: Path) -> None:
    model = model_of(sentencepiece(prefix))
    Gguf().write(model, tmp_path)  # which compares over 2,000 texts
    assert weights_exact(model, Gguf(), tmp_path)
    runtime = Gguf().open(tmp_path)
    text = Path(__file__).read_text(encoding="utf-8")
    ids = model.encode(text)
    assert runtime.encode(text) == ids and len(ids) < 0.6 * len(text)  # merges are at work
    words = "naïve  words of 7 \U0001f9ff\n"
    assert runtime.decode(model.encode(words)) == model.decode(model.encode(words)) == " " * prefix + words
    assert runtime.encode("\U0001f9ff") == model.encode("\U0001f9ff")  # bytes
    assert runtime.bos_id == 2 and 1 in runtime.eos_ids
    runtime.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "does not rewrite text by .*Lowercase"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "does not rewrite text by .*Whitespace"),
        (lambda t: setattr(t, "model", models.BPE({"a": 0}, [], byte_fallback=True)), "no token <0x00>"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = model_of(sentencepiece(prefix=False))
    change(model.tokenizer.backend_tokenizer)
    with pytest.raises(RecipeError, match=message):
        Gguf().write(model, tmp_path)
