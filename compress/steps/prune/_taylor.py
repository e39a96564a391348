"""First-order Taylor importance: how much the loss would change without a channel, from its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.numerics.products import working_products

if TYPE_CHECKING:
    from compress.interfaces import Progress
    from compress.model import Model


def taylor_scores(
    model: Model, windows: Sequence[Tensor], linear: str, size: int, progress: Progress = lambda label, fraction: None
) -> list[Tensor]:
    """Σ_t |Σ_c x_tc ∂L/∂x_tc| per block, (m / size,) float32: c runs over `size` neighbouring input channels.

    linear: its name within a block. L: cross-entropy of the next token, summed over the tokens t of the windows,
    (length,) int64 each. Matrix products and their gradients are of the working type, and no weight gets a gradient.
    Raises NumericalError naming the linear where a score is not finite.
    Molchanov et al. 2017, arXiv:1611.06440, eq. 8; the absolute value is taken per token, not per window.
    """
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    scores = [torch.zeros(block.get_submodule(linear).in_features // size) for block in blocks]
    inputs: dict[int, Tensor] = {}

    def keep(index: int, X: Tensor) -> None:
        X.retain_grad()
        inputs[index] = X

    hooks = [model.module.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())]
    hooks += [
        block.get_submodule(linear).register_forward_pre_hook(lambda _, args, i=i: keep(i, args[0]))
        for i, block in enumerate(blocks)
    ]
    try:
        with _frozen(model.module):
            for done, window in enumerate(windows):
                progress("gradients", done / len(windows))
                _loss(model, window).backward()  # type: ignore[no-untyped-call]
                for i, X in inputs.items():
                    assert X.grad is not None
                    change = (X.detach().float() * X.grad.float()).view(-1, len(scores[i]), size).sum(dim=2)
                    scores[i] += change.abs().sum(dim=0)
    finally:
        for hook in hooks:
            hook.remove()
    for i, score in enumerate(scores):
        if not bool(torch.isfinite(score).all()):
            raise NumericalError(f"{model.facts.architecture.blocks}.{i}.{linear}: non-finite gradients")
    return scores


def _loss(model: Model, window: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over one window, in nats."""
    with working_products():
        states = model.module.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0]
        logits = model.head(states)
    return nn.functional.cross_entropy(logits[:-1].float(), window[1:], reduction="sum")


class _frozen:  # noqa: N801 - used as a function
    """No parameter asks for a gradient inside; afterwards each is as it was."""

    def __init__(self, module: nn.Module):
        self._flags = {parameter: parameter.requires_grad for parameter in module.parameters()}

    def __enter__(self) -> None:
        for parameter in self._flags:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
