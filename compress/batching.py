"""Windows of unequal length in batches that waste little on padding."""

from __future__ import annotations

from collections.abc import Sequence

WASTE = 1.08  # padded size of a batch over its tokens; a product gains little from more rows than some 60


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, shortest first.

    Padded to its longest member, a batch holds at most `budget` tokens, and at most `WASTE` times those that its
    members have; a member that is longer than the budget is alone.

    >>> batches([10, 100, 11, 99, 300], 256)
    [[0, 2], [3, 1], [4]]
    """
    found: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(found[-1]) + 1) * lengths[i] if found else 0
        if found and padded <= budget and padded <= WASTE * (tokens + lengths[i]):
            found[-1].append(i)
            tokens += lengths[i]
        else:
            found.append([i])
            tokens = lengths[i]
    return found
