"""Dense bit packing of integer codes, little end first, row after row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, m) int8 or uint8 → flat uint8 of ceil(n·m·bits/8) bytes; only the low `bits` are kept.

    >>> pack(torch.tensor([[1, -1]], dtype=torch.int8), 4).tolist()
    [241]
    """
    raw = codes.contiguous().view(torch.uint8).flatten().numpy()
    if bits == 8:
        return torch.from_numpy(raw.copy())
    if bits == 4:
        raw = np.append(raw, np.uint8(0)) if raw.size % 2 else raw
        return torch.from_numpy((raw[0::2] & 15) | (raw[1::2] << 4))
    planes = np.unpackbits(raw[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, int], signed: bool) -> Tensor:
    """The inverse of `pack`: codes of `shape`, int8 (sign-extended) if signed, else uint8.

    >>> unpack(torch.tensor([241], dtype=torch.uint8), 4, (1, 2), signed=True).tolist()
    [[1, -1]]
    """
    count = shape[0] * shape[1]
    raw = packed.numpy()
    if bits == 8:
        flat = raw.copy()
    elif bits == 4:
        flat = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:count]
    else:
        planes = np.unpackbits(raw, count=count * bits, bitorder="little").reshape(count, bits)
        flat = np.packbits(planes, axis=1, bitorder="little")[:, 0]
    if signed:
        shift = 8 - bits
        signed_flat = (flat << shift).view(np.int8) >> shift
        return torch.from_numpy(np.ascontiguousarray(signed_flat)).view(shape)
    return torch.from_numpy(np.ascontiguousarray(flat)).view(shape)


def pack_rows(indices: Tensor, bits: int) -> Tensor:
    """Indices (n, k) int64 in [0, 2^bits) → (n, ceil(k·bits/8)) uint8: each row fills whole bytes, bits up to 32.

    >>> pack_rows(torch.tensor([[1, 2, 3], [0, 0, 1023]]), 10).tolist()
    [[1, 8, 48, 0], [0, 0, 240, 63]]
    """
    raw = indices.contiguous().numpy().astype("<u4").view(np.uint8).reshape(*indices.shape, 4)
    planes = np.unpackbits(raw, axis=2, count=bits, bitorder="little").reshape(len(indices), indices.shape[1] * bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little"))


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_rows`: the `count` indices of each row, int64."""
    planes = np.unpackbits(packed.numpy(), axis=1, count=count * bits, bitorder="little")
    raw = np.packbits(planes.reshape(len(packed), count, bits), axis=2, bitorder="little")
    raw = np.pad(raw, ((0, 0), (0, 0), (0, 4 - raw.shape[2])))
    return torch.from_numpy(raw.view("<u4")[:, :, 0].astype(np.int64))
