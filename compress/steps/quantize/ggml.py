"""llama.cpp's own quantization types, rounded by its own library with importances from calibration."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding
from compress.errors import NumericalError
from compress.interfaces import Context, Step
from compress.steps.quantize._fields import check_fit, refuse_encoded

if TYPE_CHECKING:
    from torch import Tensor

    from compress.blocks import Block
    from compress.model import Model

TypeName = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"
]  # fmt: skip
KeptName = TypeName | Literal["fp16", "bf16", "fp32"]
OURS = {"q4_0": "int4", "q5_0": "int5", "q8_0": "int8", "iq4_nl": "iq4_nl"}  # types that hold our codes and scales


class Ggml(Step):
    """Linears of the blocks in one of llama.cpp's types, by libggml with an importance per input channel.

    The importance is the mean square of the channel over the calibration tokens, as in llama.cpp's importance
    matrix. keep: glob over module names → type; the last match wins. embeddings: type of the token embedding and
    the output head (tied or not), without importances; null leaves them in float32. The K-types and iq4_xs have
    blocks of 256 channels: where these do not divide a matrix, the step is refused, and no larger type is taken
    in silence.
    """

    name: ClassVar[str] = "quantize.ggml"
    packs: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    type: TypeName = "q4_k"
    keep: dict[str, KeptName] = Field(default_factory=dict)
    embeddings: KeptName | None = "q8_0"

    def check(self, facts: Facts) -> None:
        """Refuse blocks that do not divide the input channels, and patterns that match nothing."""
        check_fit(facts, self.keep, self.encodings(facts))

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """Encoding per tensor name; tensors left in float32 are absent."""
        return {tensor: _encoding(kind) for tensor, kind in self._types(facts).items()}

    def apply(self, model: Model, context: Context) -> None:
        """Round each block, its importances taken behind the rounded blocks before it, then the embeddings."""
        from compress.blocks import walk

        refuse_encoded(model, self.encodings(model.facts))
        types = self._types(model.facts)
        for block in walk(model, context.calibration, context.progress):
            for name, importance in _importances(block).items():
                if kind := types.pop(f"{name}.weight", None):
                    _store(model, f"{name}.weight", kind, importance)
        for tensor, kind in types.items():
            _store(model, tensor, kind, None)

    def _types(self, facts: Facts) -> dict[str, KeptName]:
        chosen: dict[str, KeptName] = {f"{name}.weight": self.type for name in facts.linears}
        for pattern, kind in self.keep.items():
            chosen.update({f"{name}.weight": kind for name in facts.linears if fnmatchcase(name, pattern)})
        if self.embeddings is not None:
            chosen |= {name: self.embeddings for name in facts.matrices if name not in chosen}
        return {tensor: kind for tensor, kind in chosen.items() if kind != "fp32"}


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
