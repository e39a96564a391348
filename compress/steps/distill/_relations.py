"""Queries, keys and values of some blocks, and the loss that compares how each token's relate to those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.numerics.relations import relation_divergence

if TYPE_CHECKING:
    from compress.architectures import Facts
    from compress.model import Model

KINDS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Projected:
    """Queries, keys and values, before any rotation, of blocks at the last forward pass, while the context is open."""

    model: Model
    blocks: Sequence[int]
    _last: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> Projected:
        """Begin to watch."""
        for block in sorted(set(self.blocks)):
            for kind in KINDS:
                module = self.model.module.get_submodule(_linear(self.model.facts, block, kind))
                self._hooks.append(module.register_forward_hook(self._keep(block, kind)))
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._last.clear()

    def take(self) -> list[Tensor]:
        """Those of the one window that was read last, (length, width) float32 each, block by block and kind by kind."""
        found = [self._last[block, kind][0].float() for block in self.blocks for kind in KINDS]
        self._last.clear()
        return found

    def _keep(self, block: int, kind: str) -> Any:
        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            self._last[block, kind] = output

        return hook


@dataclass(frozen=True)
class Relating:
    """`weight` times the divergence of relations, averaged over blocks and kinds."""

    own: Projected
    theirs: Projected
    heads: int
    weight: float

    def error(self) -> Tensor:
        """Of the last window, summed over its scored positions."""
        pairs = zip(self.own.take(), self.theirs.take(), strict=True)
        errors = [relation_divergence(a, b.detach(), self.heads)[:-1].sum() for a, b in pairs]
        return self.weight * torch.stack(errors).mean()


def relation_heads(name: str, wanted: int | None, student: Facts, teacher: Facts) -> int:
    """Their number, by default the baseline's of keys and values; raises RecipeError where it divides a width badly."""
    heads = teacher.kv_heads if wanted is None else wanted
    for who, facts in (("model", student), ("baseline", teacher)):
        for kind in KINDS:
            width = facts.linears[_linear(facts, 0, kind)][0]
            if width % heads:
                raise RecipeError(
                    f"{name}: relation_heads={heads} does not divide the {width} channels of the {who}'s {kind}; "
                    f"choose a divisor of all widths"
                )
    return heads


def _linear(facts: Facts, block: int, kind: str) -> str:
    return f"{facts.architecture.blocks}.{block}.{facts.architecture.attention}.{kind}"
