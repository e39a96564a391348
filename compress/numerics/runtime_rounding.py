"""Rounding of what a model computes while it runs: activations, keys and values.

All functions take and give (…, k) float32 and return decoded values: codes times scale. Codes round half to even, as
onnxruntime's and llama.cpp's vectorized kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale in llama.cpp's blocks
TINY = 1e-20  # a vector of zeros needs some scale


def round_per_token(x: Tensor) -> Tensor:
    """int8 codes with one float32 scale max|x| / 127 per vector (last axis).

    >>> round_per_token(torch.tensor([[127.0, 0.6, -2.5]]))
    tensor([[127.,   1.,  -2.]])
    """
    scales = x.abs().amax(-1, keepdim=True).clamp_(min=TINY) / 127
    return (x / scales).round_().mul_(scales)


def round_per_tensor(x: Tensor, scale: float) -> Tensor:
    """int8 codes in [-128, 127] with one given scale: values beyond are cut off.

    >>> round_per_tensor(torch.tensor([300.0, 1.4]), 1.0)
    tensor([127.,   1.])
    """
    return (x / scale).round_().clamp_(-128, 127).mul_(scale)


def round_q8_0(x: Tensor) -> Tensor:
    """int8 codes, one float16 scale per 32 values: llama.cpp's Q8_0. k must be a multiple of 32.

    The codes are chosen for the float32 scale, which is then stored as float16.
    """
    blocks = _blocks(x)
    most = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(most == 0, 0.0, 127 / most)).round_()
    return codes.mul_((most / 127).half().float()).view(x.shape)


def round_q4_0(x: Tensor) -> Tensor:
    """Codes in [-8, 7], one float16 scale per 32 values of either sign: llama.cpp's Q4_0; see `round_q8_0`.

    The value of largest magnitude takes code -8; halves are rounded up, as llama.cpp does by cutting off x + 8.5.
    """
    blocks = _blocks(x)
    scales = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (blocks * torch.where(scales == 0, 0.0, 1 / scales)).add_(8.5).trunc_().clamp_(max=15).sub_(8)
    return codes.mul_(scales.half().float()).view(x.shape)


def _blocks(x: Tensor) -> Tensor:
    """From (…, k) to (…, k / 32, 32)."""
    return x.reshape(*x.shape[:-1], -1, BLOCK)
