"""The fields that quantization steps share, and which tensor gets which encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress import methods
from compress.architectures import Facts
from compress.encodings import CODEBOOK_BITS, FIXED_GROUPS, EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Step

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model
    from compress.numerics.affine import Grid
    from compress.numerics.codebook import CodebookGrid

CodedName = Literal["int8", "int5", "int4", "int3", "int2", "nf4", "mxfp4", "iq4_nl"]
EncodingName = Literal["int8", "int5", "int4", "int3", "int2", "nf4", "mxfp4", "iq4_nl", "fp16", "bf16", "fp32"]
E = TypeVar("E")
WEIGHTS_AT_ONCE = 2**19  # that are rounded: some copies of them fit into a processor's cache


class WeightQuantization(Step):
    """Linears of the blocks in `encoding`, except those that `keep` names; embeddings on their own.

    group_size: input channels per scale, or "channel" for one scale per row (mxfp4 and iq4_nl always have
    their own 32). symmetric: whether integer codes go without zero points; codebooks always do. layers: globs over
    module names; the linears of the blocks that none matches stay floats, for a later step perhaps (awq and smoothquant
    move factors into their weights). keep: glob over module names → encoding ("fp32" leaves them as they are); the last
    match wins. A glob that matches no linear of the blocks may name the token embedding or the output head: a tied head
    has the encoding of its embedding.
    embeddings: encoding of these two where `keep` names them not, rounded to nearest (but see quantize.gptq); null
    leaves them in float32.
    """

    packs: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    encoding: CodedName = "int4"
    group_size: int | Literal["channel"] = Field(32)
    symmetric: bool = True
    layers: tuple[str, ...] = Field(("*",), strict=False)  # a list fills a tuple
    keep: dict[str, EncodingName] = Field(default_factory=dict)
    embeddings: EncodingName | None = "int8"

    @field_validator("encoding", "keep", "embeddings", mode="before")
    @classmethod
    def _stores(cls, asked: object, info: ValidationInfo) -> object:
        return judged(cls.name, info, asked)

    @model_validator(mode="after")
    def _judge_codebooks(self) -> Self:
        """Refuse fields that the chosen codebook would ignore."""
        if self.encoding in CODEBOOK_BITS and not self.symmetric:
            raise RecipeError(f"symmetric: {self.encoding} is a codebook without zero points; leave it true")
        fixed = FIXED_GROUPS.get(self.encoding)
        if fixed is not None and self.group_size != fixed:
            raise RecipeError(
                f"group_size={self.group_size}: {self.encoding} shares a scale over {fixed} channels, always"
            )
        return self

    def check(self, facts: Facts) -> None:
        """Refuse group sizes that do not divide and patterns that match nothing."""
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise RecipeError(f'group_size={self.group_size}; expected a positive number or "channel"')
        check_fit(facts, self.layers, self.keep, self.encodings(facts))

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """Encoding per tensor name; tensors left in float32 are absent."""
        asked = dict.fromkeys(facts.linears, self.encoding) | dict.fromkeys(outside(facts), self.embeddings or "fp32")
        chosen = selected(facts, self.layers, self.keep, asked)
        return {f"{name}.weight": self._encoding(e) for name, e in chosen.items() if e != "fp32"}

    def _encoding(self, name: EncodingName) -> Encoding:
        if name in ("fp16", "bf16", "fp32"):
            return Encoding(name)
        size = None if self.group_size == "channel" else self.group_size
        return Encoding(name, FIXED_GROUPS.get(name, size), name in CODEBOOK_BITS or self.symmetric)


def judged(step: str, info: ValidationInfo, asked: object) -> object:
    """What a field says, or ValueError with the reason where it names an encoding that the step does not take."""
    kept = info.field_name in ("keep", "embeddings")
    values = asked.values() if isinstance(asked, Mapping) else asked if isinstance(asked, list | tuple) else [asked]
    for name in values:
        if isinstance(name, str) and (reason := methods.refusal(step, name, kept)):
            raise ValueError(reason)
    return asked


def outside(facts: Facts) -> list[str]:
    """The modules with a matrix that are no linears of the blocks: embeddings, and the output head unless tied."""
    modules = (tensor.removesuffix(".weight") for tensor in facts.matrices)
    return [name for name in modules if name not in facts.linears]


def matched(facts: Facts, pattern: str) -> list[str]:
    """The modules that a glob of `keep` names: linears of the blocks or, if it matches none, what lies outside."""
    inside = [name for name in facts.linears if fnmatchcase(name, pattern)]
    return inside or [name for name in outside(facts) if fnmatchcase(name, pattern)]


def selected(facts: Facts, layers: Sequence[str], keep: Mapping[str, E], asked: Mapping[str, E]) -> dict[str, E]:
    """What `asked` says per module, after `keep`, without the linears of the blocks that `layers` leaves out."""
    found = {n: e for n, e in asked.items() if n not in facts.linears or any(fnmatchcase(n, p) for p in layers)}
    for pattern, own in keep.items():
        found.update({name: own for name in matched(facts, pattern) if name in found})
    return found


def check_fit(
    facts: Facts, layers: Sequence[str], keep: Mapping[str, object], encodings: Mapping[str, Encoding]
) -> None:
    """Raise RecipeError for a pattern that matches nothing, and for groups that do not divide the inputs."""
    example = next(iter(facts.linears))
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in facts.linears):
            raise RecipeError(f"layers: {pattern!r} matches no linear, e.g. {example}")
    for pattern in keep:
        names = matched(facts, pattern)
        if not names:
            others = f"nor {', '.join(outside(facts))}{' (the head is tied to it)' if facts.tied else ''}"
            raise RecipeError(f"keep: {pattern!r} matches no linear, e.g. {example}, {others}")
        if not selected(facts, layers, {}, dict.fromkeys(names)):
            raise RecipeError(f"keep: {pattern!r} matches no linear that layers ({', '.join(layers)}) takes")
    for name, encoding in encodings.items():
        if encoding.is_coded:
            try:
                encoding.groups(facts.matrices[name][1])
            except RecipeError as error:
                raise RecipeError(f"{name.removesuffix('.weight')}: {error}") from None


def refuse_encoded(model: Model, names: Mapping[str, Encoding]) -> None:
    """Raise RecipeError where a tensor that is to be quantized holds codes already."""
    for name in names:
        held = model.encoding(name)
        if held is not None and held.is_coded:
            raise RecipeError(
                f"{name} is stored in {held} already; rounding twice loses twice: start from the unquantized parent"
            )


def coded(chosen: Mapping[str, Encoding]) -> set[str]:
    """The tensors that get codes, which calibration may fit; the others are rounded to floats."""
    return {tensor for tensor, encoding in chosen.items() if encoding.is_coded}


def fit_grid(W: Tensor, encoding: Encoding, importance: Tensor | None, search: bool) -> Grid | CodebookGrid:
    """The grid of an encoding with codes for W (n, g, k), as `affine.fit` and `codebook.fit` choose it."""
    from compress.numerics import affine, codebook

    if encoding.is_codebook:
        return codebook.fit(W, encoding.name, importance, search)
    return affine.fit(W, *encoding.code_range, encoding.symmetric, importance, search)


def grid_of(encoded: EncodedTensor, group: int) -> Grid | CodebookGrid:
    """The grid of one group of every row of an encoded matrix."""
    from compress.numerics.affine import Grid
    from compress.numerics.codebook import CodebookGrid

    assert encoded.scales is not None
    columns = slice(group, group + 1)
    if encoded.encoding.is_codebook:
        return CodebookGrid(encoded.encoding.name, encoded.scales[:, columns])
    zero_points = None if encoded.zero_points is None else encoded.zero_points[:, columns]
    return Grid(*encoded.encoding.code_range, encoded.scales[:, columns], zero_points)


def round_to_nearest(
    name: str,
    W: Tensor,
    encoding: Encoding,
    search: bool,
    importance: Tensor | None = None,
    percentile: float = 100.0,
) -> EncodedTensor:
    """W (n, m) float32 in `encoding`, each weight rounded on its own; importance: (m,) or None.

    percentile: the range of a group is fitted to so many percent of its weights. Raises NumericalError naming the
    tensor.
    """
    import torch

    from compress.numerics.affine import central

    if encoding.name == "fp16" or encoding.name == "bf16":
        return EncodedTensor(encoding, W.to(torch.float16 if encoding.name == "fp16" else torch.bfloat16))
    groups = encoding.groups(W.shape[1])
    weights = None if importance is None else importance.view(groups, -1)
    parts = []
    for rows in torch.split(W, max(1, WEIGHTS_AT_ONCE // W.shape[1])):
        try:
            grouped = rows.reshape(len(rows), groups, -1)
            grid = fit_grid(central(grouped, percentile) if percentile < 100 else grouped, encoding, weights, search)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        parts.append(encode(rows, encoding, grid))
    return join_rows(parts)


def join_rows(parts: Sequence[EncodedTensor]) -> EncodedTensor:
    """Encoded matrices one below the other, of one encoding."""
    import torch

    scales = [p.scales for p in parts if p.scales is not None]
    zeros = [p.zero_points for p in parts if p.zero_points is not None]
    codes = torch.cat([p.codes for p in parts])
    return EncodedTensor(parts[0].encoding, codes, torch.cat(scales), torch.cat(zeros) if zeros else None)


def encode(W: Tensor, encoding: Encoding, grid: Grid | CodebookGrid) -> EncodedTensor:
    """W (n, m) rounded to the nearest codes of a grid with scales (n, g)."""
    import torch

    n, m = W.shape
    codes = torch.empty(n, m, dtype=torch.int8 if encoding.signed else torch.uint8)
    codes.copy_(grid.round(W.reshape(n, grid.scales.shape[1], -1)).view(n, m))
    return EncodedTensor(encoding, codes, grid.scales, grid.zero_points)
