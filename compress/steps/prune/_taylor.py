"""First-order Taylor importance: how much the loss would change without a channel, from its gradient."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.errors import NumericalError
from compress.numerics.affine import finite
from compress.numerics.products import working_products

if TYPE_CHECKING:
    from compress.interfaces import Progress
    from compress.model import Model


def taylor_scores(
    model: Model,
    windows: Sequence[Tensor],
    linear: str,
    size: int,
    progress: Progress = lambda label, fraction: None,
    seed: int = 0,
) -> list[Tensor]:
    """Σ_t |Σ_c x_tc ∂L/∂x_tc| per block, (m / size,) float32: c runs over `size` neighbouring input channels.

    linear: its name within a block. L: cross-entropy of the next token, summed over the tokens t of the windows,
    (tokens,) int64 each; a classifier's, of a class per window, which is drawn by seed from the probabilities that the
    model gives, as for the Fisher matrix (Martens 2020, arXiv:1412.1193): labels are not known. Matrix products and
    their gradients are of the working type, and no weight gets a gradient.
    Raises NumericalError naming the block or the linear where states or gradients are not finite.
    Molchanov et al. 2017, arXiv:1611.06440, eq. 8; the absolute value is taken per token, not per window.
    """
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    scores = [torch.zeros(block.get_submodule(linear).in_features // size) for block in blocks]
    with closing(gradients(model, windows, linear, progress, seed)) as found:
        for index, X, gradient in found:
            change = (X * gradient).view(-1, len(scores[index]), size).sum(dim=2)
            scores[index] += change.abs().sum(dim=0)
    return scores


def gradients(
    model: Model, windows: Sequence[Tensor], linear: str, progress: Progress, seed: int, of_output: bool = False
) -> Generator[tuple[int, Tensor, Tensor]]:
    """Per window and block: its index, the inputs of a linear (tokens, m) float32, and the loss's gradient by them.

    of_output: outputs (tokens, n) instead of inputs. Products and arguments as in `taylor_scores`.
    """
    name, generator = model.facts.architecture.blocks, torch.Generator().manual_seed(seed)
    watched: dict[int, Tensor] = {}

    def keep(index: int, X: Tensor) -> None:
        if X.requires_grad:  # not where a block is looked for
            X.retain_grad()
            watched[index] = X

    def watch(index: int, module: nn.Module) -> RemovableHandle:
        if of_output:
            return module.register_forward_hook(lambda _, args, out: keep(index, out))
        return module.register_forward_pre_hook(lambda _, args: keep(index, args[0]))

    hooks = [model.module.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())]
    hooks += [watch(i, block.get_submodule(linear)) for i, block in enumerate(model.module.get_submodule(name))]
    try:
        with _frozen(model.module):
            for done, window in enumerate(windows):
                progress("gradients", done / len(windows))
                with torch.inference_mode(False), torch.enable_grad():
                    loss = _loss(model, window.clone(), generator)  # one made without gradients cannot be saved
                    if not finite(loss.detach()):
                        _name_the_block(model, window)
                    loss.backward()  # type: ignore[no-untyped-call]
                for index, X in watched.items():
                    assert X.grad is not None
                    gradient = X.grad.flatten(0, -2).float()
                    if not finite(gradient):
                        raise NumericalError(f"{name}.{index}.{linear}: non-finite gradients")
                    yield index, X.detach().flatten(0, -2).float(), gradient
    finally:
        for hook in hooks:
            hook.remove()


def _name_the_block(model: Model, window: Tensor) -> None:
    """Raise NumericalError for the first block that leaves non-finite states, or for the loss."""
    from compress.blocks import walk

    for block in walk(model, [window]):
        block.advance()
    raise NumericalError("non-finite loss on the calibration data")


def _loss(model: Model, window: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the next token, summed over one window, or of a class drawn from the model's own, in nats."""
    with working_products():
        states = model.module.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0]
        logits = model.head(states)
    if model.labels:
        bounds = logits.detach().float().softmax(dim=-1).cumsum(dim=-1)[:, :-1]
        drawn = (bounds < torch.rand(1, generator=generator)).sum(dim=-1)
        return nn.functional.cross_entropy(logits.float(), drawn)
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
