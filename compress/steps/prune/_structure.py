"""What the steps that remove whole channels or blocks do alike: make tensors smaller, and say so in the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import RecipeError
from compress.families import REMEMBERED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from compress.architectures import Facts
    from compress.families import Architecture
    from compress.interfaces import Context
    from compress.model import Model


def refuse_unready(model: Model, context: Context, step: str) -> None:
    """Raise RecipeError without calibration data, or where masks or codes stand for the present shapes."""
    if not context.calibration:
        raise RecipeError(f"{step} needs calibration data; add data.calibration to the recipe")
    if held := next(iter([*model.encoded, *model.masks]), None):
        how = f"stored as {model.encoded[held].encoding}" if held in model.encoded else "pruned by a mask"
        raise RecipeError(f"{step} changes shapes, and {held} is {how} already; move it to the front of the recipe")


def select_channels(linear: nn.Linear, kept: Tensor, dim: int) -> None:
    """Keep the output (dim 0) or input (dim 1) channels at the positions `kept` of a linear, in place."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, kept), linear.weight.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, kept), linear.bias.requires_grad)


def twin_of(model: Model) -> Model:
    """A copy of the weights as they are now, which later changes do not reach."""
    import copy

    from compress.classifier import model_of

    return model_of(copy.deepcopy(model.module), model.tokenizer)


def select_axis(facts: Facts, block: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Keep the positions `kept` of the named axes in every linear of a block, in place. facts: of the model before."""
    for name in facts.architecture.linears:
        linear: nn.Linear = block.get_submodule(name)  # type: ignore[assignment]
        outputs, inputs = facts.axes(name)
        for dim, axes in enumerate((outputs, (inputs,))):
            if kept.keys() & set(axes):
                select_channels(linear, _stacked(facts, axes, kept), dim)


def _stacked(facts: Facts, axes: tuple[str, ...], kept: Mapping[str, Tensor]) -> Tensor:
    """Positions that stay of axes that a linear holds one behind the other."""
    import torch

    parts, start = [], 0
    for axis in axes:
        parts.append(start + kept.get(axis, torch.arange(facts.sizes[axis])))
        start += facts.sizes[axis]
    return torch.cat(parts)


def kept_heads(before: Facts, after: Facts, worth: Tensor, adding: bool) -> dict[str, Tensor]:
    """Of a block's query heads with this worth (heads,), channels of those that stay, and of keys and values, by axis.

    adding: whether worth adds over the heads of a group; else its squares do.
    """
    from compress.numerics.neurons import highest_groups, with_neighbours

    kv, q = highest_groups(worth.view(before.kv_heads, -1), after.kv_heads, after.heads // after.kv_heads, adding)
    return {"q": with_neighbours(q, before.head_size), "kv": with_neighbours(kv, before.head_size)}


def remember(module: nn.Module, facts: Facts) -> None:
    """Let every transformers module inside know of the widths and counts that it keeps beside the config."""
    found = {**facts.sizes, "heads": facts.heads, "kv_heads": facts.kv_heads, "groups": facts.heads // facts.kv_heads}
    part: Any
    for part in module.modules():
        for entry, names in REMEMBERED.items():
            for name in names:
                if hasattr(part, name):
                    setattr(part, name, found[entry])


def tell(config: Any, facts: Facts) -> None:
    """Write widths and counts into a transformers config, those that it would have computed from others, too."""
    found = {**facts.sizes, "heads": facts.heads, "kv_heads": facts.kv_heads, "head_size": facts.head_size}
    for entry, key in facts.architecture.keys.items():
        if entry in found:
            setattr(config, key, found[entry])


def refuse_split_width(facts: Facts, step: str) -> None:
    """Raise RecipeError where a head's size always is the width divided by the number of heads."""
    if facts.architecture.splits_width:
        raise RecipeError(
            f"{step}: the config of a {facts.architecture.model_type} cannot say that heads and width no longer "
            "divide as they did; use prune.neurons or prune.layers, or prune.hidden, where heads go with the width"
        )


def refuse_post_norms(facts: Facts, step: str) -> None:
    """Raise RecipeError for `update: stream` where a norm stands between the linear to be set and the stream."""
    if facts.architecture.post_norms:
        raise RecipeError(
            f"{step}: update: stream solves for the residual stream, and in {facts.architecture.model_type} a norm "
            "stands before it; use update: none, or another update"
        )


def reader_of(architecture: Architecture, axis: str) -> str:
    """The one linear of a block whose inputs are the channels of an axis."""
    (name,) = [name for name, (_, inputs) in architecture.linears.items() if inputs == axis]
    return name
