"""Drawing tokens: exact samples of a softmax whose noise two models can share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Pick = Callable[[Any], int]
"""A row of logits (vocabulary,), of numpy or torch → the token that is written."""


def greedy(row: Any) -> int:
    """The likeliest token of a row of logits (vocabulary,), of numpy or torch; the first of equals."""
    return int(row.argmax())


def gumbel(temperature: float, seed: int) -> Pick:
    """Draws a token of softmax(row / temperature) at each call: argmax of row / temperature + Gumbel noise.

    row: (vocabulary,) logits, of numpy or torch. The noise follows from the seed and the number of calls alone: two
    models with the same seed write the same answer wherever their distributions agree, which pairs their samples.
    Gumbel 1954, in Maddison, Tarlow & Minka 2014, arXiv:1411.0030, section 2.
    """
    import numpy as np

    generator = np.random.default_rng(seed)

    def draw(row: Any) -> int:
        logits = np.asarray(row, dtype=np.float64)
        return int((logits / temperature + generator.gumbel(size=len(logits))).argmax())

    return draw
