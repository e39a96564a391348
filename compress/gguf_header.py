"""A GGUF file's header and tensors without its long arrays.

gguf-py makes several objects of every token, merge and score, which takes seconds for a large vocabulary; the model's
own facts need none of them.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

LONG = 256  # items; what is about layers, languages or tags has fewer


class Header(GGUFReader):  # type: ignore[misc]
    """gguf-py's reader, in which a field that holds a long array has its types, and no data.

    Raises what gguf-py raises for files that are none: ValueError, IndexError, KeyError, OverflowError, OSError.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if count < LONG or not (kind == GGUFValueType.STRING or kind in self.gguf_scalar_to_np):
            return super()._get_field_parts(orig_offs, raw_type)
        if kind == GGUFValueType.STRING:
            end = _behind_strings(memoryview(self.data), start, count)
        else:
            end = start + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        if end > len(self.data):
            raise ValueError(f"an array of {count} items ends beyond the file")
        return end - orig_offs, [], [], [GGUFValueType.ARRAY, kind]


def _behind_strings(data: memoryview, position: int, count: int) -> int:
    """Where `count` strings end, each led by its length in eight bytes; raises ValueError where that is no place."""
    length = struct.Struct("<Q").unpack_from
    try:
        for _ in range(count):
            position += 8 + length(data, position)[0]
    except (struct.error, OverflowError) as error:
        raise ValueError(f"an array of {count} texts ends beyond the file") from error
    return position
