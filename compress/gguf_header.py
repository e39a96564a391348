"""Reads GGUF files without several objects for each token and merge, which take seconds for a large vocabulary."""

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
MOST = 2**22  # items; the largest vocabularies have a sixteenth of it


class Header(GGUFReader):  # type: ignore[misc]
    """gguf-py's reader, in which a field that holds a long array has its types, and no data.

    Raises what gguf-py raises for files that are none: ValueError, IndexError, KeyError, OverflowError, OSError,
    RecursionError.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if count > MOST:
            raise ValueError(f"an array of {count} items; expected at most {MOST}")
        if count < LONG or not (kind == GGUFValueType.STRING or kind in self.gguf_scalar_to_np):
            return super()._get_field_parts(orig_offs, raw_type)
        if kind == GGUFValueType.STRING:
            end = _behind_strings(memoryview(self.data), start, count)
        else:
            end = start + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        if end > len(self.data):
            raise ValueError(f"an array of {count} items ends beyond the file")
        items = self._items(kind, start, end, count)
        return end - orig_offs, items, list(range(len(items))), [GGUFValueType.ARRAY, kind]

    def _items(self, kind: GGUFValueType, start: int, end: int, count: int) -> list[Any]:
        """What a field keeps of a long array that lies in the file."""
        return []


class Reader(Header):
    """The same with the items of long arrays, as slices of the file: a field's parts are its items alone."""

    def _items(self, kind: GGUFValueType, start: int, end: int, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return list(_strings(memoryview(self.data), start, count))
        return list(np.asarray(self.data[start:end]).view(self.gguf_scalar_to_np[kind]).reshape(count, 1))


def _behind_strings(data: memoryview, position: int, count: int) -> int:
    """Where `count` strings end, each led by its length in eight bytes; raises ValueError where that is no place."""
    length = struct.Struct("<Q").unpack_from
    try:
        for _ in range(count):
            position += 8 + length(data, position)[0]
    except (struct.error, OverflowError) as error:
        raise ValueError(f"an array of {count} texts ends beyond the file") from error
    return position


def _strings(data: memoryview, position: int, count: int) -> Iterator[memoryview]:
    """The texts of `count` strings that lie in the file."""
    length = struct.Struct("<Q").unpack_from
    for _ in range(count):
        start = position + 8
        position = start + length(data, position)[0]
        yield data[start:position]


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
