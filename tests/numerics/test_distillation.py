"""The distillation loss and its written-out gradient against plain float64 and autograd."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from compress.numerics.distillation import (
    backward_through_heads,
    divergence_and_gradient,
    divergence_through_heads,
    kl_divergence,
    loss_and_gradient,
    top_k_loss_and_gradient,
    warm_cosine,
)
from compress.numerics.packing import pack_rows, unpack_rows
from compress.numerics.top_k import TopK, bytes_per_token

KINDS = ["forward", "reverse", "js"]


def logits_of(seed: int, tokens: int = 5, vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(vocabulary, (tokens,), generator=generator)


def softmax(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def plain_divergence(p: list[float], q: list[float], kind: str) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    m = [(a + b) / 2 for a, b in zip(p, q)]
    return {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[kind]


def plain_loss(student, teacher, label: int, temperature: float, alpha: float, kind: str = "forward") -> float:
    soft = plain_divergence(softmax(teacher, temperature), softmax(student, temperature), kind)
    return alpha * temperature**2 * soft - (1 - alpha) * math.log(softmax(student, 1.0)[label])


def autograd_divergence(p, q, kind):
    def kl(a, b):
        return torch.xlogy(a, a / b).sum(-1)

    m = (p + q) / 2
    return {"forward": lambda: kl(p, q), "reverse": lambda: kl(q, p), "js": lambda: (kl(p, m) + kl(q, m)) / 2}[kind]()


def autograd_loss(student, teacher, labels, temperature, alpha, kind="forward"):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    soft = autograd_divergence(p, q, kind) * temperature**2
    return alpha * soft + (1 - alpha) * cross_entropy(student, labels, reduction="none")


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.integers(0, 999),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from(KINDS),
)
def test_loss_equals_a_plain_float64_version(seed, temperature, alpha, kind):
    student, teacher, labels = logits_of(seed)
    loss, _ = loss_and_gradient(student, teacher, labels, temperature, alpha, kind)
    plain = [
        plain_loss(s, t, int(y), temperature, alpha, kind)
        for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist())
    ]
    # float32 logits of about 10 / 0.5 lose 2e-6 absolute, times T² = 16
    torch.testing.assert_close(loss, torch.tensor(plain), rtol=1e-4, atol=5e-5)


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from(KINDS))
def test_gradient_equals_autograd(seed, temperature, alpha, kind):
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in logits_of(seed))
    student.requires_grad_()
    autograd_loss(student, teacher, labels, temperature, alpha, kind).sum().backward()
    _, gradient = loss_and_gradient(student.detach(), teacher, labels, temperature, alpha, kind)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-9, atol=1e-12)


def cut(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens and the log-probabilities of these and of the rest, without any packing."""
    p = (teacher.double() / temperature).softmax(-1)
    ids = teacher.topk(k, dim=1).indices
    top = p.gather(1, ids)
    return ids, torch.cat([top, p.scatter(1, ids, 0.0).sum(1, keepdim=True).clamp(min=1e-300)], dim=1).log()


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 6), st.sampled_from(KINDS))
def test_the_top_k_loss_compares_k_tokens_and_the_rest(seed, temperature, k, kind):
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in logits_of(seed))
    ids, log_p = cut(teacher, k, temperature)
    student.requires_grad_()
    q = (student / temperature).softmax(-1)
    top = q.gather(1, ids)
    events = torch.cat([top, q.scatter(1, ids, 0.0).sum(1, keepdim=True)], dim=1)
    soft = autograd_divergence(log_p.exp(), events, kind) * temperature**2
    whole = 0.4 * soft + 0.6 * cross_entropy(student, labels, reduction="none")
    whole.sum().backward()
    loss, gradient = top_k_loss_and_gradient(student.detach(), ids, log_p, labels, temperature, 0.4, kind)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-7, atol=1e-10)
    full, _ = loss_and_gradient(student.detach(), teacher, labels, temperature, 0.4, kind)
    assert (loss <= full + 1e-9).all()  # merging events hides differences, and makes none


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_equals_full(kind, temperature):
    student, teacher, labels = logits_of(1, tokens=9, vocabulary=13)
    teacher = teacher.bfloat16().float()  # as a head gives them
    ids, log_p = TopK.of(teacher, 13, temperature).rows(slice(0, 9))
    found = top_k_loss_and_gradient(student, ids, log_p, labels, temperature, 0.7, kind)
    full = loss_and_gradient(student, teacher, labels, temperature, 0.7, kind)
    for a, b in zip(found, full):  # a gap below 16 is rounded to 1/256 of a nat at worst, where p is below e^-8
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_a_cut_distribution_keeps_its_k_tokens_and_its_mass_and_takes_the_room_that_is_stated(k):
    teacher = (4 * torch.randn(7, 300, generator=torch.Generator().manual_seed(k))).bfloat16().float()
    kept = TopK.join([TopK.of(teacher[:3], k, 2.0), TopK.of(teacher[3:], k, 2.0)])
    ids, log_p = kept.rows(slice(1, 6))
    wanted_ids, wanted = cut(teacher, k, 2.0)
    assert ids.shape == (5, k) and torch.equal(teacher[1:6].gather(1, ids), teacher[1:6].gather(1, wanted_ids[1:6]))
    torch.testing.assert_close(log_p.exp().double(), wanted[1:6].exp(), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5))
    assert kept.nbytes == 7 * bytes_per_token(k, 300) == 7 * (math.ceil(9 * k / 8) + 2 * k + 4)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 5), st.integers(1, 9), st.integers(0, 99))
def test_packed_rows_come_back(bits, rows, count, seed):
    indices = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(indices, bits)
    assert packed.shape == (rows, (bits * count + 7) // 8)
    assert torch.equal(unpack_rows(packed, bits, count), indices)


def test_inputs_are_left_alone():
    student, teacher, labels = logits_of(0)
    before = student.clone(), teacher.clone()
    loss_and_gradient(student, teacher, labels, 1.0, 0.5)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_alpha_zero_is_cross_entropy():
    student, teacher, labels = logits_of(0)
    loss, _ = loss_and_gradient(student, teacher, labels, 2.0, 0.0)
    torch.testing.assert_close(loss, cross_entropy(student, labels, reduction="none"))


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from(KINDS))
def test_a_distribution_does_not_diverge_from_itself(seed, temperature, kind):
    student, teacher, labels = logits_of(seed)
    assert kl_divergence(student, student, temperature).tolist() == [0.0] * 5
    loss, gradient = loss_and_gradient(student, student, labels, temperature, 1.0, kind)
    assert not loss.any() and not gradient.any()
    assert (kl_divergence(student, teacher, temperature) > 0).all()
    apart, _ = loss_and_gradient(student, teacher, labels, temperature, 1.0, kind)
    assert (apart > 0).all()


def test_extreme_logits_stay_finite():
    log_p, log_q = (torch.tensor([[0.0, x, -1e4]]) for x in (-90.0, -200.0))
    for kind in KINDS:
        for pair in ((log_p, log_q), (log_q, log_p)):
            loss, gradient = divergence_and_gradient(pair[0].clone(), pair[1].clone(), kind)
            assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("beside", [0.0, 0.3])
@pytest.mark.parametrize("block", [5, 512])
def test_chunked_heads_equal_the_whole_backward(chunk, beside, block):
    generator = torch.Generator().manual_seed(0)
    x, body, target = (torch.randn(*s, generator=generator).double() for s in [(7, 4), (4, 6), (7, 6)])
    W, V = (torch.randn(11, 6, generator=generator).double() for _ in range(2))
    labels = torch.randint(11, (7,), generator=generator)
    body.requires_grad_()
    W.requires_grad_()
    whole = autograd_loss(x @ body @ W.T, target @ V.T, labels, 2.0, 0.5).sum()
    whole = whole + beside * (x @ body).square().sum()
    expected = torch.autograd.grad(whole / 7, [body, W])
    teacher = target @ V.T
    hidden = x @ body
    total = backward_through_heads(
        hidden,
        lambda h: h @ W.T,
        lambda block: lambda z, rows: loss_and_gradient(z, teacher[block][rows].float(), labels[block][rows], 2.0, 0.5),
        scale=1 / 7,
        chunk=chunk,
        block=block,
        beside=beside * hidden.square().sum() if beside else None,
    )
    # the loss itself is computed in float32
    assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    for found, plain in zip([body.grad, W.grad], expected):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_a_non_finite_loss_leaves_the_body_without_gradient():
    hidden = torch.ones(2, 3, requires_grad=True)
    W = torch.full((4, 3), torch.nan)
    loss = partial(loss_and_gradient, teacher=torch.ones(2, 4), temperature=1.0, alpha=0.5)
    labels = torch.tensor([0, 1])
    total = backward_through_heads(hidden, lambda h: h @ W.T, lambda _: lambda z, rows: loss(z, labels=labels[rows]))
    assert math.isnan(total) and hidden.grad is None


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_divergence_equals_the_whole(chunk):
    student, teacher, _ = logits_of(3, tokens=9)
    eye = torch.nn.Identity()
    total = divergence_through_heads(student, teacher, eye, eye, chunk)
    assert total == pytest.approx(float(kl_divergence(student, teacher).sum()), rel=1e-5)


def test_the_learning_rate_rises_peaks_and_falls_without_stopping():
    factors = [warm_cosine(step, 20, 4) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b > 0 for a, b in zip(factors[4:], factors[5:]))
    assert [warm_cosine(step, 1, 1) for step in range(1)] == [1.0]
