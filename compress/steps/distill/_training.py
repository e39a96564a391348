"""The descent that steps which learn from the baseline share, and the choice among the states along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.numerics.adam import LeanAdam
from compress.numerics.distillation import divergence_through_heads, warm_cosine
from compress.numerics.products import working_type
from compress.steps.distill import _parallel as parallel
from compress.steps.distill._checkpoints import CHECKPOINT, Course, Journal, read, restore
from compress.steps.distill._fields import Distillation
from compress.steps.distill._lessons import Lesson
from compress.steps.distill._network import Network, apply_masks

BETAS = (0.9, 0.95)  # Adam's, as usual for language models of few steps


@dataclass
class Learner:
    """What is trained: a student, its parameters with the peak of their learning rates, and its masks.

    gather: called when the gradients of a step are complete, before they are clipped. settle: called whenever the
    parameters have changed, before the student runs again.
    """

    student: Network
    parameters: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    masks: Mapping[str, Tensor]
    gather: Callable[[], None] = lambda: None
    settle: Callable[[], None] = lambda: None

    def changed(self) -> None:
        """Let the student follow its parameters."""
        self.settle()
        self.student.refresh()


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
    folder: Path,
) -> Outcome:
    """Train, and leave the learner in the state of least KL by the ruler, the starting one included.

    batches: the windows of each optimizer step. folder: for states and checkpoints; a fitting checkpoint found there
    is where training goes on.
    """
    optimizer = _optimizer(step, learner, context.seed)
    settings = f"{step.name} {step.version} {context.seed} {len(batches)} {step.model_dump_json()}"
    journal = Journal(folder, settings, learner.parameters, optimizer, lesson)
    course = journal.resume()
    if course is None:
        before = ruler.divergence(learner.student)
        course = Course(before, before)
        journal.keep(0)
    learner.changed()
    due = {len(batches) * (i + 1) // step.checks for i in range(step.checks)}
    try:
        for taken in optimize(step, learner, lesson, batches, context, optimizer, course.taken):
            course.taken = taken
            if taken in due:
                course.fruitless += 1
                if (now := ruler.divergence(learner.student)) < course.best:
                    course.best, course.kept, course.fruitless = now, taken, 0
                    journal.keep(taken)
            if course.fruitless == step.patience:
                break
            if taken % step.save_steps == 0 and context.work is not None:
                journal.checkpoint(course)
    except NumericalError as error:
        raise NumericalError(f"{error}{_left(folder, context)}") from error
    restore(folder, course.kept, learner.parameters)
    learner.changed()
    return Outcome(course.before, course.best, course.kept, course.taken, len(batches), ruler.tokens)


def _left(folder: Path, context: Context) -> str:
    """Where the last checkpoint is, in words, for the message of a training that failed."""
    file = folder / CHECKPOINT
    if context.work is None or not file.exists():
        return ""
    return f"; the last good checkpoint, after step {read(file)[1]['course']['taken']}, stays in {file}"


def _optimizer(step: Distillation, learner: Learner, seed: int) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": learner.rates[name]} for name, p in learner.parameters.items()]
    if step.moments == "bfloat16":
        return LeanAdam(groups, betas=BETAS, seed=seed)
    return torch.optim.Adam(groups, betas=BETAS, fused=True)


def optimize(
    step: Distillation,
    learner: Learner,
    lesson: Lesson,
    batches: Sequence[Sequence[Tensor]],
    context: Context,
    optimizer: torch.optim.Optimizer,
    taken: int = 0,
) -> Iterator[int]:
    """Take the optimizer steps after the first `taken`, and yield how many are taken after each."""
    parameters = learner.parameters
    for i, windows in enumerate(batches[taken:], taken):
        optimizer.zero_grad()
        loss = lesson.backward(learner.student, parallel.share(windows))
        learner.gather()
        loss = parallel.combine(parameters.values(), loss)
        apply_masks(learner.masks, {n: p.grad for n, p in parameters.items() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), step.clip)
        if not (loss < float("inf") and bool(torch.isfinite(norm))):
            raise NumericalError(
                f"{step.name}: loss {loss}, gradient norm {float(norm)} at step {i + 1} of {len(batches)}; the model "
                f"keeps the weights from before {step.name}; lower learning_rate"
            )
        factor = warm_cosine(i, len(batches), max(1, len(batches) // 10))
        for group, name in zip(optimizer.param_groups, parameters, strict=True):
            group["lr"] = learner.rates[name] * factor
        optimizer.step()
        apply_masks(learner.masks, parameters)
        learner.changed()
        context.progress(f"step {i + 1}/{len(batches)}, loss {loss:.4f}", (i + 1) / len(batches))
        yield i + 1


class Ruler:
    """Mean KL to the teacher over fixed windows; the teacher runs once. name: of the step, for errors."""

    def __init__(self, name: str, teacher: Network, windows: Sequence[Tensor]):
        self.name, self.windows, self.teacher = name, parallel.share(windows), teacher
        self.tokens = sum(map(len, windows))
        with torch.no_grad():  # the head rounds its input to the working type anyway
            self.targets = [teacher.hidden(window).to(working_type()) for window in self.windows]

    def divergence(self, student: Network) -> float:
        """Nats per token; raises NumericalError if it is not finite."""
        total = 0.0
        with torch.no_grad():
            for window, target in zip(self.windows, self.targets, strict=True):
                hidden = student.hidden(window)
                total += divergence_through_heads(hidden, target, student.head, self.teacher.head)
        total = parallel.total(total)
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
