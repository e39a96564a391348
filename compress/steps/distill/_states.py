"""Hidden states along a network's blocks, the maps between two networks' states, and the loss that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.numerics.distillation import backward_through_heads
from compress.steps.distill import _parallel as parallel
from compress.steps.distill._lessons import Reading
from compress.steps.distill._network import Network
from compress.steps.distill._relations import Relating

if TYPE_CHECKING:
    from compress.model import Model

SMALLEST = 1e-6  # square of a state's norm that an error is divided by: a state of zero stays finite
DAMPENING = 1e-3  # of the least squares, relative to the mean square of a channel


@dataclass
class States:
    """The outputs of some blocks at the last forward pass, watched while the context is open.

    blocks: their numbers, repeated where several ask for one.
    """

    model: Model
    blocks: Sequence[int]
    _last: dict[int, Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> States:
        """Begin to watch."""
        stem = self.model.facts.architecture.blocks
        for block in sorted(set(self.blocks)):
            module = self.model.module.get_submodule(f"{stem}.{block}")
            self._hooks.append(module.register_forward_hook(self._keep(block)))
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._last.clear()

    def take(self) -> list[Tensor]:
        """The states of the one window that was read last, (length, width) float32 each, in the blocks' order."""
        found = [self._last[block][0].float() for block in self.blocks]
        self._last.clear()
        return found

    def _keep(self, block: int) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            self._last[block] = output if isinstance(output, Tensor) else output[0]

        return hook


def relative_error(states: Tensor, target: Tensor) -> Tensor:
    """‖h − t‖² / ‖t‖² per token: (tokens, width) twice → (tokens,).

    >>> relative_error(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]])).tolist()
    [0.25]
    """
    size = target.square().sum(dim=-1).clamp(min=SMALLEST)
    return (states - target).square().sum(dim=-1) / size


@torch.no_grad()
def fitted_projections(
    name: str, student: Network, own: States, teacher: Network, theirs: States, windows: Sequence[Tensor]
) -> dict[str, nn.Parameter]:
    """A matrix P (teacher's width, student's width) per pair of states, of least relative error on the windows.

    Ridge regression in float64, each token weighted by 1 / ‖t‖². Raises NumericalError, with the step's name, where
    states are not finite.
    """
    grams: list[Tensor] = []
    crossed: list[Tensor] = []
    for window in windows:
        student.hidden(window)
        teacher.hidden(window)
        for i, (h, t) in enumerate(zip(own.take(), theirs.take(), strict=True)):
            h, t = h.double(), t.double()
            weighted = h / t.square().sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
            if i == len(grams):
                grams.append(torch.zeros(h.shape[1], h.shape[1], dtype=torch.double))
                crossed.append(torch.zeros(h.shape[1], t.shape[1], dtype=torch.double))
            grams[i] += weighted.T @ h
            crossed[i] += weighted.T @ t
    found = {}
    for i, (gram, cross) in enumerate(zip(grams, crossed, strict=True)):
        if not bool(torch.isfinite(gram.sum() + cross.sum())):
            raise NumericalError(f"{name}: hidden states on the selection data are not finite (block {own.blocks[i]})")
        gram.diagonal().add_(DAMPENING * float(gram.diagonal().mean()))
        found[f"projection {i}"] = nn.Parameter(torch.linalg.solve(gram, cross).T.float().contiguous())
    return found


@dataclass(frozen=True)
class Matching:
    """A reading, and `weight` times the mean relative error of the student's states against the teacher's.

    projections: one per pair of states, or none where widths agree. relating: a loss on attention besides.
    """

    reading: Reading
    own: States
    theirs: States
    projections: Sequence[nn.Parameter]
    weight: float
    relating: Relating | None = None

    def backward(self, student: Network, windows: Sequence[Tensor]) -> float:
        """See `Lesson`."""
        positions = parallel.total(sum(len(window) - 1 for window in windows))
        total = 0.0
        for window in windows:
            of_block = self.reading.loss(window)
            hidden = student.hidden(window)[:-1]
            beside = self.weight * self.error(self.own.take(), self.theirs.take())
            if self.relating is not None:
                beside = beside + self.relating.error()
            total += backward_through_heads(hidden, student.head, of_block, 1 / positions, beside=beside)
        return total / positions

    def error(self, own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The error summed over all scored positions, and averaged over the pairs."""
        if self.projections:
            own = [h @ P.T for h, P in zip(own, self.projections, strict=True)]
        errors = [relative_error(h[:-1], t[:-1]).sum() for h, t in zip(own, theirs, strict=True)]
        return torch.stack(errors).mean()
