"""Block bytes against gguf-py's codecs and the C library's quantizer."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encodings import EncodedTensor, Encoding
from compress.numerics.ggml_blocks import (
    pack_iq4_nl,
    pack_mxfp4,
    pack_q4_0,
    pack_q4_1,
    pack_q5_0,
    pack_q5_1,
    pack_q8_0,
    unpack_iq4_nl,
    unpack_mxfp4,
    unpack_q4_0,
    unpack_q5_0,
    unpack_q8_0,
)
from compress.steps.quantize._fields import round_to_nearest

Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
MXFP4 = gguf.GGMLQuantizationType.MXFP4
Q4_1, Q5_1 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q5_1
Q5_0, IQ4_NL = gguf.GGMLQuantizationType.Q5_0, gguf.GGMLQuantizationType.IQ4_NL
FORMATS = {4: (pack_q4_0, unpack_q4_0, Q4_0), 5: (pack_q5_0, unpack_q5_0, Q5_0), 8: (pack_q8_0, unpack_q8_0, Q8_0)}


def random_tensor(bits: int, rows: int, groups: int, group_size: int, seed: int) -> EncodedTensor:
    generator = torch.Generator().manual_seed(seed)
    encoding = Encoding(f"int{bits}", group_size)
    low, high = encoding.code_range
    codes = torch.randint(low, high + 1, (rows, groups * group_size), generator=generator, dtype=torch.int8)
    scales = torch.randn(rows, groups, generator=generator).half() * 0.01
    return EncodedTensor(encoding, codes, scales)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([4, 5, 8]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([32, 64, 96]),
    st.integers(0, 2**32),
)
def test_the_blocks_decode_to_the_very_weights(bits: int, rows: int, groups: int, size: int, seed: int) -> None:
    tensor = random_tensor(bits, rows, groups, size, seed)
    assert tensor.scales is not None
    pack, unpack, kind = FORMATS[bits]
    packed = pack(tensor.codes, tensor.scales)
    decoded = dequantize(packed.numpy(), kind)
    assert decoded.tobytes() == tensor.decode().numpy().tobytes()  # bit for bit, signs of zero included
    codes, scales = unpack(packed)
    assert torch.equal(codes, tensor.codes)
    assert torch.equal(scales, tensor.scales.repeat_interleave(size // 32, dim=1))


def reference_rounding(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales by ggml's own rule, written plainly with numpy's float32 arithmetic."""
    blocks, half = W.numpy().reshape(W.shape[0], -1, 32), 2 ** (bits - 1)
    if bits == 8:
        scales = (np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    else:
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
        scales = (extreme / np.float32(-half)).astype(np.float32)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    if bits == 8:
        codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    else:
        codes = np.minimum(np.trunc(scaled + np.float32(half + 0.5)), 2 * half - 1) - half
    shape = W.shape[0], -1
    return (
        torch.from_numpy(codes.astype(np.int8).reshape(shape)),
        torch.from_numpy(scales.astype(np.float16).reshape(shape)),
    )


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_codes_by_ggmls_rule_give_the_bytes_of_gguf_py_and_of_the_c_library(bits: int) -> None:
    W = torch.randn(24, 160, generator=torch.Generator().manual_seed(bits)) * 0.05
    W[3, 32:64] = 0  # a block without a scale
    pack, _, kind = FORMATS[bits]
    packed = pack(*reference_rounding(W, bits)).numpy()
    assert packed.tobytes() == quantize(W.numpy(), kind).tobytes()
    assert packed.tobytes() == c_quantize(W, int(kind), packed.nbytes)


@pytest.mark.parametrize(("pack", "high", "kind"), [(pack_q4_1, 15, Q4_1), (pack_q5_1, 31, Q5_1)])
def test_codes_with_offsets_have_the_bytes_of_gguf_py_and_of_the_c_library(pack, high: int, kind: int) -> None:
    """Weights that every scale, offset and product hold exactly have one reading: what any quantizer must write."""
    generator = torch.Generator().manual_seed(high)
    codes = torch.randint(0, high + 1, (24, 5, 32), generator=generator, dtype=torch.uint8)
    places = torch.rand(24, 5, 32, generator=generator).argsort(-1)[..., :2]  # of a block's least and largest code
    codes.scatter_(2, places, torch.tensor([0, high], dtype=torch.uint8).expand(24, 5, 2))
    scales, offsets = (torch.randint(least, 64, (24, 5), generator=generator) / 256 for least in (1, -64))
    codes[3, 1], scales[3, 1] = 0, 0.0  # a block of one value
    W = (codes * scales.unsqueeze(2) + offsets.unsqueeze(2)).flatten(1)
    packed = pack(codes.flatten(1), scales.half(), offsets.half()).numpy()
    assert packed.tobytes() == quantize(W.numpy(), kind).tobytes()
    assert packed.tobytes() == c_quantize(W, int(kind), packed.nbytes)
    assert dequantize(packed, kind).tobytes() == W.numpy().tobytes()


def test_mxfp4_has_the_bytes_of_gguf_py_and_of_the_c_library() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 160, generator=generator) * 2.0 ** torch.randint(-30, 30, (24, 1), generator=generator)
    W[3, 32:64] = 0
    W[4] = torch.tensor([0.5, -0.25, 0.25, 4.0, -5.0, 2.5, -1.25, 6.0] * 20)  # ties between levels
    W[5, :32] = 2.0**-3  # a power of two
    encoded = round_to_nearest("W", W, Encoding("mxfp4", 32), search=False)
    assert encoded.scales is not None
    packed = pack_mxfp4(encoded.codes, encoded.scales)
    assert packed.numpy().tobytes() == quantize(W.numpy(), MXFP4).tobytes()
    assert packed.numpy().tobytes() == c_quantize(W, int(MXFP4), packed.numel())
    assert dequantize(packed.numpy(), MXFP4).tobytes() == encoded.decode().numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_any_mxfp4_codes_decode_to_the_very_weights(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups * 32), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(0, 250, (rows, groups), generator=generator, dtype=torch.uint8)
    packed = pack_mxfp4(codes, exponents)
    tensor = EncodedTensor(Encoding("mxfp4", 32), codes, exponents)
    assert dequantize(packed.numpy(), MXFP4).tobytes() == tensor.decode().numpy().tobytes()
    back = unpack_mxfp4(packed)
    assert torch.equal(back[0], codes) and torch.equal(back[1], exponents)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_any_iq4_nl_codes_decode_to_the_very_weights(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups * 32), generator=generator, dtype=torch.uint8)
    scales = torch.randn(rows, groups, generator=generator).half() * 0.001
    packed = pack_iq4_nl(codes, scales)
    tensor = EncodedTensor(Encoding("iq4_nl", 32), codes, scales)
    assert dequantize(packed.numpy(), IQ4_NL).tobytes() == tensor.decode().numpy().tobytes()
    back = unpack_iq4_nl(packed)
    assert torch.equal(back[0], codes) and torch.equal(back[1], scales)


def test_iq4_nl_holds_what_the_c_library_chose_and_our_search_chooses_better() -> None:
    W = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)) * 0.05
    theirs = torch.frombuffer(bytearray(c_quantize(W, int(IQ4_NL), 64 * 5 * 18)), dtype=torch.uint8).view(64, -1)
    codes, scales = unpack_iq4_nl(theirs)
    assert torch.equal(pack_iq4_nl(codes, scales), theirs)
    held = EncodedTensor(Encoding("iq4_nl", 32), codes, scales).decode()
    ours = round_to_nearest("W", W, Encoding("iq4_nl", 32), search=True).decode()
    assert (W - ours).square().sum() < (W - held).square().sum() < 1.1 * (W - ours).square().sum()


def test_what_does_not_fit_mxfp4_is_refused() -> None:
    codes, exponents = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="below 16"):
        pack_mxfp4(codes + 16, exponents)
    with pytest.raises(ValueError, match="one per block"):
        pack_mxfp4(codes, exponents[:, :1])
    with pytest.raises(ValueError, match="blocks of 17 bytes"):
        unpack_mxfp4(codes)


def c_quantize(W: Tensor, kind: int, size: int) -> bytes:
    """The bytes that llama.cpp's own libggml makes of a matrix."""
    import llama_cpp

    folder = llama_cpp.llama_cpp.__file__.rpartition("/")[0]
    library = ctypes.CDLL(f"{folder}/lib/libggml-base.so")
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = ctypes.create_string_buffer(size)
    assert quantize_chunk(kind, W.contiguous().data_ptr(), out, 0, *W.shape, None) == size
    return out.raw


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.zeros(2, 40, dtype=torch.int8), torch.ones(2, 1).half(), "multiple of 32"),
        (torch.full((2, 32), 8, dtype=torch.int8), torch.ones(2, 1).half(), "holds -8 to 7"),
        (torch.zeros(2, 96, dtype=torch.int8), torch.ones(2, 2).half(), "dividing 3 blocks"),
        (torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1), "float16"),
    ],
)
def test_what_does_not_fit_a_block_is_refused(codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_q4_0(codes, scales)
