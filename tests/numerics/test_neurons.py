"""Channels to remove, and the least squares that make up for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import NumericalError
from compress.numerics.counts import kept_width
from compress.numerics.masks import wanda_scores
from compress.numerics.neurons import (
    channel_scores,
    compensated,
    fisher_channel_scores,
    highest,
    highest_groups,
    together,
    wanda_channel_scores,
    with_constant,
)


def problem(seed: int, n: int = 6, m: int = 20, tokens: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, m), and inputs (tokens, m) whose channels are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, m // 2, generator=generator)
    X = factors @ torch.randn(m // 2, m, generator=generator) + 0.3 * torch.randn(tokens, m, generator=generator)
    return torch.randn(n, m, generator=generator), X


@given(st.integers(0, 99), st.integers(1, 3000), st.integers(1, 64))
def test_the_width_left_is_the_smallest_multiple_that_removes_at_most_the_fraction(percent, n, multiple):
    width = kept_width(percent / 100, n, multiple)
    assert 0 < width <= n and 100 * (n - width) <= percent * n
    if width < n:
        assert width % multiple == 0
        assert 100 * (n - (width - multiple)) > percent * n  # one multiple less would remove too much


def test_scores_are_the_norm_of_what_a_channel_adds():
    W, X = problem(0)
    plain = [float(torch.outer(X[:, j].double(), W[:, j].double()).norm()) for j in range(20)]
    torch.testing.assert_close(channel_scores(W, X.T @ X).tolist(), plain, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_fisher_scores_are_what_the_loss_feels_of_what_a_channel_adds(seed):
    W, X = problem(seed)
    g = torch.randn(9, len(W), generator=torch.Generator().manual_seed(seed))
    found = fisher_channel_scores(W, X.T @ X, g.T @ g)
    plain = []
    for j in range(20):  # every token's share of the output against every gradient
        changes = [float(x[j] * (W[:, j].double() @ d)) for x in X.double() for d in g.double()]
        plain.append(sum(change**2 for change in changes) ** 0.5)
    torch.testing.assert_close(found.tolist(), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fisher_channel_scores(W, X.T @ X, torch.eye(len(W))), channel_scores(W, X.T @ X))


def test_the_highest_stay_in_order_and_ties_go_by_position():
    assert highest(torch.tensor([3.0, 1.0, 5.0, 3.0, 3.0]), 3).tolist() == [0, 2, 3]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 19), st.sampled_from([1e-6, 0.01, 0.5]))
def test_the_update_solves_the_ridge_regression(seed, count, ridge):
    W, X = problem(seed)
    H, kept = X.T @ X, torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    found = compensated(W, H, kept, ridge).double()
    # stacked rows: what is missing from the output, and λ times the way from the old weights
    penalty = (ridge * float(H.diagonal().double().mean())) ** 0.5
    missing = X.double() @ W.double().T - X[:, kept].double() @ W[:, kept].double().T
    A = torch.cat([X[:, kept].double(), penalty * torch.eye(count, dtype=torch.float64)])
    b = torch.cat([missing, torch.zeros(count, 6, dtype=torch.float64)])
    expected = W[:, kept].double() + torch.linalg.lstsq(A, b).solution.T
    # H is rounded to float32, which its inverse amplifies by at most 1 / ridge or its own condition
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_what_the_outputs_lack_besides_is_fitted_too(seed, count):
    W, X = problem(seed)
    lacking = torch.randn(len(X), 6, generator=torch.Generator().manual_seed(seed + 1))
    H, kept = X.T @ X, torch.arange(count)
    found = compensated(W, H, kept, 0.01, lacking.T @ X).double()
    penalty = (0.01 * float(H.diagonal().double().mean())) ** 0.5
    missing = X.double() @ W.double().T + lacking.double() - X[:, kept].double() @ W[:, kept].double().T
    A = torch.cat([X[:, kept].double(), penalty * torch.eye(count, dtype=torch.float64)])
    b = torch.cat([missing, torch.zeros(count, 6, dtype=torch.float64)])
    expected = W[:, kept].double() + torch.linalg.lstsq(A, b).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # as above


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 20), st.booleans(), st.sampled_from([0.01, 0.5]))
def test_a_bias_is_the_intercept_of_the_ridge_regression(seed, count, lacks, ridge):
    """Plain weighted least squares in float64: rows times the roots of their weights, no penalty on the intercept."""
    W, X = problem(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    X = X + 3 * torch.randn(20, generator=generator)  # channels with means
    bias, root = torch.randn(6, generator=generator), torch.rand(len(X), 1, generator=generator) + 0.1
    lacking = torch.randn(len(X), 6, generator=generator) + 2 if lacks else torch.zeros(len(X), 6)
    kept = torch.randperm(20, generator=generator)[:count].sort().values
    full = with_constant(X) * root
    sums = full.T @ full, (lacking * root).T @ full if lacks else None
    left = torch.cat([kept, torch.tensor([20])])
    found = compensated(torch.cat([W, bias[:, None]], 1), sums[0], left, ridge, sums[1], constant=1).double()

    penalty = (ridge * float((X * root).double().square().sum(dim=0).mean())) ** 0.5
    wanted = (X.double() @ W.double().T + bias + lacking) * root
    A = torch.cat([X[:, kept], torch.ones(len(X), 1)], 1).double() * root
    b = wanted - A[:, :-1] @ W[:, kept].double().T
    A = torch.cat([A, torch.cat([penalty * torch.eye(count), torch.zeros(count, 1)], 1)])
    expected = torch.linalg.lstsq(A, torch.cat([b, torch.zeros(count, 6)])).solution.T
    expected[:, :-1] += W[:, kept]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=5e-3)  # as above, of larger sums


def test_nothing_removed_leaves_the_bias_too():
    W, X = problem(3)
    whole = torch.cat([W, torch.randn(6, 1)], 1)
    H = with_constant(X).T @ with_constant(X)
    assert torch.equal(compensated(whole, H, torch.arange(21), 0.01, constant=1), whole)


def test_the_mean_of_removed_channels_that_nothing_else_tells_goes_into_the_bias():
    W, X = problem(5)
    X = X - X.mean(dim=0)
    X[:, 0] = 2.0
    H = with_constant(X).T @ with_constant(X)
    found = compensated(torch.cat([W, torch.zeros(6, 1)], 1), H, torch.arange(1, 21), 0.1, constant=1)
    torch.testing.assert_close(found, torch.cat([W[:, 1:], 2 * W[:, :1]], 1), rtol=1e-4, atol=1e-4)


def test_nothing_removed_and_nothing_lacking_is_the_identity():
    W, X = problem(3)
    assert torch.equal(compensated(W, X.T @ X, torch.arange(20), 0.01), W)
    assert torch.equal(compensated(W, X.T @ X, torch.arange(20), 0.01, torch.zeros(6, 20)), W)


@pytest.mark.parametrize(
    ("groups", "per_group", "rows", "heads"),
    [(2, 2, [0, 2], [0, 2, 6, 8]), (3, 1, [0, 1, 2], [2, 3, 8]), (1, 3, [2], [6, 7, 8])],
)
def test_groups_are_chosen_whole_and_heads_within_them(groups, per_group, rows, heads):
    scores = torch.tensor([[3.0, 1.0, 4.0], [2.0, 1.0, 1.0], [5.0, 1.0, 6.0]])
    found = highest_groups(scores, groups, per_group)
    assert [f.tolist() for f in found] == [rows, heads]


def test_scores_that_add_are_summed_and_norms_are_joined_by_their_squares():
    scores = torch.tensor([[3.0, 4.0], [0.0, 6.0], [1.0, 1.0]])
    assert together(scores, False).tolist() == [5.0, 6.0, pytest.approx(2**0.5)]
    assert together(scores, True).tolist() == [7.0, 6.0, 2.0]
    assert [f.tolist() for f in highest_groups(scores, 1, 1, adding=True)] == [[0], [1]]
    assert [f.tolist() for f in highest_groups(scores, 1, 1)] == [[1], [3]]


def test_wanda_channel_scores_are_sums_of_its_scores():
    W, X = problem(4)
    plain = wanda_scores(W, X.norm(dim=0)).sum(dim=0)
    torch.testing.assert_close(wanda_channel_scores(W, X.T @ X), plain, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 19))
def test_the_update_never_loses_more_than_leaving_the_weights(seed, count):
    W, X = problem(seed)
    H = X.T @ X
    kept = highest(channel_scores(W, H), count)
    wanted = X @ W.T
    updated = (wanted - X[:, kept] @ compensated(W, H, kept, 0.01).T).square().sum()
    assert updated <= (wanted - X[:, kept] @ W[:, kept].T).square().sum()


def test_a_duplicated_channel_costs_nothing():
    W, X = problem(1)
    X[:, 3] = 2 * X[:, 7]
    kept = torch.tensor([j for j in range(20) if j != 3])
    V = compensated(W, X.T @ X, kept, 1e-7)
    torch.testing.assert_close(X[:, kept] @ V.T, X @ W.T, rtol=1e-3, atol=1e-2)  # float32 sums of 20 products


def test_an_indefinite_matrix_is_refused():
    W, X = problem(2)
    with pytest.raises(NumericalError, match="raise ridge"):
        compensated(W, -(X.T @ X), torch.arange(10), 0.01)
