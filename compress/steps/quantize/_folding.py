"""Moving a factor per channel from a norm or linear to the linears that read it: the function stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from compress.encodings import Encoding
from compress.interfaces import Context

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model


def fold(model: Model, source: str, readers: Sequence[str], s: Tensor) -> None:
    """Divide the output channels of `source` by s (m,) and multiply the columns of its readers: the same function.

    Of a fused linear, the last m output channels are the readers'.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.module.get_submodule(source).named_parameters(recurse=False):  # weight and bias
            part = parameter[-len(s) :]
            if offset := model.facts.architecture.offset(f"{source}.{name}"):
                part.copy_((part + offset) / s - offset)
            else:
                part.div_(s if part.dim() == 1 else s.unsqueeze(1))
        for name in readers:
            model.parameter(f"{name}.weight").mul_(s)
    model.touch()


def note_silence(context: Context, linear: str, magnitudes: Tensor) -> None:
    """Tell how many input channels of a linear calibration has not heard; magnitudes: (m,), of the inputs."""
    if silent := int((magnitudes == 0).sum()):
        context.notes.append(
            f"{linear}: {silent} of {len(magnitudes)} input channels are silent on the calibration data"
        )


def fixed(model: Model, source: str, readers: Sequence[str], chosen: Mapping[str, Encoding]) -> str | None:
    """A tensor that a fold would have to change, and that an earlier step has stored for good; or None."""
    own = [f"{source}.{name}" for name, _ in model.module.get_submodule(source).named_parameters(recurse=False)]
    touched = [*own, *(f"{name}.weight" for name in readers)]
    return next((name for name in touched if name in model.encoded and name not in chosen), None)
