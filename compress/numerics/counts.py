"""Exact counts from fractions, without torch: plans need them."""

from __future__ import annotations

from fractions import Fraction
from math import floor


def pruned_count(sparsity: float, n: int) -> int:
    """Number of zeros among n weights: sparsity · n rounded down, with sparsity read as the decimal written.

    >>> pruned_count(0.29, 100), pruned_count(0.5, 3)  # in binary 0.29 * 100 is 28.999999999999996
    (29, 1)
    """
    return floor(Fraction(repr(float(sparsity))) * n)


def kept_width(fraction: float, n: int, multiple: int) -> int:
    """Width left when at most `fraction` of n channels go and what stays is a multiple; n where nothing goes.

    >>> kept_width(0.25, 1536, 32), kept_width(0.3, 1536, 32), kept_width(0.01, 1536, 32), kept_width(0.0, 66, 32)
    (1152, 1088, 1536, 66)
    """
    least = n - pruned_count(fraction, n)
    return min(n, -(-least // multiple) * multiple)
