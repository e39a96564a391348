"""Which blocks a model misses least: by how they turn the hidden state, or by what the logits lose without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.products import working_products
from compress.steps.prune._stream import Stream

if TYPE_CHECKING:
    from compress.interfaces import Progress
    from compress.model import Model


def block_influence(
    model: Model, windows: Sequence[Tensor], progress: Progress = lambda label, fraction: None, batch: int = 8
) -> list[float]:
    """1 − E[cos(x, y)] of each block over all tokens of the windows, (length,) int64 each.

    Raises NumericalError naming the first block where it is not finite.
    Men et al. 2024, arXiv:2403.03853, eq. 1.
    """
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    totals = [0.0] * len(blocks)

    def compare(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, y = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        totals[index] += float(torch.cosine_similarity(x.float(), y.float(), dim=-1).sum(dtype=torch.float64))

    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, out, i=i: compare(i, args, kwargs, out), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        with torch.inference_mode(), working_products():
            for start in range(0, len(windows), batch):
                progress("block influence", start / len(windows))
                model.module.base_model(input_ids=torch.stack(list(windows[start : start + batch])), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    influence = [1 - total / sum(map(len, windows)) for total in totals]
    _require_finite(model, influence)
    return influence


@torch.inference_mode()
def by_divergence(
    model: Model, windows: Sequence[Tensor], count: int, progress: Progress = lambda label, fraction: None
) -> list[tuple[int, float]]:
    """Greedily, `count` times, the block whose removal leaves the smallest mean KL to the whole model's logits.

    Returns their positions in the order in which they go, each with the KL in nats per token once it is gone, or of a
    classifier per window. Among equals the later block goes. windows: (tokens,) int64 each; the cost is half a forward
    pass per block and removal. Raises NumericalError naming the first block without which the KL is not finite.
    """
    blocks = list(model.module.get_submodule(model.facts.architecture.blocks))
    left = list(range(len(blocks)))
    gone: list[tuple[int, float]] = []
    rows = len(windows) if model.labels else sum(map(len, windows))
    reference = [Stream(model, window).states(blocks)[-1] for window in windows]
    for _ in range(count):
        totals = [0.0] * len(left)
        for done, (window, final) in enumerate(zip(windows, reference, strict=True)):
            progress(f"removal {len(gone) + 1}/{count}", done / len(windows))
            stream, there = Stream(model, window), [blocks[i] for i in left]
            wanted, entering = stream.logits(final), stream.states(there)
            for k in range(len(left)):
                totals[k] += stream.divergence(wanted, stream.through(there[k + 1 :], entering[k]))
        means = [total / rows for total in totals]
        _require_finite(model, means, left)
        _, k = min((mean, -k) for k, mean in enumerate(means))
        gone.append((left.pop(-k), means[-k]))
    return gone


def _require_finite(model: Model, values: Sequence[float], positions: Sequence[int] | None = None) -> None:
    if odd := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        block = f"{model.facts.architecture.blocks}.{odd[0] if positions is None else positions[odd[0]]}"
        raise NumericalError(f"{block}: non-finite hidden states on calibration data")
