"""Exact counts, determinism under ties, and earlier masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.counts import pruned_count
from compress.numerics.masks import keep_highest, keep_highest_of_all, keep_n_of_m, wanda_scores

SPARSITIES = st.integers(0, 99).map(lambda percent: percent / 100)


def scores_of(seed: int, n: int, m: int, levels: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.rand(n, m, generator=generator)
    return torch.randint(levels, (n, m), generator=generator).float()


def slow_row_mask(row: list[float], kept: list[bool], count: int) -> list[bool]:
    """Sort by (already dropped first, score, position) and drop the first `count`."""
    order = sorted(range(len(row)), key=lambda j: (kept[j], row[j] if kept[j] else 0.0, j))
    dropped = set(order[:count]) | {j for j, k in enumerate(kept) if not k}
    return [j not in dropped for j in range(len(row))]


@settings(deadline=None)  # a busy machine is no failure
@given(SPARSITIES, st.integers(1, 5), st.integers(1, 40), st.integers(0, 999), st.sampled_from([None, 1, 3]))
def test_each_row_loses_exactly_the_count(sparsity, n, m, seed, levels):
    mask = keep_highest(scores_of(seed, n, m, levels), sparsity)
    assert (~mask).sum(dim=1).tolist() == [pruned_count(sparsity, m)] * n


@settings(deadline=None)
@given(SPARSITIES, SPARSITIES, st.integers(1, 5), st.integers(1, 40), st.integers(0, 999))
def test_equals_a_plain_sort_with_ties_and_an_earlier_mask(sparsity, earlier, n, m, seed):
    scores = scores_of(seed, n, m, levels=3)
    kept = torch.rand(n, m, generator=torch.Generator().manual_seed(seed + 1)) >= earlier
    expected = [slow_row_mask(scores[i].tolist(), kept[i].tolist(), pruned_count(sparsity, m)) for i in range(n)]
    assert keep_highest(scores, sparsity, kept).tolist() == expected


@settings(deadline=None)
@given(SPARSITIES, st.integers(0, 999), st.sampled_from([None, 1, 2]))
def test_global_count_is_exact_over_all_tensors(sparsity, seed, levels):
    scores = [scores_of(seed, 3, 5, levels), scores_of(seed + 1, 4, 2, levels)]
    masks = keep_highest_of_all(scores, sparsity, [None, None])
    flat = torch.cat([s.flatten() for s in scores]).tolist()
    expected = slow_row_mask(flat, [True] * 23, pruned_count(sparsity, 23))
    assert torch.cat([m.flatten() for m in masks]).tolist() == expected


@settings(deadline=None)
@given(st.sampled_from([(2, 4), (4, 8), (1, 3)]), SPARSITIES, st.integers(0, 999), st.sampled_from([None, 1, 3]))
def test_patterns_keep_the_n_highest_of_every_m(pattern, earlier, seed, levels):
    n, m = pattern
    scores = scores_of(seed, 4, 6 * m, levels)
    kept = torch.rand(4, 6 * m, generator=torch.Generator().manual_seed(seed + 1)) >= earlier
    mask = keep_n_of_m(scores, n, m)
    assert (mask.view(4, 6, m).sum(dim=2) == n).all()
    groups = zip(scores.view(-1, m).tolist(), kept.view(-1, m).tolist())
    expected = [slow_row_mask(row, before, m - n) for row, before in groups]
    assert keep_n_of_m(scores, n, m, kept).view(-1, m).tolist() == expected


def test_global_drops_the_lowest_wherever_they_are():
    low, high = torch.tensor([[0.1, 0.2]]), torch.tensor([[5.0, 6.0]])
    assert [m.tolist() for m in keep_highest_of_all([high, low], 0.5, [None, None])] == [
        [[True, True]],
        [[False, False]],
    ]


def test_earlier_zeros_count_towards_the_sparsity():
    kept = torch.tensor([[False, True, True, True]])
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    assert keep_highest(scores, 0.5, kept).tolist() == [[False, False, True, True]]
    assert keep_highest(scores, 0.25, kept).tolist() == kept.tolist()
    assert keep_highest_of_all([scores], 0.5, [kept])[0].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(("sparsity", "n", "count"), [(0.29, 100, 29), (0.07, 100, 7), (0.5, 3, 1), (0.0, 9, 0)])
def test_counts_follow_the_decimal_not_its_binary_neighbour(sparsity, n, count):
    assert pruned_count(sparsity, n) == count


def test_wanda_scores_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(3, 4, generator=generator), torch.randn(7, 4, generator=generator)
    plain = torch.zeros(3, 4)
    for i in range(3):
        for j in range(4):
            plain[i, j] = abs(float(W[i, j])) * sum(float(x) ** 2 for x in X[:, j]) ** 0.5
    norms = X.double().square().sum(0).sqrt()
    torch.testing.assert_close(wanda_scores(W, norms), plain)  # float32 rounding of one product


def test_wanda_with_identity_activations_is_magnitude():
    W = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    norms = torch.eye(10).double().square().sum(0).sqrt()
    assert torch.equal(wanda_scores(W, norms), W.abs())
