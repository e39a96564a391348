"""HQQ: data-free rounding to the grid of least ℓp error, found by half-quadratic splitting.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Departures: see
`numerics.half_quadratic`; above all, zero points are the integers that are stored, not floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError
from compress.interfaces import Context
from compress.steps.quantize._fields import WeightQuantization, encode, refuse_encoded, round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model


class Hqq(WeightQuantization):
    """Scales and zero points of least Σ |w − ŵ|^p; embeddings are rounded to nearest.

    symmetric: false by default, unlike elsewhere: without zero points the method gains nothing over quantize.rtn
    on the reference model. p: below 1, large errors of a few weights count for less. iterations: of the
    alternation; the best one counts, so that more never fit worse.
    """

    name: ClassVar[str] = "quantize.hqq"
    classifiers: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True

    symmetric: bool = False
    p: float = Field(0.7, gt=0, le=1, allow_inf_nan=False)
    iterations: int = Field(20, ge=1)

    def apply(self, model: Model, context: Context) -> None:
        """Encode every selected linear, then the embeddings."""
        chosen = self.encodings(model.facts)
        refuse_encoded(model, chosen)
        for i, (tensor, encoding) in enumerate(chosen.items()):
            context.progress(tensor, i / len(chosen))
            W = model.parameter(tensor).detach()
            if encoding.is_affine and tensor.removesuffix(".weight") in model.facts.linears:
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
