"""What a decoder's linears read of the residual stream, and a decoder with fewer of its channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.blocks import Block, walk
from compress.numerics.hessian import Hessian
from compress.numerics.neurons import channel_scores, with_constant
from compress.steps.prune._structure import select_axis, select_channels

if TYPE_CHECKING:
    from compress.interfaces import Progress
    from compress.model import Model


@dataclass
class Reading:
    """A norm of the residual stream and the linears that read it, over the calibration tokens.

    free: the readers' weights may change (those of a head tied to the embedding may not). biased: some of them have a
    bias. hessian: second moments of the normed states, where biased with a constant channel behind them. energy:
    (residual,) E[x_j² / mean(x²)] of the states before the norm.
    """

    norm: str
    readers: tuple[str, ...]
    free: bool
    biased: bool
    hessian: Hessian
    energy: Tensor

    def add(self, x: Tensor, normed: Tensor) -> None:
        """Tokens before and after the norm, (tokens, residual) each; `energy` is a sum until `readings` returns."""
        self.hessian.add(with_constant(normed) if self.biased else normed)
        self.energy += (x.square() / x.square().mean(dim=1, keepdim=True)).sum(dim=0)


@torch.inference_mode()
def readings(model: Model, windows: Sequence[Tensor], progress: Progress) -> list[Reading]:
    """Every norm of the residual stream in order, the last one of the model included; the model as it is."""
    arch = model.facts.architecture
    found: list[Reading] = []
    for block in walk(model, windows, progress):
        prefix = f"{arch.blocks}.{block.index}"
        here = {
            source: _reading(model, f"{prefix}.{source}", [f"{prefix}.{name}" for name in readers])
            for source, readers in arch.folds
            if source in arch.block_norms
        }
        left = _watch(block, here)
        found += here.values()
    last = _reading(model, arch.final_norm, [arch.head], not model.facts.tied)
    norm = model.module.get_submodule(arch.final_norm)
    for states in left:
        last.add(states.flatten(0, -2), norm(states).flatten(0, -2).float())
    found.append(last)
    for reading in found:
        reading.energy /= reading.hessian.tokens
    return found


def _reading(model: Model, norm: str, readers: Sequence[str], free: bool = True) -> Reading:
    """One that has seen no token yet."""
    width = model.facts.sizes["residual"]
    biased = any(model.module.get_submodule(name).bias is not None for name in readers)
    return Reading(norm, tuple(readers), free, biased, Hessian(width + biased, norm), torch.zeros(width))


def _watch(block: Block, here: dict[str, Reading]) -> list[Tensor]:
    """Run a block over its states, and let each of its norms report; returns the states that leave it."""
    hooks = [
        block.module.get_submodule(name).register_forward_hook(
            lambda _, args, out, r=reading: r.add(args[0].flatten(0, -2).float(), out.flatten(0, -2).float())
        )
        for name, reading in here.items()
    ]
    try:
        return block.advance()
    finally:
        for hook in hooks:
            hook.remove()


def worth(model: Model, found: Sequence[Reading]) -> Tensor:
    """Per residual channel, the sum over norms of its share in what their readers take from the stream, (residual,)."""
    width = model.facts.sizes["residual"]
    total = torch.zeros(width)
    for reading in found:
        H = reading.hessian.matrix[:width, :width]
        weights = [model.module.get_submodule(name).weight.detach() for name in reading.readers]
        scores = channel_scores(torch.cat(weights), H)
        total += scores / scores.sum()
    return total


def narrow(model: Model, kept: Tensor) -> None:
    """Keep the residual channels at the positions `kept` everywhere, in place, and say so in the config."""
    arch, tied = model.facts.architecture, model.facts.tied
    embedding, head = model.module.get_input_embeddings(), model.module.get_submodule(arch.head)
    embedding.weight = nn.Parameter(embedding.weight.detach().index_select(1, kept), embedding.weight.requires_grad)
    embedding.embedding_dim = len(kept)
    select_channels(head, kept, 1)
    if tied:
        head.weight = embedding.weight
    _narrow_norm(model.module.get_submodule(arch.final_norm), kept)
    for block in model.module.get_submodule(arch.blocks):
        select_axis(model.facts, block, {"residual": kept})
        for norm in arch.block_norms:
            _narrow_norm(block.get_submodule(norm), kept)
        part: Any  # transformers keeps the width a second time
        for part in block.modules():
            if hasattr(part, "hidden_size"):
                part.hidden_size = len(kept)
    config = model.module.config
    config.head_dim = model.facts.head_size  # no longer hidden_size / num_attention_heads
    config.hidden_size = len(kept)
    model.reshaped()


def _narrow_norm(norm: Any, kept: Tensor) -> None:
    norm.weight = nn.Parameter(norm.weight.detach().index_select(0, kept), norm.weight.requires_grad)
