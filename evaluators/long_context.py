"""Long context: how much worse the model predicts text that it has read far into, which short windows cannot see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from compress.errors import GateInconclusive
from compress.interfaces import Documents, Example, LanguageModel, Score
from evaluators._census import Census
from evaluators._perplexity import PerplexityIncrease

SEPARATOR = "\n\n"  # between documents, as between paragraphs
CHARACTERS_PER_TOKEN = 8  # more than ordinary text has: English takes 4.5


class LongContext(Census, PerplexityIncrease):
    """Increase of perplexity on the second half of long windows, each packed from consecutive documents.

    A few windows of each source, the same in every run: they show what breaks with distance (rotary embeddings,
    a cache, a sliding window), not what the average document loses.
    """

    name: ClassVar[str] = "long_context"
    definition: ClassVar[str] = (
        "exp of the mean negative log-likelihood per token over the second half of long windows, packed from the "
        "source's first documents; the loss is the difference in nats, on these windows and no others."
    )

    length: int = Field(2048, ge=16)
    windows: int = Field(1, ge=1, le=64)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.length

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """Each source as one document: as many of its first ones as surely hold the tokens of the windows."""
        return [self._joined(data) for data in datasets]

    def _joined(self, data: Documents) -> Documents:
        texts, characters = [], 0
        for _, text in data.documents:
            if characters >= CHARACTERS_PER_TOKEN * self.length * self.windows:
                break
            texts.append(text)
            characters += len(text)
        return replace(data, documents=[("joined", SEPARATOR.join(texts))], length=self.length)

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per window, its payload the window's tokens; raises GateInconclusive for too short a source."""
        tokens = [token for _, text in data.documents for token in encode(text)]
        needed = self.length * self.windows
        if len(tokens) < needed:
            raise GateInconclusive(
                f"{data.source} holds {len(tokens):,} tokens, and {self.windows} x {self.length:,} are needed; "
                "add documents"
            )
        cut = [tuple(tokens[start : start + self.length]) for start in range(0, needed, self.length)]
        return [Example(f"window {i}", f"window {i}", window) for i, window in enumerate(cut)]

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Summed negative log-likelihood in nats over the tokens of each window's second half."""
        if self.length > model.context_length:
            raise GateInconclusive(
                f"windows of {self.length:,} tokens exceed the model's context of {model.context_length:,} tokens"
            )
        # Window by window: the logits of one may take 400 MB, and are gone before those of the next are made.
        return [_second_half(model, example) for example in batch]


def _second_half(model: LanguageModel, example: Example) -> Score:
    import torch

    from compress.numerics.divergence import token_nll

    window, half = example.payload, len(example.payload) // 2
    rows = next(model.logits([window]))
    nll = token_nll(rows[half - 1 : -1], torch.tensor(window[half:]))  # row t predicts token t + 1
    return Score(example.id, float(nll.sum()), len(nll))
