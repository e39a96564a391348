"""Footprint: the size of what is stored, from real files."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from evaluators._fields import MEGABYTE, Stored


class Footprint(Stored):
    """File size in MB (1,000,000 bytes) and bits per weight; with both bounds, the tighter one decides."""

    name: ClassVar[str] = "footprint"
    unit: ClassVar[str] = "of the allowed footprint"
    definition: ClassVar[str] = (
        "size of the files and bits per weight (scales, zero points and embeddings counted), each divided by "
        "what is allowed; the larger share decides."
    )
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_mb", "max_bits_per_weight"})

    max_mb: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_bits_per_weight: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some_bound(self) -> Footprint:
        if self.max_mb is None and self.max_bits_per_weight is None:
            raise ValueError("footprint needs max_mb, max_bits_per_weight or both")
        return self

    @property
    def margin(self) -> float:
        """1: all of what is allowed."""
        return 1.0

    def measure(self, size_bytes: int, bits_per_weight: float) -> float:
        """The larger of size and bits per weight as a share of what is allowed.

        >>> Footprint(max_mb=80, max_bits_per_weight=5).measure(40_000_000, 4.5)
        0.9
        """
        shares = []
        if self.max_mb is not None:
            shares.append(size_bytes / (self.max_mb * MEGABYTE))
        if self.max_bits_per_weight is not None:
            shares.append(bits_per_weight / self.max_bits_per_weight)
        # max() would drop a NaN that is not first
        return max(shares) if all(s == s for s in shares) else float("nan")

    def display(self, loss: float) -> str:
        """The share as a percentage."""
        return f"{loss:.1%} {self.unit}"
