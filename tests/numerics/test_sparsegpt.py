"""SparseGPT's solver against optimal brain surgery written out, and against choosing without an update."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import NumericalError
from compress.numerics.counts import pruned_count
from compress.numerics.masks import keep, wanda_scores
from compress.numerics.sparsegpt import sparsify

TARGETS = [0.5, 0.3, (2, 4), (4, 8)]


def problem(seed: int, n: int = 10, m: int = 48, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the second moments of inputs with strongly correlated channels: a few factors and noise."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, m // 4, generator=generator)
    X = factors @ torch.randn(m // 4, m, generator=generator) + 0.5 * torch.randn(tokens, m, generator=generator)
    return torch.randn(n, m, generator=generator), X.T @ X


def loss(W: torch.Tensor, new: torch.Tensor, H: torch.Tensor) -> float:
    error = (W - new).double()
    return float((error @ H.double() * error).sum())


def slow_sparsegpt(W: torch.Tensor, H: torch.Tensor, target, dampening: float, step: int) -> torch.Tensor:
    """Optimal brain surgery column by column with the exact inverse of what is left, in float64.

    Every `step` columns each row drops the lowest w² / [H⁻¹]_jj, where each column's inverse is that of the
    columns from it on, as in the paper's Algorithm 1.
    """
    W, H = W.double().clone(), H.double().clone()
    m = W.shape[1]
    H += dampening * H.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(m)]
    mask = torch.ones_like(W, dtype=torch.bool)
    for j in range(m):
        if j % step == 0:
            stop = min(j + step, m)
            for row in range(len(W)):
                scores = {c: float(W[row, c] ** 2 / inverses[c][0, 0]) for c in range(j, stop)}
                if isinstance(target, tuple):
                    count = target[1] - target[0]
                else:
                    total = pruned_count(target, m)
                    count = total * stop // m - total * j // m
                mask[row, sorted(scores, key=scores.__getitem__)[:count]] = False
        error = W[:, j] * ~mask[:, j] / inverses[j][0, 0]
        W[:, j:] -= error.unsqueeze(1) * inverses[j][0]
        W[:, j] *= mask[:, j]
    return W


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("m", [48, 288])  # within one run of columns, and over three
def test_equals_a_slow_plain_version(target, m):
    W, H = problem(0, n=6, m=m, tokens=4 * m)
    new, mask = sparsify(W, H, target, 0.01)
    expected = slow_sparsegpt(W, H, target, 0.01, target[1] if isinstance(target, tuple) else 128)
    assert torch.equal(new != 0, mask)
    # float32 against float64: near-equal scores may change places, and with them their rows
    same = (mask == (expected != 0)).all(dim=1)
    assert same.float().mean() >= 0.8
    torch.testing.assert_close(new[same].double(), expected[same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", TARGETS)
def test_loses_a_fraction_of_what_wanda_loses_on_its_inputs(target):
    """No theorem, since columns are chosen greedily: 0.12 to 0.26 of it on average."""
    ratios = []
    for seed in range(40):
        W, H = problem(seed)
        new, _ = sparsify(W, H, target, 0.01)
        scores = wanda_scores(W, H.diagonal().sqrt())
        ratios.append(loss(W, new, H) / loss(W, W * keep(scores, target), H))
    assert sum(ratios) / len(ratios) < 0.3 and max(ratios) < 0.7


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99).map(lambda percent: percent / 100),
    st.sampled_from([0.0, 0.2, 0.7]),
    st.sampled_from([7, 128, 130, 300]),
    st.integers(0, 999),
)
def test_each_row_loses_exactly_the_count_and_earlier_zeros_stay(sparsity, earlier, m, seed):
    W, H = problem(seed, n=4, m=m)
    kept = torch.rand(4, m, generator=torch.Generator().manual_seed(seed)) >= earlier
    kept[:, : m // 4] &= seed % 2 == 0  # some of them crowded into the first columns
    new, mask = sparsify(W * kept, H, sparsity, 0.1, kept)
    assert not (mask & ~kept).any() and not new[~mask].any()
    assert torch.equal((~mask).sum(dim=1), (~kept).sum(dim=1).clamp(min=pruned_count(sparsity, m)))


def test_an_earlier_mask_and_a_pattern_leave_at_most_n():
    W, H = problem(1)
    kept = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) >= 0.4
    new, mask = sparsify(W * kept, H, (2, 4), 0.01, kept)
    before, after = kept.view(10, 12, 4).sum(dim=2), mask.view(10, 12, 4).sum(dim=2)
    assert torch.equal(after, before.clamp(max=2)) and not new[~mask].any()


def test_uncorrelated_equal_inputs_make_it_magnitude_pruning_without_an_update():
    W, _ = problem(2)
    for target in TARGETS:
        new, mask = sparsify(W, 5 * torch.eye(48), target, 1e-6)
        assert torch.equal(mask, keep(W.abs(), target))
        torch.testing.assert_close(new, W * mask, rtol=0, atol=1e-5)  # float32 factor of the identity


def test_dead_channels_go_first_and_those_that_stay_keep_their_weights():
    W, H = problem(3)
    dead = torch.arange(48) % 3 == 0
    H[dead], H[:, dead] = 0.0, 0.0
    _, mask = sparsify(W, H, 0.5, 0.01)
    assert (~mask).sum() == 10 * 24 and not mask[:, dead].any()
    new, mask = sparsify(W, H, 0.25, 0.01)
    assert (~mask).sum() == 10 * 12 and mask[:, ~dead].all()
    torch.testing.assert_close(new[:, dead][mask[:, dead]], W[:, dead][mask[:, dead]], rtol=0, atol=0)


def test_an_indefinite_hessian_is_refused():
    W, H = problem(4)
    with pytest.raises(NumericalError, match="not positive definite"):
        sparsify(W, -H, 0.5, 0.01)
