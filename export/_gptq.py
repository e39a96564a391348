"""The checkpoint layout of GPTQ (AutoGPTQ's first version, "gptq" to GPTQModel): codes in 32-bit words.

qweight (m · bits / 32, n) int32: a word holds 32 / bits consecutive input channels of one output, the first in its low
bits, each moved by 2^(bits - 1) to be unsigned. scales (groups, n) float16. qzeros (groups, n · bits / 32) int32: the
zero points less one, packed along the outputs. g_idx (m,) int32: the group of each input channel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "quantize_config.json"
WIDTHS = (2, 4, 8)  # bits that divide a word
WORDS = 32  # channels, inputs and outputs, that fill whole words at every width
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def config(encoding: Encoding) -> dict[str, Any]:
    """What loaders read, in quantize_config.json and in config.json."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": encoding.bits,
        "group_size": encoding.group_size or -1,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["compress"]},
    }


def pack(tensor: EncodedTensor) -> dict[str, Tensor]:
    """The parts of a symmetric matrix (n, m), by suffix; n and m must be multiples of 32."""
    import torch

    assert tensor.scales is not None
    bits, (n, m), groups = tensor.encoding.bits, tensor.codes.shape, tensor.scales.shape[1]
    middle = 2 ** (bits - 1)
    unsigned = tensor.codes.to(torch.int32) + middle
    zeros = torch.full((groups, n), middle - 1, dtype=torch.int32)
    return {
        "qweight": _words(unsigned.T, bits),
        "qzeros": _words(zeros.T, bits).T.contiguous(),
        "scales": tensor.scales.T.contiguous(),
        "g_idx": torch.arange(m, dtype=torch.int32) // (m // groups),
    }


def unpack(name: str, parts: Mapping[str, Tensor], encoding: Encoding) -> EncodedTensor:
    """The inverse of `pack`; raises Corrupt where a loader would read anything but a symmetric matrix in order."""
    import torch

    bits, middle = encoding.bits, 2 ** (encoding.bits - 1)
    codes = _numbers(parts["qweight"], bits).T - middle
    scales = parts["scales"].T.contiguous()
    zeros = _numbers(parts["qzeros"].T, bits)
    (n, m), groups = codes.shape, scales.shape[1]
    size = encoding.group_size or m
    order = torch.arange(m, dtype=torch.int32) // size
    low, high = encoding.code_range
    if scales.dtype != torch.float16 or scales.shape != (n, m // size) or zeros.shape != (n, groups):
        raise Corrupt(
            f"{name}: scales {tuple(scales.shape)} and zero points {tuple(zeros.shape)} do not fit {encoding}"
        )
    if not torch.equal(parts["g_idx"], order) or not bool((zeros == middle - 1).all()):
        raise Corrupt(f"{name}: its groups or zero points are not those of {encoding}")
    if int(codes.min()) < low or int(codes.max()) > high:
        raise Corrupt(f"{name}: codes reach from {codes.min()} to {codes.max()}, and {encoding} from {low} to {high}")
    return EncodedTensor(encoding, codes.to(torch.int8).contiguous(), scales)


def _words(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers (k, c) int32 → (k · bits / 32, c) int32, the first of each word in its low bits."""
    import torch

    lanes = numbers.reshape(-1, 32 // bits, numbers.shape[1]).to(torch.int64)
    shifts = torch.arange(0, 32, bits).view(1, -1, 1)
    words = (lanes << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(1, -1, 1)
    lanes: Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)
    return lanes.flatten(0, 1)


def encoding_of(path: Path, config: Mapping[str, Any]) -> Encoding:
    """The one encoding of a folder's linears; raises Corrupt where its configurations disagree or say too little."""
    found = config.get("quantization_config")
    try:
        beside = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if beside != found:
            raise ValueError(f"{CONFIG} and config.json disagree")
        bits, size = beside["bits"], beside["group_size"]
        if bits not in WIDTHS or beside["desc_act"] or not beside["sym"] or beside["checkpoint_format"] != "gptq":
            raise ValueError("not a layout that compress writes")
        return Encoding(f"int{bits}", None if size == -1 else int(size))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path / CONFIG} cannot be read: {error}") from error


def stored(tensors: Mapping[str, Tensor], encoding: Encoding) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
    """Every tensor of a folder, packed ones whole; raises Corrupt where a part is missing."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in PARTS:
            yield name, tensor
        elif part == "qweight":
            try:
                parts = {p: tensors[f"{module}.{p}"] for p in PARTS}
            except KeyError as error:
                raise Corrupt(f"{module}: its part {error} is missing") from None
            yield f"{module}.weight", unpack(module, parts, encoding)
