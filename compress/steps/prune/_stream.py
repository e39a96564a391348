"""One window's way through a model, a block at a time, to see what the logits lose when one of them changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from compress.blocks import enter
from compress.families import Encoder
from compress.numerics.divergence import divergence
from compress.numerics.products import working_products

if TYPE_CHECKING:
    from compress.model import Model


class Stream:
    """The hidden states (1, length, width) of one window (length,) int64 of a model.

    Products are of the working type, which is safe inside a block; the residual stream stays float32.
    """

    def __init__(self, model: Model, window: Tensor):
        architecture = model.facts.architecture
        (self._entering,), arguments = enter(model, [window[None]])
        self._arguments = dict(zip(model.module.get_submodule(architecture.blocks), arguments, strict=True))
        encodes = isinstance(architecture, Encoder)  # whose blocks end in a norm
        self._norm = nn.Identity() if encodes else model.module.get_submodule(architecture.final_norm)
        self._head = model.head

    def states(self, blocks: Sequence[nn.Module]) -> list[Tensor]:
        """Those that enter each of the blocks, and those that leave the last."""
        found = [self._entering]
        for block in blocks:
            found.append(self.through([block], found[-1]))
        return found

    def through(self, blocks: Iterable[nn.Module], states: Tensor) -> Tensor:
        """What leaves the last of the blocks."""
        for block in blocks:
            with working_products():
                states = self._arguments[block].call(block, states)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Logits (length, vocabulary), or (1, classes), float32 of the states that leave the last block."""
        with working_products():
            logits: Tensor = self._head(self._norm(states))[0].float()
        return logits

    def divergence(self, reference: Tensor, states: Tensor) -> float:
        """Sum of KL(reference‖model) in nats over rows of logits, given the states that leave the last block."""
        return float(divergence(reference, self.logits(states)).kl.sum())
