"""The descent that steps which learn from the baseline share, and the choice among the states along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.numerics.distillation import divergence_through_heads, warm_cosine
from compress.steps.distill._fields import Distillation
from compress.steps.distill._lessons import Lesson
from compress.steps.distill._network import Network, apply_masks, restore, snapshot


@dataclass
class Learner:
    """What is trained: a student, its parameters with the peak of their learning rates, and its masks.

    settle: called whenever the parameters have changed, before the student runs again.
    """

    student: Network
    parameters: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    masks: Mapping[str, Tensor]
    settle: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """KL before and after, in nats per token, and the optimizer step whose state was kept; 0 is the start."""

    before: float
    after: float
    kept: int
    taken: int
    planned: int
    selection_tokens: int

    def __str__(self) -> str:
        """One line for the report."""
        early = "" if self.taken == self.planned else f", stopped at {self.taken}"
        start = " (nothing better than the start was found)" if not self.kept else ""
        return (
            f"KL to the baseline {self.before:.4f} → {self.after:.4f} nats per token on {self.selection_tokens} "
            f"selection tokens; kept those after step {self.kept} of {self.planned}{early}{start}"
        )


def learn(
    step: Distillation,
    learner: Learner,
    lesson: Lesson,
    ruler: Ruler,
    batches: Sequence[Sequence[Tensor]],
    context: Context,
    patience: int | None = None,
) -> Outcome:
    """Train, and leave the learner in the state of least KL by the ruler, the starting one included.

    batches: the windows of each optimizer step. patience: checks in a row without a new best after which training
    ends.
    """
    best = before = ruler.divergence(learner.student)
    kept, taken, values = 0, 0, snapshot(learner.parameters)
    due = {len(batches) * (i + 1) // step.checks for i in range(step.checks)}
    fruitless = 0
    for taken in optimize(step, learner, lesson, batches, context):
        if taken not in due:
            continue
        fruitless += 1
        if (now := ruler.divergence(learner.student)) < best:
            best, kept, values, fruitless = now, taken, snapshot(learner.parameters), 0
        if fruitless == patience:
            break
    restore(learner.parameters, values)
    learner.settle()
    return Outcome(before, best, kept, taken, len(batches), ruler.tokens)


def optimize(
    step: Distillation, learner: Learner, lesson: Lesson, batches: Sequence[Sequence[Tensor]], context: Context
) -> Iterator[int]:
    """Take the optimizer steps, and yield how many are taken after each."""
    parameters = learner.parameters
    peaks = [learner.rates[name] for name in parameters]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters.values(), peaks, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    for i, windows in enumerate(batches):
        optimizer.zero_grad()
        loss = lesson.backward(learner.student, windows)
        apply_masks(learner.masks, {n: p.grad for n, p in parameters.items() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), step.clip)
        if not (loss < float("inf") and bool(torch.isfinite(norm))):
            raise NumericalError(
                f"{step.name}: loss {loss}, gradient norm {float(norm)} at step {i + 1} of {len(batches)}; the model "
                f"keeps the weights from before {step.name}; lower learning_rate"
            )
        factor = warm_cosine(i, len(batches), max(1, len(batches) // 10))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.step()
        apply_masks(learner.masks, parameters)
        learner.settle()
        context.progress(f"step {i + 1}/{len(batches)}, loss {loss:.4f}", (i + 1) / len(batches))
        yield i + 1


class Ruler:
    """Mean KL to the teacher over fixed windows; the teacher runs once. name: of the step, for errors."""

    def __init__(self, name: str, teacher: Network, windows: Sequence[Tensor]):
        self.name, self.windows, self.teacher = name, windows, teacher
        self.tokens = sum(map(len, windows))
        with torch.no_grad():  # the head rounds its input to bfloat16 anyway
            self.targets = [teacher.hidden(window).bfloat16() for window in windows]

    def divergence(self, student: Network) -> float:
        """Nats per token; raises NumericalError if it is not finite."""
        total = 0.0
        with torch.no_grad():
            for window, target in zip(self.windows, self.targets, strict=True):
                hidden = student.hidden(window)
                total += divergence_through_heads(hidden, target, student.head, self.teacher.head)
        if not total < float("inf"):
            raise NumericalError(f"{self.name}: the divergence on the selection data is {total}")
        return total / self.tokens


def plan_batches(
    name: str, windows: Sequence[Tensor], tokens: int, batch: int, seed: int, given: int = 1
) -> list[list[Tensor]]:
    """Windows of each optimizer step: seeded shuffles of all windows, one after another, up to `tokens`.

    given: leading tokens of each window that are not scored. The last window is cut to fit the budget; a rest of
    no more than `given` tokens, in which nothing is scored, is left unused.
    """
    generator = torch.Generator().manual_seed(seed)
    usable = [window for window in windows if len(window) > given]
    if not usable:
        raise RecipeError(
            f"{name}: none of {len(windows)} calibration windows is longer than {given} token{'s'[: given > 1]}; "
            "raise the length of data.calibration"
        )
    order: list[Tensor] = []
    left = tokens
    while left > given:
        for i in torch.randperm(len(usable), generator=generator).tolist():
            if left > given:
                order.append(usable[i][:left])
                left -= len(order[-1])
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def first(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The leading windows, the last one cut, that hold `tokens` together (or all there are)."""
    chosen: list[Tensor] = []
    for window in windows:
        if tokens > 0:
            chosen.append(window[:tokens])
            tokens -= len(chosen[-1])
    return chosen
