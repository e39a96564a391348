"""Soft caps: values squashed into an open interval, almost unchanged near zero."""

from __future__ import annotations

from torch import Tensor


def capped(x: Tensor, cap: float | None) -> Tensor:
    """The soft cap c · tanh(x / c), elementwise; x itself without one. Gemma Team 2024, arXiv:2408.00118, section 2.

    >>> import torch
    >>> [round(v, 3) for v in capped(torch.tensor([0.1, 100.0]), 30.0).tolist()]
    [0.1, 29.924]
    """
    return x if cap is None else (x / cap).tanh() * cap
