"""What a student learns from on a batch of windows: a teacher that is asked, or one whose answers were recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.interfaces import Progress
from compress.numerics.distillation import (
    Kind,
    Loss,
    LossOfRows,
    backward_through_heads,
    loss_and_gradient,
    top_k_loss_and_gradient,
)
from compress.numerics.top_k import TopK
from compress.steps.distill import _parallel as parallel
from compress.steps.distill._network import Network
from compress.steps.distill._sampling import write


class Lesson(Protocol):
    """A loss over windows of token ids."""

    def backward(self, student: Network, windows: Sequence[Tensor]) -> float:
        """Mean loss over the windows' scored positions, its gradient accumulated; one window at a time.

        Of several processes that train together, each returns and accumulates its part of the mean over all.
        """


@dataclass(frozen=True)
class Reading:
    """α T² D(teacher, student) + (1 − α) cross-entropy; tokens before `given` are read and not scored."""

    teacher: Network
    temperature: float
    alpha: float
    divergence: Kind = "forward"
    given: int = 1

    def backward(self, student: Network, windows: Sequence[Tensor]) -> float:
        """See `Lesson`."""
        return backward_in_turn(student, windows, self.given, self.loss)

    def loss(self, window: Tensor) -> Loss:
        """The loss of one window; the teacher's head runs over a block of rows at a time."""
        with torch.no_grad():
            target = self.teacher.hidden(window)[self.given - 1 : -1]
        labels = window[self.given :]

        def of_block(block: slice) -> LossOfRows:
            said, following = self.teacher.head(target[block]), labels[block]
            return lambda logits, rows: loss_and_gradient(
                logits, said[rows].float(), following[rows], self.temperature, self.alpha, self.divergence
            )

        return of_block


@dataclass(frozen=True)
class Recording:
    """The same loss against what a teacher said once, by window: the teacher is not needed any more."""

    said: Mapping[bytes, TopK]
    temperature: float
    alpha: float
    divergence: Kind

    @staticmethod
    def key(window: Tensor) -> bytes:
        """What a window is found by: its tokens."""
        return window.numpy().tobytes()

    def backward(self, student: Network, windows: Sequence[Tensor]) -> float:
        """See `Lesson`."""
        return backward_in_turn(student, windows, 1, self.loss)

    def loss(self, window: Tensor) -> Loss:
        """The loss of one window."""
        said, labels = self.said[self.key(window)], window[1:]

        def of_block(block: slice) -> LossOfRows:
            (ids, log_p), following = said.rows(block), labels[block]
            return lambda logits, rows: top_k_loss_and_gradient(
                logits, ids[rows], log_p[rows], following[rows], self.temperature, self.alpha, self.divergence
            )

        return of_block


@dataclass(frozen=True)
class Text:
    """Cross-entropy on the windows as they are, after their first `given` tokens."""

    given: int

    def backward(self, student: Network, windows: Sequence[Tensor]) -> float:
        """See `Lesson`."""
        return backward_in_turn(student, windows, self.given, lambda window: partial(_plain, window[self.given :]))


def _plain(labels: Tensor, block: slice) -> LossOfRows:
    following = labels[block]
    return lambda logits, rows: loss_and_gradient(logits, logits, following[rows], temperature=1.0, alpha=0.0)


def backward_in_turn(student: Network, windows: Sequence[Tensor], given: int, loss: Callable[[Tensor], Loss]) -> float:
    """Mean loss over all positions but the first `given` of each window, its gradient accumulated."""
    positions = parallel.total(sum(len(window) - given for window in windows))
    total = 0.0
    for window in windows:
        of_block = loss(window)
        hidden = student.hidden(window)[given - 1 : -1]
        total += backward_through_heads(hidden, student.head, of_block, scale=1 / positions)
    return total / positions


@torch.no_grad()
def record(
    teacher: Network, windows: Sequence[Tensor], k: int, temperature: float, progress: Progress, chunk: int = 128
) -> dict[bytes, TopK]:
    """What the teacher says at every scored position of the windows, read once each, by `Recording.key`."""
    distinct = {Recording.key(window): window for window in windows}
    said = {}
    for i, (key, window) in enumerate(distinct.items()):
        hidden = teacher.hidden(window)[:-1]
        rows = range(0, len(hidden), chunk)
        said[key] = TopK.join([TopK.of(teacher.head(hidden[at : at + chunk]), k, temperature) for at in rows])
        progress(f"the teacher reads window {i + 1}/{len(distinct)}", (i + 1) / len(distinct))
    return said


@contextmanager
def set_aside(module: Any) -> Iterator[None]:
    """Keep a module's parameters in a temporary file for a while, so that another model can have their memory."""
    from safetensors.torch import load_file, save_file

    parameters = dict(module.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, file)
        for parameter in parameters.values():
            parameter.data = torch.empty(0)
        try:
            yield
        finally:
            for name, value in load_file(file).items():
                parameters[name].data = value


@dataclass
class Writing:
    """A reading of sequences that the student writes after the windows' beginnings, or of the windows themselves.

    share: the probability of the former, drawn per batch. own, others: how many batches were either; written: tokens
    of the former, prompts left out. name: of the step, for errors.
    """

    reading: Reading
    name: str
    share: float
    sampling_temperature: float
    ends: frozenset[int]
    generator: torch.Generator
    own: int = 0
    others: int = 0
    written: int = 0

    def backward(self, student: Network, windows: Sequence[Tensor]) -> float:
        """See `Lesson`."""
        if not float(torch.rand((), generator=self.generator)) < self.share:
            self.others += 1
            return self.reading.backward(student, windows)
        self.own += 1
        given = self.reading.given
        prompts, new_tokens = [window[:given] for window in windows], max(map(len, windows)) - given
        try:
            texts = write(student, prompts, new_tokens, self.sampling_temperature, self.ends, self.generator)
        except NumericalError as error:
            raise NumericalError(f"{self.name}: {error}, at step {self.own + self.others}") from error
        texts = [text[: len(window)] for text, window in zip(texts, windows, strict=True)]
        self.written += sum(len(text) - given for text in texts)
        return self.reading.backward(student, texts)

    def state(self) -> dict[str, Tensor]:
        """The generator's state and the counts."""
        counts = torch.tensor([self.own, self.others, self.written])
        return {"generator": self.generator.get_state(), "counts": counts}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on drawing and counting from there."""
        self.generator.set_state(state["generator"])
        self.own, self.others, self.written = state["counts"].tolist()
