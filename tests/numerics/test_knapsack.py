"""The multiple-choice knapsack against all combinations."""

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.knapsack import choose

losses = st.one_of(st.floats(0, 1e3), st.integers(0, 3).map(float), st.floats(1e-12, 1e-6))


@st.composite
def problems(draw):
    choices = draw(st.integers(1, 4))
    rows = st.lists(st.tuples(st.integers(0, 12), losses), min_size=choices, max_size=choices)
    items = draw(st.lists(rows, min_size=1, max_size=6))
    costs, values = [[c for c, _ in row] for row in items], [[x for _, x in row] for row in items]
    return costs, values, sum(map(min, costs)) + draw(st.integers(0, 20))


@given(problems())
def test_no_combination_within_the_budget_is_better(problem):
    costs, values, budget = problem
    picks = choose(costs, values, budget)
    assert sum(c[k] for c, k in zip(costs, picks)) <= budget
    found = sum(x[k] for x, k in zip(values, picks))
    everything = itertools.product(range(len(costs[0])), repeat=len(costs))
    fitting = (q for q in everything if sum(c[k] for c, k in zip(costs, q)) <= budget)
    best = min(sum(x[k] for x, k in zip(values, q)) for q in fitting)
    assert found <= best + 1e-9 * (1 + best)  # sums of float64 in another order


def test_a_budget_below_the_cheapest_choices_is_refused():
    with pytest.raises(ValueError, match="cost 7, more than 6"):
        choose([[3, 9], [4, 5]], [[1.0, 0.0], [1.0, 0.0]], 6)


def test_a_deep_model_takes_a_moment_and_spends_its_budget():
    rng = random.Random(0)
    sizes = [4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096, *[4096 * 11008] * 3] * 32
    costs = [[round(n * bits) for bits in (3.5, 4.5, 8.5)] for n in sizes]
    values = [[rng.lognormvariate(0, 2) * 4.0**-bits for bits in (3, 4, 8)] for _ in sizes]
    budget = round(4.6 * sum(sizes))
    started = time.process_time()
    spent = sum(c[k] for c, k in zip(costs, choose(costs, values, budget)))
    assert 0.999 * budget < spent <= budget
    assert time.process_time() - started < 20  # 0.3 s on an idle machine
