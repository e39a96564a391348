"""Batches of windows: a partition, within the budget, with little padding."""

from hypothesis import given
from hypothesis import strategies as st

from compress.batching import SPARE, WASTE, batches, consecutive


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 2000))
def test_batches_are_a_partition_with_little_padding(lengths, budget):
    found = batches(lengths, budget)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        own = [lengths[i] for i in batch]
        padded = len(own) * max(own)
        padding = padded - sum(own)
        assert len(own) == 1 or (padded <= budget and padding <= max(SPARE, WASTE * sum(own)))


@given(st.integers(1, 100), st.integers(1, 40))
def test_equal_lengths_fill_the_budget(length, count):
    found = batches([length] * count, 10 * length)
    assert [len(batch) for batch in found] == [10] * (count // 10) + [count % 10] * (count % 10 > 0)


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 2000))
def test_consecutive_runs_are_as_long_as_the_budget_allows(lengths, budget):
    found = consecutive(lengths, budget)
    assert [i for run in found for i in run] == list(range(len(lengths)))
    for run, following in zip(found, found[1:]):
        own = sum(lengths[i] for i in run)
        assert (own <= budget or len(run) == 1) and own + lengths[following.start] > budget
