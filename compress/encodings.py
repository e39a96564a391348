"""How a weight is stored: the encodings, and tensors held in one of them.

An `Encoding` is a value; an `EncodedTensor` is what evaluation decodes and exporters write. Codes and
scales are the single truth: the float32 weight of a module always equals `decode()` of its encoded tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

AFFINE_BITS = {"int8": 8, "int5": 5, "int4": 4, "int3": 3, "int2": 2}
CODEBOOK_BITS = {"nf4": 4, "mxfp4": 4, "iq4_nl": 4}
FIXED_GROUPS = {"mxfp4": 32, "iq4_nl": 32}  # weights that share a scale, by definition of the formats
GGML_BLOCKS = {  # weights and bytes of a block whose inner layout is llama.cpp's
    "q4_1": (32, 20),
    "q5_1": (32, 24),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_xs": (256, 136),
}
GGML_NAMES = {"q4_0": "int4", "q5_0": "int5", "q8_0": "int8"}  # llama.cpp's types that are ours in groups of 32
FLOAT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
NAMES = (*AFFINE_BITS, *CODEBOOK_BITS, *GGML_BLOCKS, *FLOAT_DTYPES)


@dataclass(frozen=True)
class Encoding:
    """A storage format of a weight matrix.

    name: one of `NAMES`. group_size: input channels that share a scale (None = a whole row; mxfp4 and iq4_nl:
    always 32; unused by blocks and floats). symmetric: codes are signed without a zero point (affine only).

    Symmetric affine codes lie in [-2^(b-1), 2^(b-1) - 1] with *signed* float16 scales, except int8, which
    uses [-127, 127]; asymmetric codes lie in [0, 2^b - 1] with an integer zero point: w = (q - z) * s, so
    that zero is always represented exactly. Codebooks (`numerics.codebook`) store the index of a level;
    all but iq4_nl hold zero exactly too. The blocks of llama.cpp hold scales of scales and are kept as their bytes.
    """

    name: str
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise RecipeError(f"unknown encoding {self.name!r}; known: {', '.join(NAMES)}")
        if self.is_block and self.group_size is not None:
            raise RecipeError(f"{self.name} has blocks of its own; leave group_size={self.group_size} out")
        if self.is_codebook and not self.symmetric:
            raise RecipeError(f"{self.name} is a codebook without zero points; use symmetric: true")
        fixed = FIXED_GROUPS.get(self.name)
        if fixed is not None and self.group_size != fixed:
            raise RecipeError(f"{self.name} shares a scale over {fixed} channels, found group_size={self.group_size}")

    @property
    def is_affine(self) -> bool:
        """Whether the encoding stores integers that decode as (q - z) * s."""
        return self.name in AFFINE_BITS

    @property
    def is_codebook(self) -> bool:
        """Whether the encoding stores indices of levels, with scales."""
        return self.name in CODEBOOK_BITS

    @property
    def is_block(self) -> bool:
        """Whether the encoding is a block of llama.cpp's that is stored as its bytes."""
        return self.name in GGML_BLOCKS

    @property
    def is_coded(self) -> bool:
        """Whether the encoding stores codes, and not floats."""
        return self.is_affine or self.is_codebook or self.is_block

    @property
    def holds_zero(self) -> bool:
        """Whether a pruned weight stays exactly zero."""
        return self.name != "iq4_nl" and not self.is_block

    @property
    def has_float_scales(self) -> bool:
        """Whether codes are multiplied by float16 scales, which training can refine."""
        return self.is_affine or self.name in ("nf4", "iq4_nl")

    @property
    def signed(self) -> bool:
        """Whether codes are int8; otherwise they are uint8."""
        return self.is_affine and self.symmetric

    @property
    def bits(self) -> int:
        """Bits of one code (or of one float, or of a block's byte)."""
        return 8 if self.is_block else {**AFFINE_BITS, **CODEBOOK_BITS, **FLOAT_BITS}[self.name]

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code of an encoding with codes.

        >>> Encoding("int4", 32).code_range, Encoding("int8", 32).code_range
        ((-8, 7), (-127, 127))
        >>> Encoding("int4", 32, symmetric=False).code_range
        (0, 15)
        """
        if not self.signed:
            return 0, 2**self.bits - 1
        return (-127, 127) if self.bits == 8 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups per row; raises RecipeError where the group size does not divide."""
        size = GGML_BLOCKS[self.name][0] if self.is_block else self.group_size or in_features
        if in_features % size and self.is_block:
            remedy = "use q4_0, q5_0, q8_0 or iq4_nl, as the type or as its fallback" if size > 32 else "use fp16"
            raise RecipeError(f"{in_features} input channels are not a multiple of {self.name}'s {size}; {remedy}")
        if in_features % size and self.name in FIXED_GROUPS:
            raise RecipeError(
                f"{in_features} input channels are not a multiple of {self.name}'s {size}; use int4 or nf4"
            )
        if in_features % size:
            fits = next(g for g in range(min(size, in_features), 0, -1) if in_features % g == 0)
            raise RecipeError(
                f"{in_features} input channels are not a multiple of group_size={size}; use group_size={fits}"
            )
        return in_features // size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight, scales and zero points included.

        >>> Encoding("int4", 32).bits_per_weight(576), Encoding("mxfp4", 32).bits_per_weight(576)
        (4.5, 4.25)
        """
        if self.is_block:
            size, count = GGML_BLOCKS[self.name]
            return 8 * count / size
        if not self.is_coded:
            return float(self.bits)
        overhead = (8 if self.name == "mxfp4" else 16) + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups(in_features) / in_features

    def __str__(self) -> str:
        if not self.is_coded or self.is_block:
            return self.name
        group = f" g{self.group_size}" if self.group_size else " per channel"
        return f"{self.name}{group}{'' if self.symmetric else ' asymmetric'}"


@dataclass
class EncodedTensor:
    """A weight matrix (n, m) in an encoding.

    codes: (n, m) int8 (symmetric), uint8 (asymmetric or a codebook), or the float values themselves for float
    encodings; llama.cpp's blocks are (n, bytes of a row) uint8 and hold their own scales. scales: (n, groups)
    float16, or uint8 exponents (mxfp4). zero_points: (n, groups) uint8, asymmetric only.
    """

    encoding: Encoding
    codes: Tensor
    scales: Tensor | None = None
    zero_points: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape, whatever that of its codes."""
        if not self.encoding.is_block:
            return tuple(self.codes.shape)
        size, count = GGML_BLOCKS[self.encoding.name]
        return self.codes.shape[0], self.codes.shape[1] // count * size

    def decode(self) -> Tensor:
        """The weight in float32: (codes - zero_points) * scales or level[codes] * scales, (n, m)."""
        if not self.encoding.is_coded:
            return self.codes.float()
        if self.encoding.is_block:
            from compress.numerics.ggml_blocks import decode_blocks

            return decode_blocks(self.codes, self.encoding.name)
        assert self.scales is not None
        n, m = self.codes.shape
        if self.encoding.is_codebook:
            from compress.numerics.codebook import CodebookGrid

            grid = CodebookGrid(self.encoding.name, self.scales)
            return grid.decode(self.codes.view(n, self.scales.shape[1], -1)).view(n, m)
        grouped = self.codes.float().view(n, self.scales.shape[1], -1)  # memory of its own: codes are integers
        if self.zero_points is not None:
            grouped -= self.zero_points.float().unsqueeze(-1)
        grouped *= self.scales.float().unsqueeze(-1)
        return grouped.view(n, m)

    @property
    def nominal_bytes(self) -> float:
        """Bytes of codes, scales and zero points when packed without padding."""
        return math.prod(self.shape) * self.encoding.bits_per_weight(self.shape[-1]) / 8


def describe(name: str) -> str:
    """One line on an encoding, for people.

    >>> describe("int4")
    'integer codes -8…7, a float16 scale per group (0…15 with zero points if asymmetric)'
    """
    if name in FLOAT_DTYPES:
        return f"{FLOAT_DTYPES[name]}, unscaled"
    if name in CODEBOOK_BITS:
        return {
            "nf4": "16 quantiles of the normal distribution, a float16 scale per group",
            "mxfp4": f"4-bit floats (e2m1), a power of two as scale per {FIXED_GROUPS['mxfp4']} weights",
            "iq4_nl": f"16 uneven levels of llama.cpp's, none 0, a float16 scale per {FIXED_GROUPS['iq4_nl']} weights",
        }[name]
    if name in GGML_BLOCKS:
        size, count = GGML_BLOCKS[name]
        return f"llama.cpp's blocks of {size} weights in {count} bytes ({8 * count / size:.4g} bits)"
    if name in GGML_NAMES:
        return f"llama.cpp's name for {GGML_NAMES[name]} in groups of 32"
    low, high = Encoding(name, 32).code_range
    return (
        f"integer codes {low}…{high}, a float16 scale per group "
        f"(0…{2 ** AFFINE_BITS[name] - 1} with zero points if asymmetric)"
    )


def same_stored(a: EncodedTensor, b: EncodedTensor) -> bool:
    """Whether two encoded tensors hold the same codes and, per weight, the same scales and zero points.

    Scales repeated over smaller groups (g64 stored as two equal g32 scales) count as the same; -0.0 and
    0.0 scales do not, since stored bytes are compared.
    """
    import torch

    if a.codes.shape != b.codes.shape or not torch.equal(a.codes, b.codes):
        return False
    for x, y in ((a.scales, b.scales), (a.zero_points, b.zero_points)):
        if (x is None) != (y is None):
            return False
        if x is None or y is None:
            continue
        width = max(x.shape[1], y.shape[1])
        if width % x.shape[1] or width % y.shape[1] or x.dtype != y.dtype:
            return False
        x = x.repeat_interleave(width // x.shape[1], dim=1).contiguous()
        y = y.repeat_interleave(width // y.shape[1], dim=1).contiguous()
        if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            return False
    return a.codes.dtype == b.codes.dtype
