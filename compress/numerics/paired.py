"""Answers of two models to the same questions: how sure it is, on a fixed sample, that they differ, and by how much.

For reading, not for deciding: a gate looks again and again, where these hold at one look, chosen beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


def mcnemar(worse: int, better: int) -> float:
    """Two-sided exact p of no change, given how many answers became worse and how many better.

    The sign test on what changed. McNemar 1947, doi:10.1007/BF02295996; published: 0.0129 for 12 and 2 (Armitage and
    Berry 1994, p. 127).

    >>> round(mcnemar(12, 2), 4), mcnemar(0, 0)
    (0.0129, 1.0)
    """
    changed, fewer = worse + better, min(worse, better)
    tail: int = sum(math.comb(changed, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << changed))


def newcombe(
    both: int, first_only: int, second_only: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval for the first's rate less the second's: Wilson's of each, joined by the correlation of the answers.

    Newcombe 1998, doi:10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C, method 10. Raises ValueError
    where there is no pair.

    >>> [round(x, 4) for x in newcombe(59, 6, 16, 80)]
    [-0.1186, -0.0046]
    """
    n = both + first_only + second_only + neither
    if n < 1 or min(both, first_only, second_only, neither) < 0:
        raise ValueError(f"counts of pairs are {both}, {first_only}, {second_only}, {neither}")
    first, second = both + first_only, both + second_only
    low1, high1 = wilson(first, n, confidence)
    low2, high2 = wilson(second, n, confidence)
    down1, up1, down2, up2 = first / n - low1, high1 - first / n, second / n - low2, high2 - second / n
    spread = first * (n - first) * second * (n - second)
    product = both * neither - first_only * second_only
    phi = (min(product, 0) or max(product - n / 2, 0)) / math.sqrt(spread) if spread else 0.0
    difference = (first - second) / n
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return max(-1.0, difference - below), min(1.0, difference + above)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a rate. Wilson 1927, doi:10.1080/01621459.1927.10502953.

    >>> [round(x, 4) for x in wilson(0, 20)]
    [0.0, 0.1611]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def cluster_bootstrap(
    changes: NDArray[np.float64], confidence: float = 0.95, rounds: int = 1000
) -> tuple[float, float]:
    """Percentile interval of a mean over clusters, drawn with replacement as a whole.

    changes: (n,) mean paired change of the answers of each cluster, which stand and fall together. The draws are the
    same at every call. Approximate: it needs some dozens of clusters, and one alone has no width. Efron & Tibshirani
    1993, chapter 13; clusters: Davison & Hinkley 1997, section 3.8. Raises ValueError where there is none.
    """
    if not len(changes):
        raise ValueError("there is no cluster to draw from")
    drawn = np.random.default_rng(0).integers(0, len(changes), (rounds, len(changes)))
    low, high = np.quantile(changes[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that may be compared with α together: no true null among them is rejected in more than α of all cases.

    Holm 1979, https://www.jstor.org/stable/4615733.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted
