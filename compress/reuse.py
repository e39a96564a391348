"""Memory that tensors of the same shapes follow each other in, block after block.

What a walk keeps for a while is made anew in every block. Memory that goes back to the kernel between has its pages
zeroed the next time, and what stays with the process has holes where the one block's tensors lay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Reuse:
    """Tensors that are needed no more, for those that come."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    @torch.inference_mode()
    def take(self, X: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of X in that type, in the memory of a tensor like it where there is one."""
        free = self._free.get((X.shape, dtype))
        return (free.pop() if free else torch.empty(X.shape, dtype=dtype)).copy_(X)

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Let others have the memory of tensors that came from `take`, and that nobody reads any more."""
        for X in tensors:
            self._free.setdefault((X.shape, X.dtype), []).append(X)

    def clear(self) -> None:
        """Let go of what was given."""
        self._free.clear()


@torch.inference_mode()
def replaced(old: Tensor, new: Tensor) -> Tensor:
    """`new` in the memory of `old`, which is needed no more, where they are of one type and it fits."""
    if old.dtype != new.dtype or old.numel() < new.numel() or not old.is_contiguous():
        return new
    return old.view(-1)[: new.numel()].view(new.shape).copy_(new)


class Products(Sequence[Tensor]):
    """A linear's products over known inputs, each computed when it is first asked for, in place of its input."""

    def __init__(self, linear: nn.Linear, inputs: Sequence[Tensor]):
        self._linear, self._held = linear, list(inputs)
        self._found: set[int] = set()

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, batch: Any) -> Any:
        if batch not in self._found:
            self._held[batch] = replaced(self._held[batch], self._linear(self._held[batch]))
            self._found.add(batch)
        return self._held[batch]
