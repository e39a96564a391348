"""llama.cpp's own quantization types, rounded by its own library with importances from calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress import ggml_mixes
from compress.architectures import Facts
from compress.encodings import GGML_NAMES, EncodedTensor, Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context, Step
from compress.steps.quantize._fields import check_fit, judged, outside, refuse_encoded, selected
from compress.steps.quantize._folding import note_silence

if TYPE_CHECKING:
    from torch import Tensor

    from compress.blocks import Block
    from compress.model import Model

TypeName = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"
]  # fmt: skip
KeptName = TypeName | Literal["fp16", "bf16", "fp32"]
SmallBlock = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"]
OURS = {**GGML_NAMES, "iq4_nl": "iq4_nl"}  # types that hold our codes and scales


class Ggml(Step):
    """Linears of the blocks in one of llama.cpp's types, by libggml with an importance per input channel.

    The importance is the mean square of the channel over the calibration tokens, as in llama.cpp's importance
    matrix. type: of every linear (q4_k where nothing is given). preset: one of llama.cpp's named mixes instead, tensor
    by tensor the types that its own tool would choose. keep: glob over module names → type; the last match wins.
    embeddings: type of the token embedding and the output head (tied or not), without importances: "auto" is the
    preset's, or q8_0 beside a single type; null leaves them in float32. The K-types and iq4_xs have blocks of 256
    channels: where these do not divide a matrix, the step is refused, unless a fallback says what to store instead: a
    type with blocks of 32, or "llama.cpp" for what that takes by itself (a larger type, mostly).
    """

    name: ClassVar[str] = "quantize.ggml"
    version: ClassVar[int] = 2  # artifacts say what importances were measured on
    packs: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    type: TypeName | None = None
    preset: ggml_mixes.Preset | None = None
    fallback: SmallBlock | Literal["llama.cpp"] | None = None
    layers: tuple[str, ...] = Field(("*",), strict=False)  # a list fills a tuple
    keep: dict[str, KeptName] = Field(default_factory=dict)
    embeddings: KeptName | Literal["auto"] | None = "auto"

    @field_validator("type", "fallback", "keep", "embeddings", mode="before")
    @classmethod
    def _stores(cls, asked: object, info: ValidationInfo) -> object:
        return judged(cls.name, info, asked)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.type is not None and self.preset is not None:
            raise RecipeError(f"type={self.type} and preset={self.preset} both choose the types; leave one out")
        return self

    def check(self, facts: Facts) -> None:
        """Refuse blocks that do not divide the input channels, and patterns that match nothing."""
        if self.preset is not None and not ggml_mixes.covers(facts):
            raise RecipeError(
                f"preset {self.preset}: llama.cpp's mix for a {facts.architecture.model_type}, whose queries, keys and "
                "values are one matrix, is not known; name a type, e.g. type: q4_k"
            )
        if self.fallback is None and (misfits := self._misfits(facts)) and self.preset is not None:
            tensor, kind = next(iter(misfits.items()))
            width = facts.matrices[tensor][1]
            rest = f", nor do those of {len(misfits) - 1} more matrices" if len(misfits) > 1 else ""
            raise RecipeError(
                f"preset {self.preset}: {tensor} has {width} input channels, which {kind}'s blocks of "
                f"{ggml_mixes.block(kind)} do not divide{rest}; llama.cpp would store {_summary(self._stock(facts))} "
                "instead: ask for that with fallback: llama.cpp, or name a type, e.g. fallback: q4_0"
            )
        check_fit(facts, self.layers, self.keep, self.encodings(facts))

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """Encoding per tensor name; tensors left in float32 are absent."""
        return {tensor: _encoding(kind) for tensor, kind in self._types(facts).items()}

    def apply(self, model: Model, context: Context) -> None:
        """Round each block, its importances taken behind the rounded blocks before it, then the embeddings."""
        from compress.blocks import walk

        refuse_encoded(model, self.encodings(model.facts))
        types = self._types(model.facts)
        if misfits := self._misfits(model.facts):
            stored = _summary(types[tensor] for tensor in misfits if tensor in types)
            context.notes.append(
                f"{self.name}: {len(misfits)} of {len(types)} matrices have rows that blocks of 256 weights do not "
                f"divide ({_summary(misfits.values())} were asked for); fallback: {self.fallback} stores {stored}"
            )
        rounded = 0
        for block in walk(model, context.calibration, context.progress):
            importances = _importances(block)
            for names in block.stages:
                note_silence(context, names[0], importances[names[0]])
            for name, importance in importances.items():
                if kind := types.pop(f"{name}.weight", None):
                    _store(model, f"{name}.weight", kind, importance)
                    rounded += _encoding(kind).is_coded
        for tensor, kind in types.items():
            _store(model, tensor, kind, None)
        if rounded:
            model.importance = ggml_mixes.Importance(context.dataset, rounded, len(context.calibration))

    def _types(self, facts: Facts) -> dict[str, KeptName]:
        """The type of every tensor that is stored in one, after the fallback."""
        chosen = self._asked(facts)
        for tensor, kind in self._misfits(facts).items():
            if self.fallback == "llama.cpp":
                chosen[tensor] = cast(KeptName, ggml_mixes.fitted(kind, facts.matrices[tensor][1]))
            elif self.fallback is not None:
                chosen[tensor] = self.fallback
        return {tensor: kind for tensor, kind in chosen.items() if kind != "fp32"}

    def _asked(self, facts: Facts) -> dict[str, KeptName]:
        """The type of every tensor by preset or type, keep and embeddings, whatever its shape."""
        asked: dict[str, KeptName] = dict.fromkeys(facts.linears, self.type or "q4_k")
        if self.preset is not None:
            types = cast(dict[str, KeptName], ggml_mixes.types(self.preset, facts, importance=True))
            asked = {tensor.removesuffix(".weight"): kind for tensor, kind in types.items()}
        if self.preset is None or self.embeddings != "auto":
            outer: KeptName | None = "q8_0" if self.embeddings == "auto" else self.embeddings
            asked |= dict.fromkeys(outside(facts), outer or "fp32")
        return {f"{n}.weight": kind for n, kind in selected(facts, self.layers, self.keep, asked).items()}

    def _misfits(self, facts: Facts) -> dict[str, KeptName]:
        """The tensors whose rows no whole number of their type's blocks makes, with that type."""
        asked = self._asked(facts)
        return {t: kind for t, kind in asked.items() if facts.matrices[t][1] % ggml_mixes.block(kind)}

    def _stock(self, facts: Facts) -> list[str]:
        """What llama.cpp would store of the misfits."""
        return [ggml_mixes.fitted(kind, facts.matrices[t][1]) for t, kind in self._misfits(facts).items()]


def _summary(kinds: Iterable[str]) -> str:
    """Types with their numbers, e.g. "150 q5_0, 1 q8_0"."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


def _encoding(kind: KeptName) -> Encoding:
    return Encoding(OURS[kind], 32) if kind in OURS else Encoding(kind)


def _importances(block: Block) -> dict[str, Tensor]:
    """Mean square of every input channel, (m,) float32, by linear."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def add(names: tuple[str, ...], X: Tensor) -> None:
        squares = X.square().sum(0)
        for name in names:
            sums[name] = sums[name] + squares if name in sums else squares
            tokens[name] = tokens.get(name, 0) + len(X)

    block.observe(add)
    return {name: total / tokens[name] for name, total in sums.items()}


def _store(model: Model, tensor: str, kind: KeptName, importance: Tensor | None) -> None:
    """Round one tensor and hold it; raises NumericalError naming it."""
    from compress.numerics import ggml_blocks

    W, encoding = model.parameter(tensor).detach(), _encoding(kind)
    if not encoding.is_coded:
        model.store(tensor, EncodedTensor(encoding, W.half() if kind == "fp16" else W.bfloat16()))
        return
    try:
        packed = ggml_blocks.encode_blocks(W, kind, importance)
    except NumericalError as error:
        raise NumericalError(f"{tensor}: {error}") from None
    unpack = {"q4_0": ggml_blocks.unpack_q4_0, "q5_0": ggml_blocks.unpack_q5_0, "q8_0": ggml_blocks.unpack_q8_0}
    if kind in OURS:
        model.store(tensor, EncodedTensor(encoding, *unpack.get(kind, ggml_blocks.unpack_iq4_nl)(packed)))
    else:
        model.store(tensor, EncodedTensor(encoding, packed))
