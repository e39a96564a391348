"""A transformers tokenizer in GGUF's terms, and the proof that llama.cpp reads the same token ids from it.

Byte-level BPE and SentencePiece's tokenizers (`_gguf_pieces`) are written. Of the former, llama.cpp hard-codes the
pattern that splits text before the merges and looks it up by name, so the name is chosen by the tokenizer's own
splitting rules, never by the model's name.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError, RecipeError
from export import _gguf_pieces as pieces

logger = logging.getLogger(__name__)
MIXED = 2000  # texts of several pieces

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = "GPT-2's pattern"

# Splitting rules in order → llama.cpp's name, and whether whole words in the vocabulary skip the merges
# (llama.cpp, src/llama-vocab.cpp).
_PATTERNS: Mapping[tuple[str, ...], tuple[str, bool]] = {
    (_GPT2,): ("gpt-2", False),
    ("digits", _GPT2): ("smollm", False),
    (rf"{_CONTRACTIONS}|\p{{N}}{_TAIL}",): ("qwen2", False),
    (rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}{_TAIL}",): ("llama-bpe", True),
}

# Text that tokenizers disagree about: scripts, joiners, marks, spaces, numbers, controls, code.
_PIECES = (
    "Hello world", "don't", "WE'LL", "it’s", "x1", "1234567", "3.14", " 42",
    "  7", "\n8", "\n\n9", "a\tb", "\r\n", "\n", "   ", " ", "\u00a0", "\u3000",
    "\u2009", "\u200b", "\u200d", "\ufeff", "\x00", "\x07", "\x1b[0m", "\x7f",
    "\u0085", "\u2028", "你好，世界", "第一个", "日本語の文章", "カタカナ", "한국어", "Привет",
    "Ελληνικά", "עברית", "العربية ١٢٣", "हिन्दी १२३", "ภาษาไทย", "தமிழ்",
    "Tiếng Việt", "e\u0301", "½", "x²³", "Ⅷ", "①", "٣", "𝟙𝟚", "𝔘𝔫𝔦", "😀",
    "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "\U0001f9ff", "\ue000", "\ufffd", "€100", "…",
    "—", "“q”", "¿qué?", "naïve", "def f(x):\n    return x**2", "<br/>",
    "{\"a\": [1, 2]}", "https://a.b/c?d=e&f#g", "a_b-c.d", "!!!", "==>", "\\n",
    "C:\\x", "// ok", "#", "@user", "$x_1$", "CamelCaseWord", "ALLCAPS", "ſ",
    "İi", "ß", "ǅ", "'S", "'", "''s", "<|", "|>",
)  # fmt: skip


def add(writer: Any, tokenizer: Any, size: int, eos_ids: frozenset[int]) -> None:
    """Write the tokenizer's keys: model, splitting pattern, tokens, merges, special ids, chat template.

    size: rows of the embedding; ids that the tokenizer does not use become unused tokens. Raises RecipeError
    for a tokenizer that llama.cpp has no equivalent of.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix = pieces.prefix(backend)
    pre = "default" if prefix is not None else pattern(backend)
    tokens, types = _tokens(backend, size)
    writer.add_tokenizer_model("gpt2" if prefix is None else "llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if prefix is not None:
        writer.add_token_scores(pieces.scores(backend, tokens))
        types = pieces.types(backend, tokens, types)
    writer.add_token_types(types)
    writer.add_add_space_prefix(bool(prefix))
    special = _special(tokenizer, size, eos_ids, merges=prefix is None)
    special.add_to_gguf(writer, quiet=True)


def pattern(backend: Mapping[str, Any]) -> str:
    """llama.cpp's name for the splitting rules of a tokenizer.json; raises RecipeError for unknown ones."""
    model, normalizer = backend["model"], backend.get("normalizer")
    if model["type"] != "BPE" or model.get("dropout"):
        raise RecipeError(f"gguf: a {model['type']} tokenizer is not byte-level BPE; export to onnx instead")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise RecipeError(f"gguf: llama.cpp does not apply the normalizer {normalizer['type']}; export to onnx")
    if normalizer is not None:
        logger.warning("llama.cpp applies no Unicode normalization: token ids are equal for NFC text only")
    rules = tuple(_rules(backend.get("pre_tokenizer")))
    name, whole_words = _PATTERNS.get(rules, ("", False))
    if not name or bool(model.get("ignore_merges")) != whole_words:
        known = ", ".join(sorted(name for name, _ in _PATTERNS.values()))
        raise RecipeError(f"gguf: no llama.cpp pattern splits text by {rules}; known: {known}; export to onnx")
    return name


def check(tokenizer: Any, eos_ids: frozenset[int], encode: Callable[[str], list[int]], ends: frozenset[int]) -> None:
    """Compare token ids on over 2,000 texts, and the ids that end a generation; raises CompressError.

    encode, ends: llama.cpp's, from the written file.
    """
    texts = list(probes(tokenizer))
    for text, wanted in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        if (found := encode(text)) != wanted:
            raise CompressError(f"gguf: llama.cpp tokenizes {text!r} as {found}, expected {wanted}; export to onnx")
    if missing := eos_ids - ends:
        raise CompressError(f"gguf: llama.cpp would not stop at the end-of-sequence ids {sorted(missing)}")
    if not eos_ids and ends:
        logger.warning("the model has no end-of-sequence token; llama.cpp will stop at %s", sorted(ends))


def probes(tokenizer: Any) -> Iterator[str]:
    """Texts on which tokenizers differ: pieces, added tokens in context, and random mixtures of both."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    added = sorted(str(token) for token in tokenizer.get_added_vocab())
    rng = random.Random(0)
    mixed = ("".join(rng.choices(_PIECES + tuple(added[:32]), k=rng.randint(2, 6))) for _ in range(MIXED))
    for text in (*_PIECES, *added, *(f"a {token} b{token}c" for token in added), *mixed):
        yield unicodedata.normalize("NFC", text) if type(normalizer).__name__ == "NFC" else text


def _rules(pre: Mapping[str, Any] | None) -> Iterator[str]:
    """The pre-tokenizer as a flat sequence of rules; anything unknown stands for itself, as JSON."""
    if pre is None:
        return
    kind = pre["type"]
    if kind == "Sequence":
        for part in pre["pretokenizers"]:
            yield from _rules(part)
    elif kind == "Digits" and pre["individual_digits"]:
        yield "digits"
    elif kind == "Split" and pre["behavior"] == "Isolated" and not pre["invert"] and "Regex" in pre["pattern"]:
        yield pre["pattern"]["Regex"]
    elif kind == "ByteLevel" and not pre["add_prefix_space"]:
        if pre["use_regex"]:
            yield _GPT2
    else:
        yield json.dumps(pre)


def _tokens(backend: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and token types of every id below `size`."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    found = [(token, i, TokenType.NORMAL) for token, i in backend["model"]["vocab"].items()]
    for entry in backend["added_tokens"]:
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        found.append((entry["content"], entry["id"], kind))
    for token, i, kind in found:
        if i >= size:
            raise RecipeError(f"gguf: token {token!r} has id {i}, but the embedding only {size} rows")
        tokens[i], types[i] = token, int(kind)
    return tokens, types


def _special(tokenizer: Any, size: int, eos_ids: frozenset[int], merges: bool) -> Any:
    """Merges, special ids and chat template, with the ids and flags that this very tokenizer shows."""
    from gguf import SpecialVocab

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(Path(folder), load_merges=merges, n_vocab=size)
    special.add_special_token = _flags(tokenizer)
    first = tokenizer.eos_token_id
    ends = sorted(eos_ids, key=lambda i: (i != first, i))  # the tokenizer's own first
    if len(ends) > 3:
        raise RecipeError(f"gguf: {len(ends)} end-of-sequence ids {ends}; the format names three")
    for kind in ("eos", "eot", "eom"):
        special.special_token_ids.pop(kind, None)
    special.special_token_ids.update(zip(("eos", "eot", "eom"), ends))
    return special


def _flags(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer puts the begin and end tokens around a text by default."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for begin, end in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [bos] * begin + inner + [eos] * end:
            return {"bos": begin, "eos": end}
    raise RecipeError(f"gguf: the tokenizer turns 'a' into {whole}: more than begin and end tokens around {inner}")
