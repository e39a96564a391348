"""The knowledge-distillation loss, its gradient, and both applied to a language-model head in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

Head = Callable[[Tensor], Tensor]
"""Hidden states (tokens, width) → logits (tokens, vocabulary)."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher/T) ‖ softmax(student/T)) in nats per token: (tokens, vocabulary) → (tokens,).

    >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
    >>> kl_divergence(logits, logits).tolist()
    [0.0]
    """
    log_q = log_softmax(student / temperature, dim=-1)
    log_p = log_softmax(teacher / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def loss_and_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """L = α T² KL(p_T ‖ q_T) + (1 − α) CE(labels, q_1) per token, and ∂L/∂student.

    student, teacher: (tokens, vocabulary) float32 logits. labels: (tokens,) ids of the tokens that follow.
    Returns (tokens,) and (tokens, vocabulary). The gradient is written out because autograd would keep
    several copies of the logits: ∂(T² KL)/∂z = T (q_T − p_T), ∂CE/∂z = q_1 − onehot(labels).
    Hinton et al. 2015, arXiv:1503.02531: T² keeps the soft gradient's size independent of T.
    """
    loss = student.new_zeros(len(student))
    gradient = torch.zeros_like(student)
    if alpha > 0:
        log_q = log_softmax(student / temperature, dim=-1)
        log_p = log_softmax(teacher / temperature, dim=-1)
        p = log_p.exp()
        loss += alpha * temperature**2 * (p * log_p.sub_(log_q)).sum(dim=-1)
        gradient = log_q.exp_().sub_(p).mul_(alpha * temperature)
    if alpha < 1:
        log_q = log_softmax(student, dim=-1)
        loss -= (1 - alpha) * log_q.gather(1, labels[:, None])[:, 0]
        gradient.add_(log_q.exp_(), alpha=1 - alpha)
        gradient[torch.arange(len(labels)), labels] -= 1 - alpha
    return loss, gradient


def backward_through_heads(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    teacher_head: Head,
    labels: Tensor,
    temperature: float,
    alpha: float,
    scale: float = 1.0,
    chunk: int = 128,
) -> float:
    """Sum of the loss over tokens; accumulates `scale` times its gradient behind `hidden` and in the head.

    hidden, teacher_hidden: (tokens, width). At most `chunk` tokens' logits exist at any time: each chunk's
    gradient goes into a detached copy of the hidden states, and the body's backward runs once at the end.
    Nothing is accumulated in the body if the sum is not finite: the caller sees it and stops.
    """
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        logits = head(leaf[rows])
        with torch.no_grad():
            target = teacher_head(teacher_hidden[rows]).float()
            loss, gradient = loss_and_gradient(logits.float(), target, labels[rows], temperature, alpha)
        torch.autograd.backward(logits, (gradient * scale).to(logits.dtype))
        total += float(loss.double().sum())
    if hidden.requires_grad and torch.isfinite(torch.tensor(total)):
        torch.autograd.backward(hidden, leaf.grad)
    return total


@torch.no_grad()
def divergence_through_heads(
    hidden: Tensor, teacher_hidden: Tensor, head: Head, teacher_head: Head, chunk: int = 128
) -> float:
    """Sum over tokens of KL(teacher ‖ student) in nats, with `chunk` tokens' logits at a time."""
    total = 0.0
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        student, teacher = head(hidden[rows]).float(), teacher_head(teacher_hidden[rows]).float()
        total += float(kl_divergence(student, teacher).double().sum())
    return total


def warm_cosine(step: int, steps: int, warm_up: int) -> float:
    """Factor of the learning rate at `step` of `steps`: linear over `warm_up` steps, then half a cosine.

    >>> [round(warm_cosine(s, 5, 1), 3) for s in range(5)]
    [1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
