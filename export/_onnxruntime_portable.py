"""A portable ONNX folder executed by onnxruntime: no key-value cache, so that each token reads all before it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures import Facts
from compress.errors import Corrupt, RecipeError
from compress.numerics.sampling import Pick, greedy
from export._onnxruntime import OnnxModel, Shapes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class PortableModel(OnnxModel):
    """`LanguageModel` over a graph of standard operators.

    onnxruntime otherwise decodes the weights again at each call (1.6 ns per weight); the numbers are the same.
    """

    _settings: Mapping[str, str] = {"session.disable_quant_qdq": "1"}

    def __init__(self, folder: Path, graph: Any):
        super().__init__(folder, graph)
        self.compute += ", no cache"

    def _read_shapes(self, folder: Path) -> Shapes:
        """Shapes of config.json and generation_config.json; raises Corrupt."""
        try:
            found = [
                json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "generation_config.json")
            ]
            facts, eos = Facts.from_config(found[0]), found[1].get("eos_token_id")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
            raise Corrupt(f"{folder}: its configuration cannot be read: {error!r}") from error
        ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return Shapes(
            facts.layers, facts.kv_heads, facts.head_size, facts.vocabulary, facts.context_length, frozenset(ends)
        )

    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """Logits of one window, (len(window), vocabulary): each row from its own pass over all tokens up to it."""
        import torch

        rows = [torch.from_numpy(self._last(window[: t + 1])) for t in range(len(window))]
        return torch.stack(rows)

    def stream(self, window: Sequence[int], prefill: int) -> Iterator[Tensor]:
        """Logits after the first `prefill` tokens, and after each further one, (vocabulary,) each."""
        import torch

        for t in range(prefill, len(window) + 1):
            yield torch.from_numpy(self._last(window[:t]))

    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """Continuation, up to and including the first end-of-sequence token; pick: logits → token."""
        limit = min(len(prompt) + max_new_tokens, self.context_length)
        self._ids(prompt)
        tokens: list[int] = []
        while len(tokens) < limit - len(prompt):
            tokens.append(pick(self._last([*prompt, *tokens])))
            if tokens[-1] in self.eos_ids:
                break
        return tokens

    def _in_chunks(self, window: Sequence[int]) -> Tensor:
        """Without a cache, a long window is read at once."""
        import torch

        return torch.from_numpy(self._prefill([window])[0])

    def _last(self, window: Sequence[int]) -> np.ndarray:
        row: np.ndarray = self._prefill([window])[0, -1]
        return row

    def _feed(self, batch: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        return self._padded(batch)
