"""Batches of windows: a partition, within the budget, with little padding."""

from hypothesis import given
from hypothesis import strategies as st

from compress.batching import WASTE, batches


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 2000))
def test_batches_are_a_partition_with_little_padding(lengths, budget):
    found = batches(lengths, budget)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        own = [lengths[i] for i in batch]
        padded = len(own) * max(own)
        assert len(own) == 1 or (padded <= budget and padded <= WASTE * sum(own))


@given(st.integers(1, 100), st.integers(1, 40))
def test_equal_lengths_fill_the_budget(length, count):
    found = batches([length] * count, 10 * length)
    assert [len(batch) for batch in found] == [10] * (count // 10) + [count % 10] * (count % 10 > 0)
