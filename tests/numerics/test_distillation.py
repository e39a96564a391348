"""The distillation loss and its written-out gradient against plain float64 and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from compress.numerics.distillation import (
    backward_through_heads,
    divergence_through_heads,
    kl_divergence,
    loss_and_gradient,
    warm_cosine,
)


def logits_of(seed: int, tokens: int = 5, vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(vocabulary, (tokens,), generator=generator)


def softmax(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def plain_loss(student: list[float], teacher: list[float], label: int, temperature: float, alpha: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    soft = sum(a * math.log(a / b) for a, b in zip(p, q))
    return alpha * temperature**2 * soft - (1 - alpha) * math.log(softmax(student, 1.0)[label])


def autograd_loss(student, teacher, labels, temperature, alpha):
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    soft = (p * (p.log() - log_q)).sum(-1) * temperature**2
    return alpha * soft + (1 - alpha) * cross_entropy(student, labels, reduction="none")


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_loss_equals_a_plain_float64_version(seed, temperature, alpha):
    student, teacher, labels = logits_of(seed)
    loss, _ = loss_and_gradient(student, teacher, labels, temperature, alpha)
    plain = [
        plain_loss(s, t, int(y), temperature, alpha)
        for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist())
    ]
    # float32 logits of about 10 / 0.5 lose 2e-6 absolute, times T² = 16
    torch.testing.assert_close(loss, torch.tensor(plain), rtol=1e-4, atol=5e-5)


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.4, 1.0]))
def test_gradient_equals_autograd(seed, temperature, alpha):
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in logits_of(seed))
    student.requires_grad_()
    autograd_loss(student, teacher, labels, temperature, alpha).sum().backward()
    _, gradient = loss_and_gradient(student.detach(), teacher, labels, temperature, alpha)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-9, atol=1e-12)


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
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_distribution_does_not_diverge_from_itself(seed, temperature):
    student, teacher, labels = logits_of(seed)
    assert kl_divergence(student, student, temperature).tolist() == [0.0] * 5
    loss, gradient = loss_and_gradient(student, student, labels, temperature, 1.0)
    assert not loss.any() and not gradient.any()
    assert (kl_divergence(student, teacher, temperature) > 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_heads_equal_the_whole_backward(chunk):
    generator = torch.Generator().manual_seed(0)
    x, body, target = (torch.randn(*s, generator=generator).double() for s in [(7, 4), (4, 6), (7, 6)])
    W, V = (torch.randn(11, 6, generator=generator).double() for _ in range(2))
    labels = torch.randint(11, (7,), generator=generator)
    body.requires_grad_()
    W.requires_grad_()
    whole = autograd_loss(x @ body @ W.T, target @ V.T, labels, 2.0, 0.5).sum()
    expected = torch.autograd.grad(whole / 7, [body, W])
    total = backward_through_heads(
        x @ body, target, lambda h: h @ W.T, lambda h: h @ V.T, labels, 2.0, 0.5, scale=1 / 7, chunk=chunk
    )
    # the loss itself is computed in float32
    assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    for found, plain in zip([body.grad, W.grad], expected):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_a_non_finite_loss_leaves_the_body_without_gradient():
    hidden = torch.ones(2, 3, requires_grad=True)
    W = torch.full((4, 3), torch.nan)
    total = backward_through_heads(
        hidden, hidden.detach(), lambda h: h @ W.T, lambda h: h @ W.T, torch.tensor([0, 1]), 1.0, 0.5
    )
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
