"""A portable ONNX folder of a classifier, executed by onnxruntime: one row of logits per text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compress.architectures import Facts
from compress.batching import batches, fitted
from compress.errors import Corrupt, RecipeError
from export._onnxruntime import TOKENS_PER_RUN, OnnxModel, Shapes
from export._onnxruntime_portable import PortableModel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class OnnxClassifier(OnnxModel):
    """What `compress.labels` says of a classifier, over a graph of standard operators."""

    _settings: Mapping[str, str] = PortableModel._settings

    def __init__(self, folder: Path, graph: Any):
        self._facts = _facts(folder)
        self.labels = self._facts.labels
        super().__init__(folder, graph)
        self._tokenizer.no_padding()  # some folders ask for it
        self._tokenizer.no_truncation()

    def _read_shapes(self, folder: Path) -> Shapes:
        f = self._facts
        return Shapes(f.layers, f.kv_heads, f.head_size, f.vocabulary, f.context_length, frozenset())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the head was made for: special tokens around it, no longer than the context."""
        return fitted(self._tokenizer.encode(text).ids, self.context_length)

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 (1, classes) tensor per window, in order; those of similar length run together."""
        import torch

        found: dict[int, np.ndarray] = {}
        for batch in batches([len(window) for window in windows], TOKENS_PER_RUN):
            found |= dict(zip(batch, self._prefill([windows[i] for i in batch]), strict=True))
        for i in range(len(windows)):
            yield torch.from_numpy(found[i][None])

    def _feed(self, batch: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        return self._padded(batch)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RecipeError(f"this model tells {len(self.labels)} classes apart: it writes no text, token by token")

    decode_logits = stream = generate = _refuse


def _facts(folder: Path) -> Facts:
    """Shapes and classes of a folder's config.json; raises Corrupt."""
    try:
        facts = Facts.from_config(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise Corrupt(f"{folder}: its configuration cannot be read: {error!r}") from error
    if not facts.labels:
        raise Corrupt(f"{folder}: its graph tells classes apart, and its configuration names none")
    return facts
