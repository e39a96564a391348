"""Bits per byte: how much worse the model compresses held-out documents, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Documents, Example, LanguageModel, Score
from evaluators._lm_eval import Encoder
from evaluators._windows import WindowEvaluator, summed_nll


class BitsPerByte(WindowEvaluator):
    """Increase of bits per UTF-8 byte over the reference; comparable across tokenizers, unlike perplexity."""

    name: ClassVar[str] = "bits_per_byte"
    unit: ClassVar[str] = "bits per byte"
    definition: ClassVar[str] = (
        "negative log-likelihood / (ln 2 · UTF-8 bytes) of documents, each after a begin- (else end-) of-sequence "
        "token; windows overlap by one token, so that each token is predicted once; the loss is the paired "
        "difference. What is counted as tokens are bytes."
    )
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_increase", "max_gain"})
    whole: ClassVar[bool] = True

    max_increase: float = Field(gt=0, le=8, allow_inf_nan=False)  # bits per byte
    max_gain: float = Field(0.1, gt=0, allow_inf_nan=False)  # a fall that is proven to be larger needs a review

    @property
    def margin(self) -> float:
        """Largest increase, in bits per byte."""
        return self.max_increase

    @property
    def plausible_gain(self) -> float:
        """Largest fall, in bits per byte."""
        return self.max_gain

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """The model's own, which also knows what stands before a document."""
        return Encoder(model)

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per document with text; its payload is the number of its bytes, and its windows."""
        if data.length < 2:
            raise RecipeError(f"windows of {data.length} tokens predict nothing; use a length of at least 2")
        assert isinstance(encode, Encoder), "it needs the token that stands before a document"
        found = []
        for name, text in data.documents:
            tokens = (encode.start, *encode(text))
            steps = range(0, len(tokens) - 1, data.length - 1)
            windows = tuple(tokens[at : at + data.length] for at in steps)
            if text and windows:
                found.append(Example(name, name, (len(text.encode()), windows)))
        return found

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Bits over all tokens, weighed by bytes, per document."""
        summed = summed_nll(model, [replace(example, payload=example.payload[1]) for example in batch])
        return [
            Score(example.id, nats / math.log(2), example.payload[0])
            for example, (nats, _) in zip(batch, summed, strict=True)
        ]
