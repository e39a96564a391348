"""How matrices are multiplied on a processor: in which type, and by which library.

Products of calibration and training (`working_products`) run in the faster type: bfloat16 takes a quarter of
float32's time where the processor multiplies it itself, and eight times as long where it does not (2 cores of an AMD
EPYC with AVX-512 and of one without: 17 against 140 GFLOPS for (4096, 576) by (576, 1536)).

torch asks MKL, which is half as fast as oneDNN on processors other than its maker's: 213 against 474 GFLOPS for
(4096, 576) by (576, 1536) on two cores of an AMD EPYC. torch asks oneDNN only where it may read factors with fewer
bits, of which oneDNN makes use on some processors and not on others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

NATIVE = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last is ARM's


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return any(torch.cpu.get_capabilities().get(name) for name in NATIVE)


def working_type() -> torch.dtype:
    """The type of products that no gate measures: bfloat16 where the processor multiplies it itself, else float32."""
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def working_products() -> torch.autocast:
    """Products in `working_type`; sums, norms and softmaxes stay float32.

    Safe inside a block and for a head, as long as the residual stream between blocks is float32.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bfloat16())


@cache
def prefer_onednn() -> bool:
    """Let oneDNN multiply float32 matrices from now on, if it reads every bit of them here; whether it does.

    A setting of the whole process, which changes no result beyond the order of summation.
    """
    with torch.no_grad(), bfloat16_factors(True):
        exact = all(_reads_all(rows, size) for rows in (1, 64, 512, 2048) for size in (64, 576))
    if exact:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    return exact


@contextmanager
def bfloat16_factors(exact: bool) -> Iterator[None]:
    """Let products of float32 tensors read them as bfloat16, where that is `exact`, and still add up in float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if exact:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def small_products() -> Iterator[None]:
    """Products of some ten thousand terms: they take less time than oneDNN to prepare, or a second thread to wake."""
    matmul, threads = torch.backends.mkldnn.matmul, torch.get_num_threads()  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        matmul.fp32_precision = before
        torch.set_num_threads(threads)


def _reads_all(rows: int, size: int) -> bool:
    """Whether a number that needs all bits of float32 comes back from products with the identity, on either side."""
    value = 1 + 2.0**-23
    X, identity = torch.full((rows, size), value), torch.eye(size)
    found = [X @ identity, torch.nn.functional.linear(X, identity), torch.bmm(X[None], identity[None])]
    found += [identity @ X.T, torch.bmm(identity[None], X.T[None])]
    return all(bool((product == value).all()) for product in found)
