"""What a model rounds while it runs, besides its stored weights: the inputs of linears, and its key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Scheme = Literal["dynamic", "static", "block"]
CacheType = Literal["q8_0", "q4_0"]


@dataclass(frozen=True)
class InputRounding:
    """int8 codes for the inputs of a linear; see `numerics.runtime_rounding`.

    scheme: "dynamic", a scale per token; "static", one scale for all, fixed beforehand; "block", a float16 scale per
    token and 32 channels, which is what llama.cpp computes with. scale: of "static", once it is known.
    """

    scheme: Scheme
    scale: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Rounded x (…, channels), in float32."""
        from compress.numerics import runtime_rounding

        if self.scheme == "dynamic":
            return runtime_rounding.round_per_token(x.float())
        if self.scheme == "block":
            return runtime_rounding.round_q8_0(x.float())
        assert self.scale is not None
        return runtime_rounding.round_per_tensor(x.float(), self.scale)

    def __str__(self) -> str:
        how = {"dynamic": "per token", "static": "per tensor", "block": "per token and 32 channels"}
        return f"int8 inputs {how[self.scheme]}"


@dataclass(frozen=True)
class CacheRounding:
    """Keys (after the rotary embedding) and values in llama.cpp's blocks of 32 channels of a head."""

    keys: CacheType
    values: CacheType

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both (…, head size), rounded, in their own dtypes."""
        from compress.numerics.runtime_rounding import round_q4_0, round_q8_0

        functions = {"q8_0": round_q8_0, "q4_0": round_q4_0}
        k = functions[self.keys](keys.float()).to(keys.dtype)
        return k, functions[self.values](values.float()).to(values.dtype)

    def __str__(self) -> str:
        return f"{self.keys} cache" if self.keys == self.values else f"{self.keys} keys, {self.values} values"


def to_json(inputs: Mapping[str, InputRounding], cache: CacheRounding | None) -> dict[str, Any]:
    """Both for a manifest: empty where nothing is rounded."""
    found: dict[str, Any] = {}
    if inputs:
        found["inputs"] = {name: asdict(rounding) for name, rounding in inputs.items()}
    if cache is not None:
        found["cache"] = asdict(cache)
    return found


def from_json(found: Mapping[str, Any]) -> tuple[dict[str, InputRounding], CacheRounding | None]:
    """The inverse of `to_json`; raises RecipeError for fields that are unknown."""
    try:
        inputs = {name: InputRounding(**spec) for name, spec in found.get("inputs", {}).items()}
        return inputs, CacheRounding(**found["cache"]) if "cache" in found else None
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"run-time rounding {found!r} is not known to this version ({error})") from None
