"""Repetition in a sequence of tokens: what a language model falls into when it runs free and breaks down.

Holtzman et al. 2020, arXiv:1904.09751, describe the loops of greedy decoding; the share of distinct n-grams is
that of Li et al. 2016, arXiv:1510.03055.
"""

from __future__ import annotations

from collections.abc import Sequence


def loops(tokens: Sequence[int], span: int, longest: int) -> bool:
    """Whether the last `span` tokens repeat with a period of at most `longest` tokens; fewer tokens never do.

    >>> loops([9, 1, 2, 1, 2], span=4, longest=2), loops([9, 1, 2, 1, 2], span=5, longest=2)
    (True, False)
    """
    tail = tokens[len(tokens) - span :] if len(tokens) >= span else ()
    return any(tail[period:] == tail[:-period] for period in range(1, longest + 1)) if tail else False


def distinct_share(tokens: Sequence[int], n: int) -> float:
    """Distinct n-grams over all n-grams; 1 where there is none.

    >>> distinct_share([1, 2, 1, 2, 1], 2), distinct_share([1], 2)
    (0.5, 1.0)
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
