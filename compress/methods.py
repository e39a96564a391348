"""Which quantization step stores which encodings, and why not the others: `compress ls` and the steps read it."""

from __future__ import annotations

from collections.abc import Mapping

from compress.encodings import AFFINE_BITS, CODEBOOK_BITS, FLOAT_DTYPES, GGML_BLOCKS, GGML_NAMES, NAMES

_SCALED = (*AFFINE_BITS, *CODEBOOK_BITS)
STORES: Mapping[str, tuple[str, ...]] = {
    "quantize.awq": _SCALED,
    "quantize.cast": ("fp16", "bf16"),
    "quantize.ggml": (*GGML_NAMES, *GGML_BLOCKS, "iq4_nl"),
    "quantize.gptq": _SCALED,
    "quantize.hqq": (*AFFINE_BITS, "q4_1", "q5_1"),
    "quantize.mixed": _SCALED,
    "quantize.rtn": _SCALED,
    "quantize.smoothquant": ("int8",),
}
"""Step → what its linears may be stored in; all but cast take floats under `keep` and `embeddings`, too."""


def taken(step: str, kept: bool = False) -> tuple[str, ...]:
    """What a step stores; kept: what its `keep` and `embeddings` may name."""
    if not kept:
        return STORES[step]
    return (*(_SCALED if step == "quantize.smoothquant" else STORES[step]), *FLOAT_DTYPES)


def refusal(step: str, encoding: str, kept: bool = False) -> str | None:
    """Why a step does not take an encoding, and what does; None where it does, and for names of no encoding.

    None, too, for steps that are not in the table, those of plug-ins: they judge their encodings themselves.

    >>> refusal("quantize.rtn", "q8_0")
    'q8_0 is int8 in groups of 32, by the name of GGUF; write int8, with group_size: 32'
    >>> refusal("quantize.ggml", "int8")
    'int8 in groups of 32 is q8_0 in GGUF; write q8_0'
    """
    if step not in STORES or encoding not in (*NAMES, *GGML_NAMES) or encoding in taken(step, kept):
        return None
    if step == "quantize.ggml":
        return _refused_by_ggml(encoding)
    if step == "quantize.cast":
        remedy = "leave the step out" if encoding == "fp32" else f"use {_others(encoding)}"
        return f"quantize.cast stores floats of 16 bits, not {encoding}; {remedy}"
    if encoding in FLOAT_DTYPES:
        return _float(encoding)
    if step == "quantize.smoothquant" and not kept and encoding != "q8_0":
        remedy = "name it under keep" if encoding in taken(step, kept=True) else f"use {_others(encoding)}"
        return f"quantize.smoothquant multiplies int8 by int8, not {encoding}; {remedy}"
    if encoding in GGML_NAMES:
        own = GGML_NAMES[encoding]
        return f"{encoding} is {own} in groups of 32, by the name of GGUF; write {own}, with group_size: 32"
    if encoding in CODEBOOK_BITS:
        return f"{step} chooses integer codes, not {encoding}'s; use quantize.rtn, gptq or awq"
    inner = "an offset in each block" if encoding in STORES["quantize.hqq"] else "scales of scales in each block"
    return f"{encoding} holds {inner}, which {step} does not choose; use {_others(encoding)}"


def summaries() -> dict[str, str]:
    """Step → what it stores, for people."""
    found = {}
    for step, names in STORES.items():
        more = [name for name in taken(step, kept=True) if name not in names]
        rest = "" if step == "quantize.cast" else f"; under keep and embeddings also {', '.join(more)}"
        found[step] = ", ".join(names) + rest
    return found


def _refused_by_ggml(encoding: str) -> str:
    for theirs, own in GGML_NAMES.items():
        if encoding == own:
            return f"{own} in groups of 32 is {theirs} in GGUF; write {theirs}"
    if encoding in FLOAT_DTYPES:
        return _float(encoding)
    return f"quantize.ggml leaves the rounding to libggml, which is not asked for {encoding}; use {_others(encoding)}"


def _float(encoding: str) -> str:
    other = ", or use quantize.cast" if encoding in STORES["quantize.cast"] else ""
    return f"{encoding} has no codes to choose; name it under keep or embeddings{other}"


def _others(encoding: str) -> str:
    """The steps that take an encoding, e.g. "quantize.ggml or hqq"."""
    names = [step.removeprefix("quantize.") for step, names in STORES.items() if encoding in names]
    return f"quantize.{' or '.join(part for part in (', '.join(names[:-1]), names[-1]) if part)}"
