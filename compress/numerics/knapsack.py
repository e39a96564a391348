"""The multiple-choice knapsack: one choice per item, least total loss within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Index of the choice of each item that makes Σ losses least subject to Σ costs ≤ budget.

    costs, losses: per item, one entry per choice, finite. Dynamic programming over the undominated pairs of cost
    and loss (Nemhauser & Ullmann 1969); a partial solution whose Lagrangian bound exceeds the loss of a solution
    already known is dropped, which leaves a handful of states where the bound is tight. Raises ValueError where
    not even the cheapest choices fit.

    >>> choose([[3, 4, 8], [3, 4, 8]], [[9.0, 4.0, 0.0], [2.0, 1.0, 0.0]], budget=11)
    [2, 0]
    """
    C = [np.asarray(c, dtype=np.int64) for c in costs]
    L = [np.asarray(x, dtype=np.float64) for x in losses]
    cheapest = sum(int(c.min()) for c in C)
    if cheapest > budget:
        raise ValueError(f"the cheapest choices cost {cheapest}, more than {budget}")
    price, known = _price(C, L, budget)
    # What the items from i on cost at least, in units and in loss + price · units.
    least = np.append(np.cumsum([c.min() for c in C][::-1])[::-1], 0)
    bound = np.append(np.cumsum([(x + price * c).min() for c, x in zip(C, L)][::-1])[::-1], 0.0)
    slack = 1e-9 * (1 + abs(known))  # of float64 sums
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    taken: list[tuple[Integers, Integers]] = []  # per item: index of the state before, and the choice
    for i, (c, x) in enumerate(zip(C, L)):
        costs_now, losses_now = (cost[:, None] + c).ravel(), (loss[:, None] + x).ravel()
        possible = costs_now + least[i + 1] <= budget
        possible &= losses_now + price * (costs_now - budget) + bound[i + 1] <= known + slack
        kept = _undominated(costs_now, losses_now, np.flatnonzero(possible))
        cost, loss = costs_now[kept], losses_now[kept]
        taken.append((kept // len(c), kept % len(c)))
    state, found = int(loss.argmin()), []
    for before, choice in reversed(taken):
        found.append(int(choice[state]))
        state = int(before[state])
    return found[::-1]


def _undominated(costs: Integers, losses: Floats, among: Integers) -> Integers:
    """Those of the indices `among` that no other undercuts in both cost and loss, by rising cost."""
    order = among[np.lexsort((losses[among], costs[among]))]
    falling = losses[order]
    better = np.append(True, falling[1:] < np.minimum.accumulate(falling)[:-1])
    kept: Integers = order[better]
    return kept


def _price(costs: list[Integers], losses: list[Floats], budget: int) -> tuple[float, float]:
    """A price per unit whose Lagrangian bound is near its best, and the loss of a solution within the budget."""

    def at(price: float) -> tuple[int, float]:
        picks = [int((x + price * c).argmin()) for c, x in zip(costs, losses)]
        return sum(int(c[k]) for c, k in zip(costs, picks)), sum(float(x[k]) for x, k in zip(losses, picks))

    low, high = 0.0, 1.0
    if at(low)[0] <= budget:
        return low, at(low)[1]
    while at(high)[0] > budget:  # ends: beyond the widest range of losses, every item takes its cheapest choice
        high *= 2
    known = at(high)[1]
    for _ in range(100):
        middle = (low + high) / 2
        spent, loss = at(middle)
        if spent <= budget:
            high, known = middle, min(known, loss)
        else:
            low = middle
    return high, known
