"""llama.cpp's named mixes of block types: which type each matrix gets under Q4_K_M and its like.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp (commit 007dbbf) for dense decoders;
the tests compare every tensor with what the installed library itself chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from compress.architectures import Facts
from compress.encodings import GGML_BLOCKS

Preset = Literal[
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
    "IQ4_NL", "IQ4_XS",
]  # fmt: skip

FALLBACKS: Mapping[str, str] = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
}  # fmt: skip
"""What llama.cpp stores instead where a type's 256 weights to a block do not divide a row; mostly it is larger."""


@dataclass(frozen=True)
class Importance:
    """What the importances of input channels were measured on, by which libggml rounded some tensors of a model.

    dataset: the calibration's source, empty where nobody said. tensors: how many were rounded by them. windows: read.
    """

    dataset: str
    tensors: int
    windows: int


@dataclass(frozen=True)
class _Place:
    """Where a matrix stands: its block of how many, query heads per key head, and whether importances are known."""

    block: int
    blocks: int
    groups: int
    importance: bool


_Rule = tuple[str, Callable[[_Place], bool]]


def _all(place: _Place) -> bool:
    return True


def _more_bits(place: _Place) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    i, n = place.block, place.blocks
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _grouped(place: _Place) -> bool:
    return place.groups >= 4


def _first(count: int) -> Callable[[_Place], bool]:
    return lambda place: place.block < count


def _share(part: int, importance: bool | None = None) -> Callable[[_Place], bool]:
    """The first 1/part of the blocks, where importances are known, unknown or (None) either."""
    return lambda p: p.block < p.blocks // part and importance in (None, p.importance)


@dataclass(frozen=True)
class _Mix:
    """The type of most matrices, and for some linears other types: the first rule that applies."""

    base: str
    v_proj: tuple[_Rule, ...] = ()
    o_proj: tuple[_Rule, ...] = ()
    down_proj: tuple[_Rule, ...] = ()


_MIXES: Mapping[Preset, _Mix] = {
    "Q2_K": _Mix("q2_k", (("q4_k", _grouped), ("q3_k", _all)), (("q3_k", _all),), (("q3_k", _all),)),
    "Q3_K_S": _Mix("q3_k"),
    "Q3_K_M": _Mix(
        "q3_k",
        (("q5_k", _first(2)), ("q4_k", _all)),
        (("q4_k", _all),),
        (("q5_k", _share(16)), ("q4_k", _all)),
    ),
    "Q3_K_L": _Mix("q3_k", (("q5_k", _all),), (("q5_k", _all),), (("q5_k", _all),)),
    "Q4_0": _Mix("q4_0", down_proj=(("q4_1", _share(8, importance=True)),)),
    "Q4_K_S": _Mix("q4_k", (("q5_k", _first(4)),), (), (("q5_k", _share(8)),)),
    "Q4_K_M": _Mix("q4_k", (("q6_k", _more_bits),), (), (("q6_k", _more_bits),)),
    "Q5_0": _Mix("q5_0", down_proj=(("q5_1", _share(8, importance=True)),)),
    "Q5_K_S": _Mix("q5_k"),
    "Q5_K_M": _Mix("q5_k", (("q6_k", _more_bits),), (), (("q6_k", _more_bits),)),
    "Q6_K": _Mix("q6_k"),
    "Q8_0": _Mix("q8_0"),
    "IQ4_NL": _Mix("iq4_nl", (("q5_k", _grouped),), (), (("q5_k", _share(8, importance=False)),)),
    "IQ4_XS": _Mix("iq4_xs", (("q5_k", _grouped),), (), (("q5_k", _share(8, importance=False)),)),
}


def covers(facts: Facts) -> bool:
    """Whether the rules are known for an architecture: not where queries, keys and values are one matrix."""
    return "self_attn.v_proj" in facts.architecture.linears


def types(preset: Preset, facts: Facts, importance: bool) -> dict[str, str]:
    """Type per matrix as the mix asks for it, whatever its shape; importance: of input channels, are they known?"""
    mix, found = _MIXES[preset], {}
    for i in range(facts.layers):
        place = _Place(i, facts.layers, facts.heads // facts.kv_heads, importance)
        for name in facts.architecture.linears:
            rules: tuple[_Rule, ...] = getattr(mix, name.rpartition(".")[2], ())
            kind = next((kind for kind, applies in rules if applies(place)), mix.base)
            if name.endswith("v_proj") and _is_70b(facts) and kind in ("q3_k", "q4_k"):
                kind = "q5_k"
            found[f"{facts.architecture.blocks}.{i}.{name}.weight"] = kind
    # A tied embedding is an output head to llama.cpp.
    head = facts.embedding_tensor if facts.tied else f"{facts.architecture.head}.weight"
    found[facts.embedding_tensor] = mix.base
    found[head] = "q8_0" if mix.base == "q8_0" else "q6_k"
    return found


def fitted(kind: str, width: int) -> str:
    """The type itself where its blocks divide rows of `width` weights, else llama.cpp's substitute.

    >>> fitted("q4_k", 576), fitted("q4_k", 512), fitted("q6_k", 100)
    ('q5_0', 'q4_k', 'fp16')
    """
    if width % block(kind) == 0:
        return kind
    other = FALLBACKS.get(kind, "fp16")
    return other if width % block(other) == 0 else "fp16"


def recognized(kinds: Mapping[str, str], facts: Facts) -> Preset | None:
    """The preset by which llama.cpp would store every matrix in just these types, or None.

    Of several, one that needs no substitute: all matrices in q8_0 are Q8_0, though Q6_K may end so.
    """
    substituted = None
    for preset in _MIXES if covers(facts) else ():
        for importance in (True, False):
            asked = types(preset, facts, importance)
            if kinds == asked:
                return preset
            if kinds == {name: fitted(kind, facts.matrices[name][1]) for name, kind in asked.items()}:
                substituted = substituted or preset
    return substituted


def block(kind: str) -> int:
    """Weights to a block of a type; 1 for floats."""
    return 1 if kind in ("fp16", "bf16", "fp32") else GGML_BLOCKS.get(kind, (32, 0))[0]


def _is_70b(facts: Facts) -> bool:
    """Whether llama.cpp takes the model for a Llama 2 70B or its like, by the number of blocks."""
    grouped = facts.heads != facts.kv_heads or facts.architecture.model_type == "qwen2"
    return facts.layers == 80 and facts.architecture.model_type in ("llama", "mistral", "qwen2") and grouped
