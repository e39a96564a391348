"""Round to nearest: every weight to the closest code of its group's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compress.interfaces import Context
from compress.steps.quantize._fields import WeightQuantization, refuse_encoded, round_to_nearest

if TYPE_CHECKING:
    from compress.model import Model


class RoundToNearest(WeightQuantization):
    """Data-free rounding. range: "minmax" covers each group's extremes, "mse" searches the scale of least error."""

    name: ClassVar[str] = "quantize.rtn"
    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True

    range: Literal["minmax", "mse"] = "minmax"

    def apply(self, model: Model, context: Context) -> None:
        """Encode every selected tensor."""
        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        for i, (name, encoding) in enumerate(chosen.items()):
            context.progress(name, i / len(chosen))
            W = model.parameter(name).detach()
            model.store(name, round_to_nearest(name, W, encoding, search=self.range == "mse"))
