"""Round to nearest: every weight to the closest code of its group's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.interfaces import Context
from compress.steps.quantize._fields import WeightQuantization, refuse_encoded, round_to_nearest

if TYPE_CHECKING:
    from compress.model import Model


class RoundToNearest(WeightQuantization):
    """Data-free rounding.

    range: "minmax" covers each group's extremes, "mse" searches the scale of least error, and "percentile" covers the
    central `percentile` percent of each group's weights; those beyond take its outermost codes. In groups of 32, 93.75
    leaves about one weight at either end.
    """

    name: ClassVar[str] = "quantize.rtn"
    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True

    range: Literal["minmax", "mse", "percentile"] = "minmax"
    percentile: float | None = Field(None, gt=0, lt=100, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        if (self.range == "percentile") != (self.percentile is not None):
            raise ValueError(
                f"range={self.range} and percentile={self.percentile}; expected both, as in range: percentile, "
                "percentile: 99.9, or another range alone"
            )
        return self

    def apply(self, model: Model, context: Context) -> None:
        """Encode every selected tensor."""
        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        search, percentile = self.range == "mse", self.percentile or 100.0
        for i, (name, encoding) in enumerate(chosen.items()):
            context.progress(name, i / len(chosen))
            W = model.parameter(name).detach()
            model.store(name, round_to_nearest(name, W, encoding, search, percentile=percentile))
