"""The key-value cache that a GGUF file asks for: keys of ours in its header, which our runtime heeds.

llama.cpp itself takes the types as options, and computes attention with quantized values by flash attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from compress.errors import Corrupt
from compress.rounding import CacheRounding, CacheType

KEYS, VALUES = "compress.cache.keys", "compress.cache.values"
GGML_TYPES = {"q4_0": 2, "q8_0": 8}  # llama.cpp's numbers


def asked(reader: Any) -> dict[str, Any]:
    """Both keys of a file that is being read, as far as it has them."""
    return {key: reader.fields[key].contents() for key in (KEYS, VALUES) if key in reader.fields}


def types(header: Mapping[str, Any]) -> CacheRounding | None:
    """What a file's header asks for; None for llama.cpp's float16. Raises Corrupt for half of it, or unknown types."""
    found = [header.get(key) or None for key in (KEYS, VALUES)]
    if found == [None, None]:
        return None
    if wrong := [kind for kind in found if kind not in get_args(CacheType)]:
        raise Corrupt(f"the file asks for a cache of type {wrong[0]!r}; known: {', '.join(get_args(CacheType))}")
    keys, values = found
    assert keys is not None and values is not None
    return CacheRounding(keys, values)


def usage(cache: CacheRounding) -> dict[str, str]:
    """The lines that load a file with its cache, by runtime."""
    numbers = f"type_k={GGML_TYPES[cache.keys]}, type_v={GGML_TYPES[cache.values]}"
    return {
        "llama.cpp": f"llama-cli -m {{file}} -cnv -fa on -ctk {cache.keys} -ctv {cache.values}",
        "llama-cpp-python": f'llama_cpp.Llama("{{file}}", flash_attn=True, {numbers})',
    }
