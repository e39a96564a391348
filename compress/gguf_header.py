"""GGUF files without several objects for each token, merge and score, which take seconds for a large vocabulary."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType

LONG = 256  # items; what is about layers, languages or tags has fewer


class Reader(GGUFReader):  # type: ignore[misc]
    """gguf-py's reader, in which a long array is read in one go: its parts are its items alone.

    Raises what gguf-py raises for files that are none: ValueError, IndexError, KeyError, OverflowError, OSError.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if count < LONG or not (kind == GGUFValueType.STRING or kind in self.gguf_scalar_to_np):
            return super()._get_field_parts(orig_offs, raw_type)
        items: list[Any]
        if kind == GGUFValueType.STRING:
            items, end = _strings(memoryview(self.data), start, count)
        else:
            dtype = np.dtype(self.gguf_scalar_to_np[kind])
            end = start + count * dtype.itemsize
            _require(end <= len(self.data), count)
            items = list(np.asarray(self.data[start:end]).view(dtype).reshape(count, 1))
        return end - orig_offs, items, list(range(count)), [GGUFValueType.ARRAY, kind]


def _strings(data: memoryview, position: int, count: int) -> tuple[list[memoryview], int]:
    """`count` strings, each led by its length in eight bytes, and where they end; ValueError where that is no place."""
    length = struct.Struct("<Q").unpack_from
    found = []
    try:
        for _ in range(count):
            start = position + 8
            position = start + length(data, position)[0]
            found.append(data[start:position])
    except (struct.error, OverflowError, IndexError) as error:
        raise ValueError(f"an array of {count} items ends beyond the file") from error
    _require(position <= len(data), count)
    return found, position


def _require(inside: bool, count: int) -> None:
    if not inside:
        raise ValueError(f"an array of {count} items ends beyond the file")


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Let transformers read files by `Reader`, and ask for the names of all tensors once.

    It parses a file for the config, the weights and the tokenizer each, and has gguf-py list a model's tensor names for
    every one of its modules. Not for several threads at a time.
    """
    theirs = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = Reader, functools.cache(theirs[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = theirs
