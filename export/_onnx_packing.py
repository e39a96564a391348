"""The layout of quantized weights in ONNX: unsigned codes in whole blocks, as MatMulNBits reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = {8: 8, 5: 8, 4: 4, 3: 4, 2: 2}  # bits of a code → bits that the kernels can hold it in
BLOCKS = (128, 64, 32, 16)
FLOAT_ACTIVATIONS, INT8_ACTIVATIONS = 0, 4  # accuracy levels of MatMulNBits on the CPU


@dataclass(frozen=True)
class Packed:
    """An affine tensor (n, m) as MatMulNBits holds it: unsigned codes, one scale per block of a row.

    codes: (n, blocks, block · bits / 8) uint8, first code in the low bits. scales: (n, blocks) float16.
    zero_points: (n, ⌈blocks · bits / 8⌉) uint8, or None for the middle of the range.
    """

    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def block_size(encoding: Encoding, in_features: int | None = None) -> int | None:
    """Largest kernel block that divides a group; None where there is none.

    Groups that are no such block are held exactly by repeating their scale over smaller blocks.

    >>> block_size(Encoding("int4", 32)), block_size(Encoding("int4", 48)), block_size(Encoding("int4", 24))
    (32, 16, None)
    >>> block_size(Encoding("int4"), 576)
    64
    """
    group = encoding.group_size or in_features
    if group is None:
        return None
    return next((block for block in BLOCKS if group % block == 0), None)


def has_kernel(bits: int, block: int, accuracy_level: int) -> bool:
    """Whether onnxruntime computes MatMulNBits from the codes, and does not decode the matrix on every call.

    Measured with onnxruntime 1.32, 8,192 x 512, one token: .06 to .5 ms where this is true, 20 to 90 ms
    where it is not, .4 ms with a float32 matrix.
    """
    if bits == 2:
        return accuracy_level == INT8_ACTIVATIONS and block >= 32
    return bits == 4 or accuracy_level == INT8_ACTIVATIONS


def packed(name: str, tensor: EncodedTensor) -> Packed:
    """The exact MatMulNBits form of an affine tensor; raises RecipeError where there is none."""
    import torch

    encoding, (n, m) = tensor.encoding, tensor.codes.shape
    block = block_size(encoding, m)
    if block is None:
        raise RecipeError(f"{name}: {encoding} over {m} channels has no block of 16 to 128; use group_size=16 or 32")
    assert tensor.scales is not None
    bits, repeats = WIDTHS[encoding.bits], m // block // tensor.scales.shape[1]
    # Symmetric codes move to the unsigned range whose middle is the kernels' default zero point.
    unsigned = tensor.codes.to(torch.int16) + 2 ** (bits - 1) if encoding.symmetric else tensor.codes
    zeros = None
    if tensor.zero_points is not None:
        zeros = _pack_rows(tensor.zero_points.repeat_interleave(repeats, dim=1), bits)
    return Packed(
        bits=bits,
        block=block,
        codes=_pack_rows(unsigned.to(torch.uint8), bits).view(n, m // block, block * bits // 8),
        scales=tensor.scales.repeat_interleave(repeats, dim=1).contiguous(),
        zero_points=zeros,
    )


def unpacked(name: str, stored: Packed, encoding: Encoding) -> EncodedTensor:
    """The inverse of `packed`, with scales as stored (one per block); Corrupt for codes out of range."""
    import torch

    n, blocks = stored.scales.shape
    codes = _unpack_rows(stored.codes.view(n, -1), stored.bits, blocks * stored.block)
    zeros = None
    if stored.zero_points is not None:
        zeros = _unpack_rows(stored.zero_points, stored.bits, blocks)
    if encoding.symmetric:
        codes = (codes.to(torch.int16) - 2 ** (stored.bits - 1)).to(torch.int8)
    low, high = encoding.code_range
    if (zeros is None) != encoding.symmetric or codes.min() < low or codes.max() > high:
        raise Corrupt(f"{name}: stored codes or zero points do not fit {encoding}")
    return EncodedTensor(encoding, codes, stored.scales, zeros)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (n, m) uint8 → (n, ⌈m · bits / 8⌉) uint8, each row padded to whole bytes."""
    import torch

    per_byte = 8 // bits
    n, m = codes.shape
    padded = torch.zeros(n, math.ceil(m / per_byte) * per_byte, dtype=torch.uint8)
    padded[:, :m] = codes
    lanes = padded.view(n, -1, per_byte)
    out = lanes[:, :, 0].clone()
    for i in range(1, per_byte):
        out |= lanes[:, :, i] << (i * bits)
    return out


def _unpack_rows(stored: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_pack_rows`: the first `count` codes of each row."""
    import torch

    lanes = [(stored >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(lanes, dim=2).flatten(1)[:, :count].contiguous()
