"""Half precision: weights stored as float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from compress.architectures import Facts
from compress.encodings import Encoding
from compress.interfaces import Context, Step
from compress.steps.quantize._fields import judged, refuse_encoded, round_to_nearest

if TYPE_CHECKING:
    from compress.model import Model


class Cast(Step):
    """Every matrix, embeddings included, rounded to a 16-bit float; norms and biases stay float32."""

    name: ClassVar[str] = "quantize.cast"
    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    encoding: Literal["fp16", "bf16"] = "fp16"

    @field_validator("encoding", mode="before")
    @classmethod
    def _stores(cls, asked: object, info: ValidationInfo) -> object:
        return judged(cls.name, info, asked)

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """The same float encoding for every matrix."""
        return {name: Encoding(self.encoding) for name in facts.matrices}

    def apply(self, model: Model, context: Context) -> None:
        """Round and store every matrix; a value beyond float16's range raises NumericalError."""
        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        for name, encoding in chosen.items():
            model.store(name, round_to_nearest(name, model.parameter(name).detach(), encoding, search=False))
