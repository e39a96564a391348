"""SentencePiece's tokenizers in GGUF's terms: Gemma's, Llama 2's and their like.

tokenizer.json holds them as BPE with a rank per merge, where spaces are written as "▁" and unknown characters as
bytes. llama.cpp merges whatever two neighbours make a token, that of the highest score first. Both agree where the
merges are all the pairs that make a token, in the order of the tokens, as conversions from SentencePiece write them;
whether they do is checked on the written file, text by text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import RecipeError

SPACE = "▁"
_WRITTEN = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}  # how spaces become part of the text
_BEFORE = {"type": "Prepend", "prepend": SPACE}
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def prefix(backend: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before a text; None for a tokenizer.json that is not SentencePiece's.

    Raises RecipeError for one that splits or rewrites text as llama.cpp does not.
    """
    model = backend["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    steps = backend.get("normalizer") or {}
    steps = steps["normalizers"] if steps.get("type") == "Sequence" else [steps]
    before = backend.get("pre_tokenizer")
    if before not in (None, _NO_SPLIT) or steps not in ([_WRITTEN], [_BEFORE, _WRITTEN]) or model.get("dropout"):
        raise RecipeError(
            f"gguf: llama.cpp does not rewrite text by {steps} and {before}, as this tokenizer with bytes for unknown "
            "characters does; export to onnx instead"
        )
    if missing := next((token for token in _BYTES if token not in model["vocab"]), None):
        raise RecipeError(f"gguf: the tokenizer has no token {missing}, which llama.cpp needs; export to onnx instead")
    return len(steps) == 2


def scores(backend: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Of every token the negative rank of the first merge that makes it; 0 for those that none makes.

    >>> scores({"model": {"merges": [["a", "b"], ["ab", "c"], ["a", "bc"]]}}, ["a", "ab", "abc"])
    [0.0, -1.0, -2.0]
    """
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(backend["model"]["merges"], 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), -float(rank))
    return [ranks.get(token, 0.0) for token in tokens]


def types(backend: Mapping[str, Any], tokens: Sequence[str], given: Sequence[int]) -> list[int]:
    """Token types with those of bytes and of the unknown token put right; given: by whether a token is special."""
    from gguf import TokenType

    own = dict.fromkeys(_BYTES, int(TokenType.BYTE)) | {backend["model"].get("unk_token"): int(TokenType.UNKNOWN)}
    return [own.get(token, kind) for token, kind in zip(tokens, given, strict=True)]
