"""Sequences that a network writes after prompts: many rows at once, through the key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.products import working_products
from compress.steps.distill._network import Network


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per row, (rows,), drawn from softmax(logits / temperature); the likeliest at temperature 0.

    logits: (rows, vocabulary) float32. Raises NumericalError where they are not finite.
    """
    if not bool(torch.isfinite(logits.sum())):
        raise NumericalError("the logits of the model that writes are not finite")
    if temperature == 0:
        return logits.argmax(dim=1)
    drawn: Tensor = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
    return drawn[:, 0]


@torch.no_grad()
def write(
    network: Network,
    prompts: Sequence[Tensor],
    new_tokens: int,
    temperature: float,
    ends: Collection[int],
    generator: torch.Generator,
) -> list[Tensor]:
    """Each prompt with what the network writes after it: up to `new_tokens`, or up to and including one of `ends`.

    prompts: of equal length, so that no row needs padding. Rows that have ended leave the batch.
    """
    rows = torch.stack(list(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))
    # One block for all tokens: autocast converts the weights that learn once, not at every token.
    with working_products():
        logits, cache = network.read(rows, None)
        for left in range(new_tokens - 1, -1, -1):
            tokens = choose(logits, temperature, generator)
            for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                written[row].append(token)
            going = torch.tensor([token not in ends for token in tokens.tolist()])
            if not left or not going.any():
                break
            if not going.all():
                alive, tokens = alive[going], tokens[going]
                cache.batch_select_indices(going.nonzero()[:, 0])
            logits, cache = network.read(tokens[:, None], cache)
    return [torch.cat([prompt, torch.tensor(own)]) for prompt, own in zip(prompts, written, strict=True)]
