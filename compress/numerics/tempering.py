"""What a sharper distribution costs: losses of softmax(β·x) against softmax(x), for many β in one pass.

With b = β − 1, x below its maximum, and p = softmax(x), both losses follow from one function of b:

    ln Z(b) = ln Σ p·exp(b·x),   NLL(β) − NLL(1) = ln Z(b) − b·x_target,   KL(p‖p_β) = ln Z(b) − b·Σ p·x

Each is convex in b and 0 at b = 0, so that it takes any positive value at no more than one b > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.numerics.divergence import row_chunks

Floats = NDArray[np.float64]

LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Multiples of a unit at which curves are known: each exponential is a square of an earlier one."""


@dataclass(frozen=True)
class Curves:
    """Sums over rows, from which losses per row follow: log_z (K,) at b = unit · LADDER[:K]."""

    log_z: Floats
    target: float
    mean: float
    rows: int

    def __add__(self, other: Curves) -> Curves:
        """The sums over the rows of both."""
        return Curves(
            self.log_z + other.log_z, self.target + other.target, self.mean + other.mean, self.rows + other.rows
        )

    def nll(self, b: Floats) -> Floats:
        """Mean increase of −ln p(target) in nats, at the b of `log_z`."""
        return (self.log_z - b * self.target) / self.rows

    def kl(self, b: Floats) -> Floats:
        """Mean KL(p‖p_β) in nats, at the b of `log_z`."""
        return (self.log_z - b * self.mean) / self.rows


def curves(logits: Tensor, targets: Tensor, unit: float, points: int = len(LADDER)) -> Curves:
    """The sums of one window. logits: (T, V) float32, targets: (T,) int64, unit: the smallest b."""
    log_z = torch.zeros(points, dtype=torch.float64)
    target, mean = 0.0, 0.0
    for rows in row_chunks(len(logits)):
        x = logits[rows] - logits[rows].amax(1, keepdim=True)
        target += x.gather(1, targets[rows].unsqueeze(1)).sum(dtype=torch.float64).item()
        p = x.exp()
        p /= p.sum(1, keepdim=True)
        mean += torch.linalg.vecdot(p, x).sum(dtype=torch.float64).item()
        log_z += _ladder(p, x.mul_(unit).exp_(), points)
    return Curves(log_z.numpy(), target, mean, len(logits))


def _ladder(p: Tensor, e: Tensor, points: int) -> Tensor:
    """Σ over rows of ln Σ p·e^m for the first multiples m, (points,): 1, then 2 and 3 and their doublings."""
    powers = [e, e * e, e * e * e] if points > 1 else [e]
    sums = []
    for i in range(points):
        power = powers[i if i < 3 else 1 + (i - 1) % 2]
        if i >= 3:
            power.square_()
        sums.append(torch.linalg.vecdot(p, power).double().log().sum())
    return torch.stack(sums)


def deviation(logits: Tensor) -> float:
    """Root of the mean variance of the logits under their own softmax, (T, V) → nats: a loss is ≈ ½ (b · it)²."""
    p = torch.softmax(logits, 1)
    mean = (p * logits).sum(1, keepdim=True)
    return math.sqrt(float((p * (logits - mean).square()).sum(1).mean()))


def crossing(b: Floats, losses: Floats, loss: float) -> float | None:
    """Where a curve known at b > 0, each (K,), takes the value `loss` > 0; None where it stays below.

    Cubic interpolation through the nearest points and the origin: good to some 1 % of the loss.
    """
    x, y = np.concatenate([[0.0], b]), np.concatenate([[0.0], losses])
    reached = np.flatnonzero(y >= loss)
    if not len(reached) or not np.isfinite(y).all():
        return None
    k = int(reached[0])
    near = slice(max(0, k - 2), k + 2)
    curve = np.polynomial.Polynomial.fit(x[near], y[near], len(x[near]) - 1)
    low, high = float(x[k - 1]), float(x[k])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(middle) < loss else (low, middle)
    return high
