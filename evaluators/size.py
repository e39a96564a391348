"""Size: how much room the stored files take."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from evaluators._fields import MEGABYTE, Stored


class Size(Stored):
    """File size in MB (1,000,000 bytes); footprint bounds the bits per weight as well."""

    name: ClassVar[str] = "size"
    unit: ClassVar[str] = "MB"
    definition: ClassVar[str] = "size of the files in MB, of 1,000,000 bytes."
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_mb"})

    max_mb: float = Field(gt=0, allow_inf_nan=False)

    @property
    def margin(self) -> float:
        """MB at most."""
        return self.max_mb

    def measure(self, size_bytes: int, bits_per_weight: float) -> float:
        """MB.

        >>> Size(max_mb=80).measure(40_000_000, 4.5)
        40.0
        """
        return size_bytes / MEGABYTE

    def display(self, loss: float) -> str:
        """The size in MB."""
        return f"{loss:,.1f} MB"
