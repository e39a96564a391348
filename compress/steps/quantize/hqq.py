"""HQQ: data-free rounding to the grid of least ℓp error, found by half-quadratic splitting.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Departures: see
`numerics.half_quadratic`; above all, zero points are the integers that are stored, not floats, except in GGUF's types
that store floats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.steps.quantize._fields import EncodingName, WeightQuantization, encode, refuse_encoded, round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model


Stored = Literal["int8", "int5", "int4", "int3", "int2", "q4_1", "q5_1"]
Kept = Stored | Literal["fp16", "bf16", "fp32"]
OFFSETS = {"q4_1": 15, "q5_1": 31}  # types whose blocks of 32 hold a float16 offset, and their highest code


class Hqq(WeightQuantization):
    """Scales and zero points of least Σ |w − ŵ|^p; integers of embeddings are rounded to nearest.

    encoding: integers, or GGUF's q4_1 and q5_1, which hold zero points as the real numbers that the method finds
    (beside these, what `keep` and `embeddings` name goes without zero points, as GGUF's other types do).
    symmetric: false by default, unlike elsewhere: without zero points the method gains nothing over quantize.rtn
    on the reference model. p: below 1, large errors of a few weights count for less. iterations: of the
    alternation; the best one counts, so that more never fit worse.
    """

    name: ClassVar[str] = "quantize.hqq"
    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True

    encoding: Stored = "int4"  # type: ignore[assignment]
    symmetric: bool = False
    keep: dict[str, Kept] = Field(default_factory=dict)  # type: ignore[assignment]
    embeddings: Kept | None = "int8"  # type: ignore[assignment]
    p: float = Field(0.7, gt=0, le=1, allow_inf_nan=False)
    iterations: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _judge_blocks(self) -> Self:
        """Refuse fields that blocks would ignore."""
        if self.encoding in OFFSETS and (self.group_size != 32 or self.symmetric):
            raise RecipeError(
                f"{self.encoding} holds a scale and an offset for 32 channels, always; leave group_size "
                "and symmetric out"
            )
        return self

    def _encoding(self, name: EncodingName | Kept) -> Encoding:
        if name == "q4_1" or name == "q5_1":
            return Encoding(name)
        found = super()._encoding(name)
        return replace(found, symmetric=True) if self.encoding in OFFSETS else found

    def apply(self, model: Model, context: Context) -> None:
        """Encode every selected linear, then the embeddings."""
        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        for i, (tensor, encoding) in enumerate(chosen.items()):
            context.progress(tensor, i / len(chosen))
            W = model.parameter(tensor).detach()
            linear = tensor.removesuffix(".weight") in model.facts.linears
            if encoding.name in OFFSETS:
                model.store(tensor, self._in_blocks(tensor, W, encoding))
            elif linear and encoding.is_affine:
                model.store(tensor, self._rounded(tensor, W, encoding))
            else:
                model.store(tensor, round_to_nearest(tensor, W, encoding, search=False))

    def _rounded(self, tensor: str, W: Tensor, encoding: Encoding) -> EncodedTensor:
        from compress.numerics.half_quadratic import fit_half_quadratic

        grouped = W.reshape(len(W), encoding.groups(W.shape[1]), -1)
        try:
            grid = fit_half_quadratic(grouped, *encoding.code_range, encoding.symmetric, self.p, self.iterations)
        except NumericalError as error:
            raise NumericalError(f"{tensor}: {error}") from None
        return encode(W, encoding, grid)

    def _in_blocks(self, tensor: str, W: Tensor, encoding: Encoding) -> EncodedTensor:
        import torch

        from compress.numerics.ggml_blocks import pack_q4_1, pack_q5_1
        from compress.numerics.half_quadratic import fit_offsets

        grouped = W.reshape(len(W), encoding.groups(W.shape[1]), -1)
        try:
            grid = fit_offsets(grouped, OFFSETS[encoding.name], self.p, self.iterations)
        except NumericalError as error:
            raise NumericalError(f"{tensor}: {error}") from None
        pack = pack_q4_1 if encoding.name == "q4_1" else pack_q5_1
        codes = grid.round(grouped).to(torch.uint8).flatten(1)
        return EncodedTensor(encoding, pack(codes, grid.scales, grid.offsets))
