"""Where in a model an error arises: each linear's output against that of the baseline, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import RecipeError
from compress.interfaces import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

VERSION = 1  # raised when results change: it is part of the key under which they are kept
WINDOWS = 4
TOKENS = 128  # per window


def layer_errors(
    model: Model, baseline: Model, windows: Sequence[Tensor], progress: Progress = lambda label, fraction: None
) -> dict[str, float]:
    """Relative squared error ‖y − y'‖² / ‖y‖² of the output of every linear in the blocks, by name.

    y: outputs of the baseline, y': of the model, over all positions of all windows, (tokens,) int64 each. Each
    model runs on its own activations, so that errors of earlier layers are part of those of later ones, as they
    are in use. A linear with another number of outputs than the baseline's is left out: nothing compares.

    Products run in float32 whatever the recipe's dtype is, sums in float64. Beside the models, the baseline's
    outputs for one window are in memory: about tokens / in_features of the size of its weights.
    Raises RecipeError without a window.
    """
    if not windows:
        raise RecipeError("layer errors need a window of tokens, and there is none")
    ours, theirs = model.facts.linears, baseline.facts.linears
    names = [name for name, (outputs, _) in theirs.items() if name in ours and ours[name][0] == outputs]
    error, energy = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    expected: dict[str, Tensor] = {}

    def keep(name: str, y: Tensor) -> None:
        expected[name] = y.clone()  # what follows may change it in place

    def compare(name: str, y: Tensor) -> None:
        reference = expected.pop(name)
        error[name] += _squared(reference - y)
        energy[name] += _squared(reference)

    for i, window in enumerate(windows):
        _run(baseline, window, names, keep)
        _run(model, window, names, compare)
        progress("layers", (i + 1) / len(windows))
    return {name: _ratio(error[name], energy[name]) for name in names}


def _run(model: Model, window: Tensor, names: Sequence[str], callback: Callable[[str, Tensor], None]) -> None:
    """One forward pass, without the head; the outputs of the named modules go to the callback."""
    import torch

    def hook(name: str) -> Callable[..., None]:
        def report(module: Any, inputs: Any, output: Tensor) -> None:
            callback(name, output)

        return report

    hooks = [model.module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with torch.inference_mode():
            model.read(window)
    finally:
        for handle in hooks:
            handle.remove()


def _squared(y: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2


def _ratio(error: float, energy: float) -> float:
    """Nothing lost of nothing is no error; something instead of nothing is an infinite one."""
    if energy == 0:
        return 0.0 if error == 0 else math.inf
    return error / energy
