"""Windows of unequal length in batches that waste little on padding, and texts cut to a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

Pair = tuple[list[int], list[int]]
WASTE = 0.08  # of a batch's tokens that may be padding
SPARE = 48  # tokens of padding that cost less than a pass of their own: each reads all weights once


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, shortest first.

    Padded to its longest member, a batch holds at most `budget` tokens, of which padding is no more than `SPARE`
    or `WASTE` times what its members have; a member that is longer than the budget is alone.

    >>> batches([10, 100, 20, 99, 300], 256)
    [[0, 2], [3, 1], [4]]
    """
    found: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(found[-1]) + 1) * lengths[i] if found else 0
        padding = padded - tokens - lengths[i]
        if found and padded <= budget and padding <= max(SPARE, WASTE * (tokens + lengths[i])):
            found[-1].append(i)
            tokens += lengths[i]
        else:
            found.append([i])
            tokens = lengths[i]
    return found


def consecutive(lengths: Sequence[int], budget: int) -> list[range]:
    """Indices in runs of at most `budget` tokens (at least one member each), in order.

    >>> consecutive([3, 3, 9, 1, 1], 6)
    [range(0, 2), range(2, 3), range(3, 5)]
    """
    found: list[range] = []
    tokens = 0
    for i, length in enumerate(lengths):
        if found and tokens + length <= budget:
            found[-1] = range(found[-1].start, i + 1)
            tokens += length
        else:
            found.append(range(i, i + 1))
            tokens = length
    return found


def first_holding(tokens: int, sizes: Iterable[int]) -> int:
    """How many of the batches, tokens in each, it takes to hold so many tokens; all where they hold fewer.

    >>> first_holding(11, [10, 10, 10]), first_holding(0, [10, 10, 10]), first_holding(99, [10, 10, 10])
    (2, 0, 3)
    """
    *before, _ = accumulate(sizes, initial=0)
    return sum(held < tokens for held in before)


def fitted(ids: Sequence[int], limit: int) -> list[int]:
    """At most `limit` tokens of a text between special ones: its end is cut, what closes the text stays.

    >>> fitted([101, 7, 8, 9, 102], 4), fitted([101, 7, 102], 4)
    ([101, 7, 8, 102], [101, 7, 102])
    """
    return list(ids) if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def alike(pairs: Sequence[Pair], most: int) -> list[list[Pair]]:
    """Pairs of the same lengths together, at most so many: nothing is padded.

    >>> alike([([1], [2]), ([3], [4, 5]), ([6], [7]), ([8], [9])], 2)
    [[([1], [2]), ([6], [7])], [([3], [4, 5])], [([8], [9])]]
    """
    found: dict[tuple[int, int, int], list[Pair]] = {}
    count: dict[tuple[int, int], int] = {}
    for source, target in pairs:
        shape = len(source), len(target)
        count[shape] = count.get(shape, 0) + 1
        found.setdefault((*shape, (count[shape] - 1) // most), []).append((source, target))
    return list(found.values())
