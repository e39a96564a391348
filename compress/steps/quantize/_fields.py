"""The fields that quantization steps share, and which tensor gets which encoding."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Step

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

AffineName = Literal["int8", "int4", "int3", "int2"]
EncodingName = Literal["int8", "int4", "int3", "int2", "fp16", "bf16", "fp32"]


class WeightQuantization(Step):
    """Linears of the blocks in `encoding`, except those that `keep` names; embeddings on their own.

    group_size: input channels per scale, or "channel" for one scale per row. keep: glob over module names →
    encoding ("fp32" leaves them as they are); the last match wins. embeddings: encoding of the token
    embedding and the output head (tied or not), rounded to nearest; null leaves them in float32.
    """

    packs: ClassVar[bool] = True

    encoding: AffineName = "int4"
    group_size: int | Literal["channel"] = Field(32)
    symmetric: bool = True
    keep: dict[str, EncodingName] = Field(default_factory=dict)
    embeddings: EncodingName | None = "int8"

    def check(self, facts: Facts) -> None:
        """Refuse group sizes that do not divide and patterns that match nothing."""
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise RecipeError(f'group_size={self.group_size}; expected a positive number or "channel"')
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in facts.linears):
                raise RecipeError(f"keep: {pattern!r} matches no linear, e.g. {next(iter(facts.linears))}")
        for name, encoding in self.encodings(facts).items():
            if encoding.is_affine:
                try:
                    encoding.groups(facts.matrices[name][1])
                except RecipeError as error:
                    raise RecipeError(f"{name.removesuffix('.weight')}: {error}") from None

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """Encoding per tensor name; tensors left in float32 are absent."""
        chosen: dict[str, EncodingName] = {name: self.encoding for name in facts.linears}
        for pattern, encoding in self.keep.items():
            chosen.update({name: encoding for name in facts.linears if fnmatchcase(name, pattern)})
        found = {f"{name}.weight": self._encoding(e) for name, e in chosen.items() if e != "fp32"}
        if self.embeddings not in (None, "fp32"):
            for name in facts.matrices.keys() - {f"{n}.weight" for n in facts.linears}:
                found[name] = self._encoding(self.embeddings)
        return found

    def _encoding(self, name: EncodingName) -> Encoding:
        if name in ("fp16", "bf16", "fp32"):
            return Encoding(name)
        return Encoding(name, None if self.group_size == "channel" else self.group_size, self.symmetric)


def refuse_encoded(model: Model, names: Mapping[str, Encoding]) -> None:
    """Raise RecipeError where a tensor that is to be quantized holds integer codes already."""
    for name in names:
        if name in model.encoded and model.encoded[name].encoding.is_affine:
            raise RecipeError(
                f"{name} is stored in {model.encoded[name].encoding} already; rounding twice loses twice: "
                f"start from the unquantized parent"
            )


def round_to_nearest(
    name: str, W: Tensor, encoding: Encoding, search: bool, importance: Tensor | None = None
) -> EncodedTensor:
    """W (n, m) float32 in `encoding`, each weight rounded on its own; importance: (m,) or None.

    Raises NumericalError naming the tensor.
    """
    import torch

    from compress.numerics.affine import fit

    if encoding.name == "fp16" or encoding.name == "bf16":
        return EncodedTensor(encoding, W.to(torch.float16 if encoding.name == "fp16" else torch.bfloat16))
    n, m = W.shape
    groups = encoding.groups(m)
    grouped = W.reshape(n, groups, -1)
    weights = None if importance is None else importance.view(groups, -1)
    try:
        grid = fit(grouped, *encoding.code_range, encoding.symmetric, weights, search)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None
    codes = torch.empty_like(W, dtype=torch.int8 if encoding.symmetric else torch.uint8)
    codes.copy_(grid.round(grouped).view(n, m))
    return EncodedTensor(encoding, codes, grid.scales, grid.zero_points)
