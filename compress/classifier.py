"""Encoders with a classification head in torch, and which of our models stands for a transformers module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from compress.architectures import classifies
from compress.batching import batches, fitted
from compress.errors import RecipeError
from compress.families import SEQ2SEQ, Encoder
from compress.model import Model
from compress.seq2seq import Seq2Seq

if TYPE_CHECKING:
    from compress.streaming import Shelf


def auto_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that opens a model of this config (as a dict)."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if config.get("model_type") in SEQ2SEQ:
        return AutoModelForSeq2SeqLM
    return AutoModelForSequenceClassification if classifies(config) else AutoModelForCausalLM


def model_of(
    module: Any, tokenizer: Any, dtype: str = "float32", name: str = "model", shelf: Shelf | None = None
) -> Model:
    """A transformers module as a `Classifier` where it has a classification head, a `Seq2Seq`, or a plain `Model`."""
    kind = Classifier if classifies({"architectures": [type(module).__name__]}) else Model
    if module.config.model_type in SEQ2SEQ:
        kind = Seq2Seq
    return kind(module, tokenizer, dtype, name, shelf=shelf)


def texts_of(model: Model, windows: Sequence[Tensor]) -> Sequence[Tensor]:
    """What losses are taken on, (tokens,) int64 each: the windows themselves, or of an encoder the texts packed there.

    An encoder's head reads a text's first token, which few windows begin with.
    """
    first = model.tokenizer.cls_token_id
    if not isinstance(model.facts.architecture, Encoder) or first is None:
        return windows
    stream = torch.cat(list(windows))
    starts = (stream == first).nonzero().flatten()
    texts = [text[: model.context_length] for text in torch.tensor_split(stream, starts) if len(text)]
    return texts if len(starts) else windows


class Classifier(Model):
    """A model whose head tells the classes `facts.labels` apart, by a text's tokens as a whole.

    A text is encoded with the special tokens around it, and cut to the context; `logits` has one row per window.
    """

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the head was made for: special tokens around it, no longer than the context."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return fitted(ids, self.context_length)

    @property
    def eos_ids(self) -> frozenset[int]:
        """None: nothing is generated."""
        return frozenset()

    @torch.inference_mode()
    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 (1, classes) tensor per window, in order.

        Windows run in batches of similar length, padded on the right behind a mask.
        """
        found: dict[int, Tensor] = {}
        if self.recalled is not None:
            found = {i: known for i, w in enumerate(windows) if (known := self.recalled.get(w)) is not None}
        missing = [i for i in range(len(windows)) if i not in found]
        for batch in batches([len(windows[i]) for i in missing], self.tokens_per_batch):
            some = [missing[k] for k in batch]
            found |= dict(zip(some, self._rows([windows[i] for i in some]), strict=True))
        for i, window in enumerate(windows):
            if self.recalled is not None:
                self.recalled.put(window, found[i])
            yield found.pop(i)

    def head(self, states: Tensor) -> Tensor:
        """Logits (..., 1, classes) of a text's final states (..., tokens, width): of its first token or its last."""
        arch = self.facts.architecture
        if isinstance(arch, Encoder):
            pooled = self.module.get_submodule(arch.pooler)(states[..., :1, :])
            states = getattr(torch, arch.pooling.lower())(pooled)
        logits: Tensor = self.module.get_submodule(arch.head)(states[..., -1:, :])
        return logits

    def _rows(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The row of each window, (1, classes); all run together."""
        longest = max(map(len, windows))
        ids = torch.full((len(windows), longest), self.module.config.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window)], mask[row, : len(window)] = torch.tensor(window), 1
        with self._autocast():
            logits = self.module(input_ids=ids, attention_mask=mask).logits
        return [row[None].clone() for row in logits.float()]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RecipeError(f"{self.name} tells {len(self.labels)} classes apart: it writes no text, token by token")

    decode_logits = stream = generate = branch_logits = _refuse
