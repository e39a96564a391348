"""What linears read: the ground that plain versions of calibrated steps stand on, block by block."""

from collections.abc import Iterable

import torch

from compress.model import Model


def windows(count: int) -> list[torch.Tensor]:
    """Random windows of 32 tokens; the steps read 8 at a time."""
    return [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def inputs_of(model: Model, names: Iterable[str], calibration: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of linears, (tokens, channels) float64 each, caught in one plain forward pass."""
    caught: dict[str, torch.Tensor] = {}

    def catch(name: str, x: torch.Tensor) -> None:
        caught[name] = x.double().flatten(0, -2)

    hooks = [
        model.module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: catch(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        model.module(input_ids=torch.stack(calibration))
    for hook in hooks:
        hook.remove()
    return caught
