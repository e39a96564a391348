"""How far apart two next-token distributions are, and how well one predicts its targets, token by token.

Everything runs over chunks of rows: a vocabulary of 49,152 makes each temporary 200 kB a row, so that a pass
over all rows of a window at once would leave the processor's cache. A logit that is NaN makes its row NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8  # rows of a chunk: fastest of 2 … 64 for a vocabulary of 49,152, 1.6 MB per temporary
_ROUNDING = 1e-5  # nats; float32 leaves errors of about 1e-6


@dataclass(frozen=True)
class Divergence:
    """Comparison of reference p and model q per token, each (T,)."""

    kl: Tensor  # KL(p‖q) in nats, float64
    js: Tensor  # Jensen–Shannon divergence in nats, float64, at most ln 2
    agree: Tensor  # bool: both have the same most likely token


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """−ln softmax(logits)[target] per token in nats, (T,) float64.

    logits: (T, V) float32. targets: (T,) int64.
    """
    if logits.shape[:1] != targets.shape:
        raise ValueError(f"{logits.shape[0]} rows of logits for {targets.numel()} targets")
    parts = [_chunk_nll(logits[rows], targets[rows]) for rows in row_chunks(len(logits))]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def divergence(reference: Tensor, model: Tensor) -> Divergence:
    """KL(p‖q), Jensen–Shannon divergence and top-1 agreement of p = softmax(reference), q = softmax(model).

    reference, model: (T, V) float32, row t of both predicting the same token. Equal rows have a KL of exactly
    0. A row with a logit of ±∞ is NaN or ∞ too: masked vocabularies are not compared silently.
    """
    if reference.shape != model.shape:
        raise ValueError(f"logits of shapes {tuple(reference.shape)} and {tuple(model.shape)} do not compare")
    space = torch.empty(5, min(_ROWS, len(reference)), reference.shape[1])
    chunks = [_chunk_divergence(reference[rows], model[rows], space) for rows in row_chunks(len(reference))]
    if not chunks:
        empty = torch.zeros(0, dtype=torch.float64)
        return Divergence(empty, empty, empty.bool())
    kl, js, agree = (torch.cat(column) for column in zip(*chunks, strict=True))
    return Divergence(kl, js, agree)


def row_chunks(rows: int) -> list[slice]:
    """Slices of rows whose temporaries stay in the processor's cache."""
    return [slice(start, start + _ROWS) for start in range(0, rows, _ROWS)]


def _chunk_nll(logits: Tensor, targets: Tensor) -> Tensor:
    top = logits.amax(1, keepdim=True)
    total = (logits - top).exp_().sum(1)
    # Subtract the maximum from the target too: ln Σ exp(x) itself is large, and float32 would round it away.
    target = logits.gather(1, targets.unsqueeze(1)) - top
    return total.double().log() - target.squeeze(1).double()


def _chunk_divergence(reference: Tensor, model: Tensor, space: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL = Σ p (a − b) + ln Z_b − ln Z_a, with a, b the logits below their maximum and Z = Σ exp.

    The normalizers are kept out of the sum over the vocabulary, where they would cost float32 digits.
    space: (5, T, V) float32 for temporaries; allocating them anew costs more than the arithmetic.
    """
    a, b, p, q, spare = space[:, : len(reference)]
    torch.sub(reference, reference.amax(1, keepdim=True), out=a)
    torch.sub(model, model.amax(1, keepdim=True), out=b)
    # Both maxima are 0 now, so that the sum is 0 just where a most likely token is shared.
    agree = torch.add(a, b, out=spare).amax(1) == 0
    z_p, z_q = torch.exp(a, out=p).sum(1), torch.exp(b, out=q).sum(1)
    log_p, log_q = z_p.double().log(), z_q.double().log()
    kl = _dot(p, torch.sub(a, b, out=spare)) / z_p.double() + (log_q - log_p)

    # JS = ½ Σ p ln p + ½ Σ q ln q − Σ m ln m with m = (p + q) / 2
    entropies = _dot(p, a) / z_p.double() - log_p + _dot(q, b) / z_q.double() - log_q
    m = p.mul_((0.5 / z_p).unsqueeze(1)).addcmul_(q, (0.5 / z_q).unsqueeze(1))
    log_m = torch.clamp(m, min=torch.finfo(m.dtype).tiny, out=spare).log_()  # 0 · ln 0 = 0; NaN stays NaN
    return _clamped(kl, math.inf), _clamped(entropies / 2 - _dot(m, log_m), math.log(2)), agree


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y per row, (T,) float64, in one pass and without a temporary."""
    dot: Tensor = torch.linalg.vecdot(x, y)
    return dot.double()


def _clamped(values: Tensor, maximum: float) -> Tensor:
    """Values outside [0, maximum] by rounding error alone are moved onto it; anything worse stays visible."""
    values = torch.where((values < 0) & (values > -_ROUNDING), torch.zeros_like(values), values)
    top = torch.full_like(values, maximum)
    return torch.where((values > maximum) & (values < maximum + _ROUNDING), top, values)
