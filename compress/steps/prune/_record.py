"""What every pruning step does with a mask: refuse packed tensors, record it, write the zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import NumericalError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.blocks import Block
    from compress.model import Model
    from compress.numerics.masks import Target


def refuse_encoded(model: Model, tensors: list[str], step: str) -> None:
    """Raise RecipeError if one of the tensors is already stored in an encoding."""
    for name in tensors:
        if name in model.encoded:
            raise RecipeError(
                f"{step}: {name} is already stored as {model.encoded[name].encoding}; prune before quantizing"
            )


def require_finite(scores: Tensor, name: str, step: str) -> Tensor:
    """The scores themselves; raises NumericalError naming the tensor if one is not finite."""
    import torch

    if not torch.isfinite(scores).all():
        raise NumericalError(f"{step}: {name} has non-finite scores (weights or calibration activations)")
    return scores


def record_mask(model: Model, name: str, mask: Tensor) -> None:
    """Zero what the mask drops and remember it; a mask that drops nothing leaves no trace."""
    if bool(mask.all()):
        return
    model.parameter(name).data.masked_fill_(~mask, 0.0)
    model.masks[name] = mask
    model.touch()


def sparsity_notes(model: Model, targets: Mapping[str, Target], step: str) -> list[str]:
    """How many weights the masks drop, and how many groups keep fewer than their pattern says, for the report."""
    total = sum(model.parameter(name).numel() for name in targets)
    zeros = sum(int((~model.masks[name]).sum()) for name in targets if name in model.masks)
    found = [f"{step}: {zeros} of {total} weights in {len(targets)} matrices are pruned ({zeros / total:.2%})"]
    patterns = {name: target for name, target in targets.items() if isinstance(target, tuple)}
    thin = sum(int((model.masks[name].view(-1, m).sum(dim=1) < n).sum()) for name, (n, m) in patterns.items())
    if thin:
        groups = sum(model.parameter(name).numel() // m for name, (_, m) in patterns.items())
        held = f"{thin} of {groups} groups keep fewer weights than their pattern allows"
        found.append(f"{step}: {held}, as an earlier step had pruned more of them")
    return found


def channel_norms(block: Block) -> dict[str, Tensor]:
    """‖X_j‖₂ of each linear's input channels over the calibration, (in_features,) float64, by module name."""
    import torch

    squares: dict[str, Tensor] = {}

    def add(names: tuple[str, ...], X: Tensor) -> None:
        total = X.square().sum(dim=0, dtype=torch.float64)
        for name in names:
            squares[name] = squares[name] + total if name in squares else total

    block.observe(add)
    return {name: total.sqrt() for name, total in squares.items()}
