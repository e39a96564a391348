"""Latency: how long one token takes to decode in the artifact's runtime, against the baseline in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field

from compress import timing
from compress.errors import GateInconclusive
from compress.interfaces import Aspect, Documents, Evaluator, Example, LanguageModel, Score, Streaming

TEXT = "The small boat left the harbour before the sun had risen."
ROUNDS = 400


class Latency(Evaluator):
    """Ratio of the times per decoded token, paired in rounds that are interleaved; for the gates of exports alone.

    Each round times both models on the same tokens, one after the other, and rounds take turns at who is first. The
    loss is the logarithm of the ratio. Its bound is asymptotic, and takes rounds for independent: a machine that
    changes its pace slows both models of a round.
    """

    name: ClassVar[str] = "latency"
    aspect: ClassVar[Aspect] = "efficiency"
    unit: ClassVar[str] = "log ratio of times"
    definition: ClassVar[str] = (
        "time per token decoded through the key-value cache after a prompt, in the artifact's runtime, divided by the "
        "baseline's in torch on the same threads; the loss is its logarithm, paired by interleaved rounds."
    )
    relative: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_ratio"})

    max_ratio: float = Field(gt=0, le=10, allow_inf_nan=False)
    prompt_tokens: int = Field(16, ge=1)
    new_tokens: int = Field(8, ge=1)

    @property
    def margin(self) -> float:
        """Logarithm of the largest ratio; negative where the artifact must be faster."""
        return math.log(self.max_ratio)

    @property
    def window(self) -> int:
        """Tokens of a round."""
        return self.prompt_tokens + self.new_tokens

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """The clock: a document is a round."""
        return [Documents("clock", [(f"round {i}", TEXT) for i in range(ROUNDS)], "clock", self.window)]

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """The same tokens in every round: what they say does not matter to speed."""
        tokens = encode(TEXT)
        window = tuple(tokens[i % len(tokens)] for i in range(self.window))
        return [Example(id, id, window) for id, _ in data.documents]

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Logarithm of the ratio of times of each round; the times themselves, in ms per token, beside it."""
        if reference is None:
            raise TypeError("latency compares with a reference model, and none was given")
        pair = [_streaming(model), _streaming(reference)]
        for streaming in pair:  # untimed: caches are made, and threads are awake
            self._seconds_per_token(streaming, batch[0].payload)
        scores = []
        for i, example in enumerate(batch):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            taken = {k: self._seconds_per_token(pair[k], example.payload) for k in order}
            times = {"model_ms": 1e3 * taken[0], "reference_ms": 1e3 * taken[1]}
            scores.append(Score(example.id, math.log(taken[0] / taken[1]), 1.0, times))
        return scores

    def _seconds_per_token(self, model: Streaming, window: Sequence[int]) -> float:
        """Only decoding is timed: the prompt before it gives the other runtime's threads time to fall asleep."""
        return timing.stream_seconds(model, window, self.prompt_tokens)[1] / self.new_tokens

    def value(self, scores: Sequence[Score]) -> float:
        """The ratio: the geometric mean over rounds."""
        return math.exp(super().value(scores))

    def display(self, loss: float) -> str:
        """The change of the time per token."""
        return f"{math.expm1(loss):+.1%} time per token"

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Geometric means of both times, in ms per token."""
        names = ("model_ms", "reference_ms")
        return {name: math.exp(sum(math.log(s.extra[name]) for s in scores) / len(scores)) for name in names}


def _streaming(model: LanguageModel) -> Streaming:
    if not isinstance(model, Streaming):
        raise GateInconclusive(f"{model.runtime} cannot be timed: its model has no `stream`")
    return model
