"""The block layouts Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and MXFP4 of GGUF, from and to codes and scales.

A block holds 32 consecutive weights of a row: a float16 scale (little endian), then the codes. Q8_0 stores
them as signed bytes; Q4_0 stores code + 8 in 4 bits, weight j in the low and weight j + 16 in the high half
of byte j. Q5_0 stores code + 16: first 32 bits that hold bit 4 of weight j in bit j, then the rest as Q4_0 does.
IQ4_NL orders its codes, indices of levels, as Q4_0 does; so does MXFP4, which leads with the scale's exponent in
one byte. Q4_1 and Q5_1 hold a float16 offset behind the scale, and codes without a sign. Nothing is rounded in packing:
the weight stays what code and scale say. The further types, with scales of scales, are rounded by llama.cpp's own
library and stay its bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import NumericalError, RecipeError

BLOCK = 32  # weights per block


def pack_q4_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (n, m) int8 in [-8, 7] and scales (n, groups) float16 → (n, m / 32 * 18) uint8.

    Each group must be a multiple of 32 weights; its scale is repeated in every block. Raises ValueError.

    >>> codes = torch.arange(32, dtype=torch.int8).view(1, 32) // 4
    >>> pack_q4_0(codes, torch.ones(1, 1, dtype=torch.float16))[0, :4].tolist()
    [0, 60, 200, 200]
    """
    blocks = _blocks(codes, -8, 7)  # (n, b, 32)
    low, high = (blocks + 8).view(torch.uint8).chunk(2, dim=2)
    return _join(_per_block(scales, blocks), low | high << 4)


def unpack_q4_0(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_q4_0`: codes (n, m) int8 and scales (n, m / 32) float16."""
    scales, body = _split(packed, BLOCK // 2)
    codes = torch.cat([body & 15, body >> 4], dim=2).view(torch.int8) - 8
    return codes.flatten(1), scales


def pack_q5_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (n, m) int8 in [-16, 15] and scales (n, groups) float16 → (n, m / 32 * 22) uint8; see `pack_q4_0`."""
    blocks = _blocks(codes, -16, 15)
    low, high = ((blocks + 16) & 15).view(torch.uint8).chunk(2, dim=2)
    tops = (blocks >= 0).view(*blocks.shape[:2], 4, 8).to(torch.uint8)  # bit 4 of code + 16, 8 to a byte
    bits = (tops << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)
    return _join(_per_block(scales, blocks), torch.cat([bits, low | high << 4], dim=2))


def unpack_q5_0(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_q5_0`: codes (n, m) int8 and scales (n, m / 32) float16."""
    scales, body = _split(packed, 4 + BLOCK // 2)
    tops = (body[:, :, :4].unsqueeze(3) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(2)
    low = torch.cat([body[:, :, 4:] & 15, body[:, :, 4:] >> 4], dim=2)
    return (low | tops << 4).view(torch.int8).flatten(1) - 16, scales


def pack_q4_1(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Codes (n, m) uint8 in [0, 15], scales and offsets (n, m / 32) float16 → (n, m / 32 * 20) uint8.

    w = code * scale + offset; the offset follows the scale, and codes lie as in Q4_0.
    """
    low, high = _indices(codes, 15).chunk(2, dim=2)
    return _join(_per_block(scales, low), _with_offsets(offsets, low | high << 4))


def pack_q5_1(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Codes (n, m) uint8 in [0, 31], scales, offsets (n, m / 32) float16 → (n, m / 32 * 24) uint8; see `pack_q4_1`."""
    blocks = _indices(codes, 31)
    low, high = (blocks & 15).chunk(2, dim=2)
    tops = (blocks >> 4).view(*blocks.shape[:2], 4, 8)
    bits = (tops << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)
    return _join(_per_block(scales, blocks), _with_offsets(offsets, torch.cat([bits, low | high << 4], dim=2)))


def pack_q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (n, m) int8 and scales (n, groups) float16 → (n, m / 32 * 34) uint8; see `pack_q4_0`."""
    blocks = _blocks(codes, -128, 127)
    return _join(_per_block(scales, blocks), blocks.view(torch.uint8))


def unpack_q8_0(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_q8_0`: codes (n, m) int8 and scales (n, m / 32) float16."""
    scales, body = _split(packed, BLOCK)
    return body.contiguous().view(torch.int8).flatten(1), scales


def pack_iq4_nl(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (n, m) uint8 in [0, 15] and scales (n, m / 32) float16 → (n, m / 32 * 18) uint8; see `pack_q4_0`."""
    low, high = _indices(codes).chunk(2, dim=2)
    return _join(_per_block(scales, low), low | high << 4)


def unpack_iq4_nl(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_iq4_nl`: codes (n, m) uint8 and scales (n, m / 32) float16."""
    scales, body = _split(packed, BLOCK // 2)
    return torch.cat([body & 15, body >> 4], dim=2).flatten(1), scales


def pack_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """Codes (n, m) uint8 in [0, 15] and exponents (n, m / 32) uint8 → (n, m / 32 * 17) uint8; see `pack_q4_0`."""
    if exponents.dtype != torch.uint8 or exponents.shape != (codes.shape[0], codes.shape[1] // BLOCK):
        raise ValueError(f"expected uint8 exponents, one per block of {codes.shape}, found {exponents.shape}")
    low, high = _indices(codes).chunk(2, dim=2)
    return torch.cat([exponents.unsqueeze(2), low | high << 4], dim=2).flatten(1)


def unpack_mxfp4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_mxfp4`: codes (n, m) uint8 and exponents (n, m / 32) uint8."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] % (1 + BLOCK // 2):
        raise ValueError(f"expected uint8 rows of blocks of 17 bytes, found {packed.dtype} {packed.shape}")
    blocks = packed.view(packed.shape[0], -1, 1 + BLOCK // 2)
    body = blocks[:, :, 1:]
    return torch.cat([body & 15, body >> 4], dim=2).flatten(1), blocks[:, :, 0].contiguous()


def decode_blocks(packed: Tensor, kind: str) -> Tensor:
    """Float32 weights (n, m) of rows of blocks (n, bytes) uint8; kind: GGUF's name of the type in lower case."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(packed.contiguous().numpy(), GGMLQuantizationType[kind.upper()]))


def encode_blocks(W: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """W (n, m) float32 as rows of blocks (n, bytes) uint8, rounded by llama.cpp's own library.

    importance: (m,) float32, the mean square of each input channel, or None. Raises NumericalError for non-finite
    weights, and RecipeError where the library is missing or m is no multiple of the block.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[kind.upper()]
    size, count = GGML_QUANT_SIZES[number]
    n, m = W.shape
    if m % size:
        raise RecipeError(f"{m} input channels are not a multiple of {kind}'s {size}")
    if not bool(torch.isfinite(W).all()):
        raise NumericalError("non-finite weights")
    W = W.float().contiguous()
    out = torch.empty(n, m // size * count, dtype=torch.uint8)
    weights = None if importance is None else importance.float().contiguous()
    address = None if weights is None else weights.data_ptr()
    library, threads = _library(), min(n, torch.get_num_threads())

    def rows(first: int, last: int) -> int:
        place = int(number), W.data_ptr(), out.data_ptr(), first * m, last - first, m, address
        return int(library.ggml_quantize_chunk(*place))

    bounds = [n * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:  # rows are rounded on their own; the call releases the interpreter
        written = sum(pool.map(rows, bounds[:-1], bounds[1:]))
    if written != out.numel():
        raise NumericalError(f"libggml wrote {written} bytes of {kind}, expected {out.numel()}")
    return out


@cache
def _library() -> ctypes.CDLL:
    """llama.cpp's libggml-base, of which llama-cpp-python has one."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RecipeError("llama.cpp's blocks need llama-cpp-python; pip install 'compress-toolkit[gguf]'")
    folder = Path(spec.origin).parent / "lib"
    found = sorted([*folder.glob("libggml-base.*"), *folder.glob("ggml-base.dll")])
    if not found:
        raise RecipeError(f"{folder} holds no libggml-base; install llama-cpp-python again")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def _blocks(codes: Tensor, low: int, high: int) -> Tensor:
    """Codes (n, m) as (n, m / 32, 32)."""
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % BLOCK:
        raise ValueError(f"expected int8 codes (n, m) with m a multiple of 32, found {codes.dtype} {codes.shape}")
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes reach from {codes.min()} to {codes.max()}; the block holds {low} to {high}")
    return codes.contiguous().view(codes.shape[0], -1, BLOCK)


def _indices(codes: Tensor, most: int = 15) -> Tensor:
    """Codes (n, m) from 0 to `most` as (n, m / 32, 32)."""
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % BLOCK or codes.gt(most).any():
        found = f"{codes.dtype} {codes.shape}"
        raise ValueError(f"expected uint8 codes (n, m) below {most + 1}, m a multiple of 32, found {found}")
    return codes.contiguous().view(codes.shape[0], -1, BLOCK)


def _with_offsets(offsets: Tensor, body: Tensor) -> Tensor:
    """Offsets (n, b) float16 before the code bytes (n, b, k) of their blocks."""
    if offsets.dtype != torch.float16 or offsets.shape != body.shape[:2]:
        raise ValueError(f"expected float16 offsets, one per block of {body.shape}, found {offsets.shape}")
    return torch.cat([offsets.contiguous().view(torch.uint8).view(*offsets.shape, 2), body], dim=2)


def _per_block(scales: Tensor, blocks: Tensor) -> Tensor:
    """Scales (n, groups) repeated to one per block, (n, b)."""
    n, count = blocks.shape[:2]
    if scales.dtype != torch.float16 or scales.shape[0] != n or count % scales.shape[1]:
        raise ValueError(f"expected float16 scales of {n} rows dividing {count} blocks, found {scales.shape}")
    return scales.repeat_interleave(count // scales.shape[1], dim=1)


def _join(scales: Tensor, body: Tensor) -> Tensor:
    """Scales (n, b) and code bytes (n, b, k) → (n, b * (2 + k)) uint8."""
    head = scales.contiguous().view(torch.uint8).view(*scales.shape, 2)
    return torch.cat([head, body], dim=2).flatten(1)


def _split(packed: Tensor, body: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_join` for `body` code bytes per block."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] % (2 + body):
        raise ValueError(f"expected uint8 rows of blocks of {2 + body} bytes, found {packed.dtype} {packed.shape}")
    blocks = packed.view(packed.shape[0], -1, 2 + body)
    return blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2), blocks[:, :, 2:]
