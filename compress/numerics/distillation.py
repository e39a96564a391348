"""The knowledge-distillation loss, its gradient, and both applied to a language-model head in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

Head = Callable[[Tensor], Tensor]
"""Hidden states (tokens, width) → logits (tokens, vocabulary)."""

LossOfRows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Float32 logits of some rows, and which rows of their block → the loss per token (tokens,) and its gradient, as the
logits."""

Loss = Callable[[slice], LossOfRows]
"""A block of rows → the loss of rows in it; what the whole block needs, a teacher's logits, is computed once."""

Kind = Literal["forward", "reverse", "js"]
"""KL(teacher ‖ student), KL(student ‖ teacher), or the Jensen–Shannon divergence."""

NOTHING = -1e4
"""The logarithm of no mass at all: its exponential is 0, and 0 times it is 0, as 0 · −∞ is not."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher/T) ‖ softmax(student/T)) in nats per token: (tokens, vocabulary) → (tokens,).

    >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
    >>> kl_divergence(logits, logits).tolist()
    [0.0]
    """
    log_q = log_softmax(student / temperature, dim=-1)
    log_p = log_softmax(teacher / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def divergence_and_gradient(log_p: Tensor, log_q: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """D(p, q) in nats per row, (tokens,), and ∂D/∂z where q = softmax(z), (tokens, n); both inputs are used up.

    log_p, log_q: (tokens, n) logarithms of the teacher's and the student's probabilities, finite. forward is
    KL(p ‖ q), with ∂/∂z = q − p; reverse is KL(q ‖ p), with q (ln q/p − D); js is ½ KL(p ‖ m) + ½ KL(q ‖ m) with
    m = ½ (p + q), and ½ q (ln q/m − KL(q ‖ m)).
    """
    if kind == "forward":
        p = log_p.exp()
        loss = (p * log_p.sub_(log_q)).sum(dim=-1)
        return loss, log_q.exp_().sub_(p)
    q = log_q.exp()
    if kind == "reverse":
        ratio = log_q.sub_(log_p)
        loss = (q * ratio).sum(dim=-1)
        return loss, ratio.sub_(loss[:, None]).mul_(q)
    p, ratio = log_p.exp(), log_q.sub_(log_p)
    to_p, to_q = math.log(2) - softplus(ratio), math.log(2) - softplus(-ratio)  # ln p/m and ln q/m
    of_q = (q * to_q).sum(dim=-1)
    return 0.5 * ((p * to_p).sum(dim=-1) + of_q), to_q.sub_(of_q[:, None]).mul_(q).mul_(0.5)


def loss_and_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, kind: Kind = "forward"
) -> tuple[Tensor, Tensor]:
    """L = α T² D(p_T, q_T) + (1 − α) CE(labels, q_1) per token, and ∂L/∂student.

    student, teacher: (tokens, vocabulary) float32 logits. labels: (tokens,) ids of the tokens that follow.
    Returns (tokens,) and (tokens, vocabulary). The gradient is written out because autograd would keep
    several copies of the logits: see `divergence_and_gradient`, and ∂CE/∂z = q_1 − onehot(labels).
    Hinton et al. 2015, arXiv:1503.02531: T² keeps the soft gradient's size independent of T.
    """
    loss, known = student.new_zeros(len(student)), None
    if alpha == 0:
        gradient = torch.zeros_like(student)
    else:
        z, t = (student, teacher) if temperature == 1 else (student / temperature, teacher / temperature)
        if kind == "forward":
            (p, log_Z_teacher), (q, log_Z) = _softmax(t), _softmax(z)
            soft = torch.linalg.vecdot(p, t - z) - log_Z_teacher + log_Z
            gradient = q - p
            known = (q, log_Z) if temperature == 1 else None
        else:
            soft, gradient = divergence_and_gradient(log_softmax(t, dim=-1), log_softmax(z, dim=-1), kind)
        loss += alpha * temperature**2 * soft
        gradient.mul_(alpha * temperature)
    _add_cross_entropy(loss, gradient, student, labels, 1 - alpha, known)
    return loss, gradient


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (tokens, n) of logits, and the logarithm of their normalizer, (tokens,)."""
    q = torch.softmax(z, dim=-1)
    return q, z.amax(dim=-1) - q.amax(dim=-1).log()


def top_k_loss_and_gradient(
    student: Tensor, ids: Tensor, log_p: Tensor, labels: Tensor, temperature: float, alpha: float, kind: Kind
) -> tuple[Tensor, Tensor]:
    """`loss_and_gradient` where of the teacher only k tokens are known, and the mass of all others together.

    ids: (tokens, k) distinct. log_p: (tokens, k + 1) at the temperature, the last for all other tokens. D compares
    these k + 1 events, and so is at most the divergence over the vocabulary, and equal to it for k = vocabulary.
    The others share the gradient of their sum in the proportions that the student gives them.
    """
    loss = student.new_zeros(len(student))
    gradient = torch.zeros_like(student)
    if alpha > 0:
        log_q = log_softmax(student / temperature, dim=-1)
        rest = log_q.scatter(1, ids, -math.inf).logsumexp(dim=1, keepdim=True).clamp_(min=NOTHING)
        events = torch.cat([log_q.gather(1, ids), rest], dim=1)
        soft, of_events = divergence_and_gradient(log_p.clone(), events, kind)
        loss += alpha * temperature**2 * soft
        gradient = log_q.sub_(rest).exp_().mul_(of_events[:, -1:]).scatter_(1, ids, of_events[:, :-1])
        gradient.mul_(alpha * temperature)
    _add_cross_entropy(loss, gradient, student, labels, 1 - alpha)
    return loss, gradient


def _add_cross_entropy(
    loss: Tensor,
    gradient: Tensor,
    student: Tensor,
    labels: Tensor,
    weight: float,
    known: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add weight · CE(labels, softmax(student)) and its gradient, in place. known: `_softmax` of the student."""
    if weight > 0:
        q, log_Z = known or _softmax(student)
        loss += weight * (log_Z - student.gather(1, labels[:, None])[:, 0])
        gradient.add_(q, alpha=weight)
        gradient[torch.arange(len(labels)), labels] -= weight


def backward_through_heads(
    hidden: Tensor,
    head: Head,
    loss: Loss,
    scale: float = 1.0,
    chunk: int = 16,
    beside: Tensor | None = None,
    block: int = 512,
) -> float:
    """Sum of the loss over tokens; accumulates `scale` times its gradient behind `hidden` and in the head.

    hidden: (tokens, width). Logits of at most `block` tokens exist at any time, in the head's dtype, and of `chunk` in
    float32, few enough for a processor's cache: a chunk's gradient takes the place of its logits, a block's goes into a
    detached copy of the hidden states and into the head, and the body's backward runs once at the end. beside: a sum of
    another loss over the same tokens with a graph of its own, added and scaled alike. Nothing is accumulated in the
    body if the sum is not finite: the caller sees it and stops.
    """
    leaf = hidden.detach().requires_grad_()
    total = 0.0 if beside is None else float(beside.detach())
    for start in range(0, len(hidden), block):
        rows = range(start, min(start + block, len(hidden)))
        logits = head(leaf[rows.start : rows.stop])
        gradient = logits.detach()  # the same memory: no backward of a linear reads its output
        with torch.no_grad():
            of_rows = loss(slice(rows.start, rows.stop))
        for at in range(0, len(rows), chunk):
            part = slice(at, min(at + chunk, len(rows)))
            place = gradient[part]
            with torch.no_grad():
                losses, own = of_rows(place.float(), part)
                place.copy_(own * scale)
            total += float(losses.double().sum())
        torch.autograd.backward(logits, gradient)
    if hidden.requires_grad and math.isfinite(total):
        roots, gradients = [hidden], [leaf.grad]
        if beside is not None:
            roots.append(beside)
            gradients.append(torch.full_like(beside, scale))
        torch.autograd.backward(roots, gradients)
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
