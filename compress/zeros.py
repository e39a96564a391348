"""What pruned zeros bring an exported file: its bytes and speed beside those of a twin without zeros, measured."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from compress.encodings import EncodedTensor
from compress.errors import GateInconclusive
from compress.interfaces import Exporter
from compress.timing import Speed, compare, stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

VERSION = 1
NOTICEABLE = {"bytes": 1.01, "prefill": 1.05, "decode": 1.05}
"""From how many times as small or as fast on there is a gain: two loads of one file differ in speed, too."""


class Zeros(BaseModel):
    """An export beside its twin: the same model in the same encodings and format, but with no weight pruned to zero.

    pruned: weights that masks drop, of `masked` weights in the `tensors` tensors that lose any; pruned_linear and
    linear: of all linears. size_bytes_without: of the twin's files, None where an encoding leaves zeros no way out.
    prefill, decode: the file's speed with the twin's as reference. not_measured: what of it all was not, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pruned: int
    masked: int
    tensors: int
    pruned_linear: int
    linear: int
    size_bytes: int
    size_bytes_without: int | None = None
    prefill: Speed | None = None
    decode: Speed | None = None
    not_measured: str = ""

    @property
    def gains(self) -> list[str]:
        """What is measurably better than without zeros: "bytes", "prefill", "decode"."""
        found = ["bytes"] if self._saved >= NOTICEABLE["bytes"] else []
        return found + [part for part, speed in self.speeds.items() if speed.lower >= NOTICEABLE[part]]

    @property
    def unclear(self) -> list[str]:
        """Where the interval holds both a gain and none."""
        return [part for part, s in self.speeds.items() if s.lower < NOTICEABLE[part] <= s.upper]

    @property
    def speeds(self) -> dict[str, Speed]:
        """What was timed, by its name."""
        return {part: s for part, s in (("prefill", self.prefill), ("decode", self.decode)) if s is not None}

    @property
    def _saved(self) -> float:
        return 1.0 if self.size_bytes_without is None else self.size_bytes_without / self.size_bytes


def pruned(model: Model) -> dict[str, int]:
    """How many weights of each tensor masks drop; tensors that lose none are left out."""
    counts = {name: int((~mask).sum()) for name, mask in model.masks.items()}
    return {name: count for name, count in counts.items() if count}


def measure(model: Model, exporter: Exporter, written: Path, release: Callable[[], object] = lambda: None) -> Zeros:
    """What pruned zeros bring the files that the exporter has written of the model, which stay as they are.

    The twin's files lie beside `written` while it is measured; then they are gone. release: called before both are
    opened at once, to make room. Raises what the exporter raises.
    """
    linears = {f"{name}.weight": n * m for name, (n, m) in model.facts.linears.items()}
    counts = pruned(model)
    found = Zeros(
        pruned=sum(counts.values()),
        masked=sum(model.masks[name].numel() for name in counts),
        tensors=len(counts),
        pruned_linear=sum(count for name, count in counts.items() if name in linears),
        linear=sum(linears.values()),
        size_bytes=_size(written),
    )
    for name in counts:
        if (held := model.encoding(name)) is not None and not held.holds_zero:
            return found.model_copy(update={"not_measured": f"bytes and speed ({held} holds no zero to replace)"})
    with tempfile.TemporaryDirectory(prefix="without-zeros-", dir=written.parent) as folder:
        without = Path(folder)
        exporter.write(without_zeros(model), without)
        release()
        speeds, reason = _speeds(exporter, written, without)
        sizes = {"size_bytes_without": _size(without)}
    return found.model_copy(update={**sizes, **speeds, "not_measured": reason})


def _speeds(exporter: Exporter, written: Path, without: Path) -> tuple[dict[str, Speed], str]:
    """Speeds of both, opened at once in the runtime that executes them, or why there are none."""
    from compress.model import Model

    opened = exporter.open(written)
    try:
        if isinstance(opened, Model):
            return {}, "speed (torch decodes the file to floats before it computes; other programs execute it)"
        twin = exporter.open(without)
        try:
            speeds = compare(stopwatch(opened), stopwatch(twin))
        except GateInconclusive as error:
            return {}, f"speed ({error})"
        finally:
            twin.close()
    finally:
        opened.close()
    return speeds, "" if "decode" in speeds else "decode (a classifier decodes nothing)"


def without_zeros(model: Model) -> Model:
    """The model with values that are not zero wherever its masks drop weights, for exporters to write.

    It shares the model's memory: a tensor is changed as it is read, one at a time, and never the model's own.
    """
    twin = copy.copy(model)

    def tensor(name: str) -> EncodedTensor | Tensor:
        held = model.tensor(name)
        return held if (mask := model.masks.get(name)) is None else filled(held, mask)

    twin.tensor = tensor  # type: ignore[method-assign]
    return twin


def filled(held: EncodedTensor | Tensor, mask: Tensor) -> EncodedTensor | Tensor:
    """A tensor (n, m) with other values than zero where the mask is False, elsewhere the same; a copy.

    They are as pruning finds them: of either sign, with random magnitudes up to half the mean of those that stay, so
    that they pack no better than weights do and leave activations ordinary. Codebooks take the levels next to zero.
    A group that was pruned as a whole, so that its scale is zero, gets the mean magnitude of the others' scales.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, mask.shape, generator=draw) - 1
    sizes = torch.rand(mask.shape, generator=draw).clamp(min=1 / 32) / 2
    if not isinstance(held, EncodedTensor):
        return torch.where(mask, held, signs * sizes * _magnitude(held))
    codes, scales, encoding = held.codes, held.scales, held.encoding
    if not encoding.is_coded:
        return replace(held, codes=torch.where(mask, codes, (signs * sizes * _magnitude(codes)).to(codes.dtype)))
    assert scales is not None
    if encoding.is_codebook:
        from compress.numerics.codebook import LEVELS

        levels = LEVELS[encoding.name]
        low, high = (levels.index(f(x for x in levels if x * s > 0)) for f, s in ((max, -1), (min, 1)))
        new = torch.where(signs < 0, low, high)
    else:
        zeros = torch.zeros_like(scales) if held.zero_points is None else held.zero_points
        steps = codes.int() - zeros.int().repeat_interleave(codes.shape[1] // zeros.shape[1], dim=1)
        low, high = encoding.code_range
        steps = signs * (1 + sizes * _magnitude(steps)).int()
        new = codes + torch.where((codes + steps < low) | (codes + steps > high), -steps, steps)
    if scales.is_floating_point():  # mxfp4's are exponents
        dropped = (~mask).view(len(mask), scales.shape[1], -1).any(-1)
        scales = torch.where(dropped & (scales == 0), _magnitude(scales), scales.float()).to(scales.dtype)
    return replace(held, codes=torch.where(mask, codes, new.to(codes.dtype)), scales=scales)


def _magnitude(values: Tensor) -> float:
    """Mean magnitude of the values that are not zero; of zeros alone some small one."""
    some = values[values != 0].float().abs()
    return float(some.mean()) if len(some) else 2.0**-6


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
