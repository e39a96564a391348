"""A quantized key-value cache: keys and values rounded in llama.cpp's blocks, before attention reads them.

Scales are per token, along the channels of a head. Per-channel scales of keys (KIVI, Liu et al. 2024,
arXiv:2402.02750) are left out: they span tokens, so that what a query sees depends on how far the cache has been
filled by then, which scoring a window at once does not show, and no runtime that we export to has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compress.architectures import Facts
from compress.errors import RecipeError
from compress.interfaces import Context, Step
from compress.rounding import CacheRounding, CacheType

if TYPE_CHECKING:
    from compress.model import Model

BLOCK = 32
TYPES: dict[str, CacheType] = {"int8": "q8_0", "int4": "q4_0"}


class KvCache(Step):
    """Keys and values in int8 or int4 codes, one float16 scale per 32 channels: llama.cpp's q8_0 and q4_0.

    Every later gate measures a model that reads rounded keys and values; the weights stay as they are.
    """

    name: ClassVar[str] = "quantize.kv_cache"
    streams: ClassVar[bool] = True

    keys: Literal["int8", "int4"] = "int8"
    values: Literal["int8", "int4"] = "int8"

    def check(self, facts: Facts) -> None:
        """Refuse heads that blocks do not divide, and attention that our reading of the cache would not compute."""
        if facts.attention_cap is not None:
            raise RecipeError(
                f"{facts.architecture.model_type} caps its attention at {facts.attention_cap}, which is not computed "
                "over a rounded cache; leave the step out"
            )
        if facts.head_size % BLOCK:
            raise RecipeError(f"heads of {facts.head_size} channels are not a multiple of a cache block's {BLOCK}")

    def cache(self) -> CacheRounding:
        """The types of keys and values."""
        return CacheRounding(TYPES[self.keys], TYPES[self.values])

    def apply(self, model: Model, context: Context) -> None:
        """Let the model round from now on."""
        self.check(model.facts)
        if model.cache is not None:
            raise RecipeError(f"the model has a {model.cache} already; leave one of the two steps out")
        model.round_cache(self.cache())
