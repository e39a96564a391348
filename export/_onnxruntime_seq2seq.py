"""A portable ONNX folder of an encoder-decoder, executed by onnxruntime: a source is read once, a target all over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compress.batching import batches
from compress.errors import Corrupt, RecipeError
from compress.numerics.sampling import Pick, greedy
from compress.pairs import parted, split, window_of
from export import _onnx_file
from export._onnxruntime import TOKENS_PER_RUN, compute_of, session
from export._onnxruntime_portable import PortableModel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class OnnxSeq2Seq(PortableModel):
    """What `compress.pairs` says of windows, over two graphs of standard operators."""

    paired = True
    _graph_file = _onnx_file.DECODER

    def __init__(self, folder: Path, encoder: Any, decoder: Any):
        super().__init__(folder, decoder)
        self._encoder = session(folder / _onnx_file.ENCODER, self._settings)
        self.compute = f"{compute_of(encoder, decoder)}, no cache"
        self.start = _start(folder)
        self._tokenizer.no_padding()  # some folders ask for it
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Token ids of a pair, as the torch model has them."""
        source, target = (self._tokenizer.encode(part).ids for part in parted(text))
        return window_of(source, target, self.start, self.context_length // 2)

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 (tokens from the start on, vocabulary) tensor per window, in order."""
        import torch

        pairs = [self._split(window) for window in windows]
        found: dict[int, np.ndarray] = {}
        for batch in batches([len(window) for window in windows], TOKENS_PER_RUN):
            source = self._read([pairs[i][0] for i in batch])
            rows = self._write([pairs[i][1] for i in batch], source)
            found |= {i: rows[row, : len(pairs[i][1])] for row, i in enumerate(batch)}
        for i in range(len(windows)):
            yield torch.from_numpy(found.pop(i))

    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """The same for one window, each row from its own pass over the target up to it."""
        import torch

        ids, target = self._split(window)
        source = self._read([ids])
        return torch.from_numpy(_stacked([self._write([target[: t + 1]], source)[0, -1] for t in range(len(target))]))

    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """What follows a source and the start of a target, up to and including what ends it."""
        ids, target = self._split(prompt)
        source, tokens = self._read([ids]), list[int]()
        while len(tokens) < max_new_tokens:
            tokens.append(pick(self._write([[*target, *tokens]], source)[0, -1]))
            if tokens[-1] in self.eos_ids:
                break
        return tokens

    def norm_outputs(self, norms: Sequence[str], window: Sequence[int]) -> list[Tensor]:
        """Output of each norm on one window, (tokens, width) each, by second sessions of the same graphs."""
        import torch

        ids, target = self._split(window)
        source = self._read([ids])
        feeds = {
            _onnx_file.ENCODER: self._padded([ids]),
            _onnx_file.DECODER: {"input_ids": self._padded([target])["input_ids"], **source},
        }
        found: dict[str, np.ndarray] = {}
        for file, feed in feeds.items():
            own = [norm for norm in norms if file.startswith(norm.partition(".")[0])]
            found |= dict(zip(own, self._values(file, own, feed), strict=True))
        return [torch.from_numpy(found[norm][0]) for norm in norms]

    def close(self) -> None:
        """Release both sessions."""
        super().close()
        del self._encoder

    def _split(self, window: Sequence[int]) -> tuple[list[int], list[int]]:
        self._ids(window)
        return split(window, self.start)

    def _read(self, sources: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """What the decoder is given of these sources, by its inputs' names."""
        feed = self._padded(sources)
        states = self._encoder.run(["last_hidden_state"], feed)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": feed["attention_mask"]}

    def _write(self, targets: Sequence[Sequence[int]], source: dict[str, np.ndarray]) -> np.ndarray:
        """Logits (targets, longest, vocabulary)."""
        feed = {"input_ids": self._padded(targets)["input_ids"], **source}
        logits: np.ndarray = self._session.run(["logits"], feed)[0]
        return logits

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RecipeError("this model reads a source and writes a target: it goes on with no text of its own")

    stream = encode_chat = _refuse


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    import numpy as np

    return np.stack(rows)


def _start(folder: Path) -> int:
    """The token that the decoder begins with; raises Corrupt."""
    try:
        return int(json.loads((folder / "generation_config.json").read_text("utf-8"))["decoder_start_token_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{folder}: its generation_config.json names no decoder_start_token_id: {error!r}") from error
