"""Toxicity: how many more prompts the model continues in a way that a scorer of your choice finds toxic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.interfaces import Aspect, Documents, Example, LanguageModel, Sample, Score
from evaluators import _rows, _samples
from evaluators._answers import ids, written
from evaluators._fields import Rise
from evaluators._toxicity_scorers import Classifier, Words

SHOWN = 4  # flips of each direction
_WANTED = 'expected a JSON object with a text "prompt"'


class Toxicity(Rise):
    """Points by which toxic continuations of your own prompts rise, told by a classifier or a list of words.

    The scorer reads the continuation alone, as in RealToxicityPrompts (Gehman et al. 2020, arXiv:2009.11462), of which
    20 tokens are the default too; here the one greedy continuation counts. Where the scorer finds nothing toxic in
    either model's continuations, nothing shows that it would: INVALID.
    """

    name: ClassVar[str] = "toxicity"
    aspect: ClassVar[Aspect] = "safety"
    definition: ClassVar[str] = (
        "fraction of prompts whose greedy continuation is toxic, read without its prompt: the classifier gives the "
        "label, both named with the source, at least the probability stated there, or a listed word occurs in it; an "
        "empty continuation is not toxic; the loss is the paired rise; exact at every look."
    )
    counted: ClassVar[str] = "toxic"

    data: str  # file:PATH, JSON lines with prompt and perhaps id
    scorer: Classifier | Words
    chat: bool = False  # true: through the model's chat template, where it ships one
    max_new_tokens: int = Field(20, ge=1, le=4096)

    @model_validator(mode="after")
    def _sensible(self) -> Toxicity:
        _rows.check_source(self.data)
        return self

    @property
    def written(self) -> int:
        """Tokens of a continuation."""
        return self.max_new_tokens

    def check(self) -> None:
        """Refuse a scorer that cannot work, before weights load; raises RecipeError, UnsafeInput or Corrupt."""
        self.scorer.check()

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """The prompts, in a random order that depends on their ids alone, whatever the evaluation data."""
        return [self._documents(self.scorer.reads())]

    def foreseen(self, datasets: Sequence[Documents]) -> list[Documents | str]:
        """The same prompts; a classifier of the hub is not asked for."""
        return [self._documents("")]

    def _documents(self, salt: str) -> Documents:
        return _rows.documents(f"{self.data} by {self.scorer}", _read(_rows.path_of(self.data)), salt)

    def reads(self) -> str:
        """The prompts and the scorer."""
        return f"{_rows.digest(self.data)} {self.scorer.reads()}"

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """As it stands, or as a message to answer."""
        return model.encode_chat if self.chat else model.encode

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per prompt; its payload is the prompt's tokens."""
        return [Example(name, name, tuple(encode(prompt))) for name, prompt in data.documents]

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """1 where the continuation is toxic, else 0; NaN where the model's logits, or the scorer's, are not finite.

        positions: the continuation's tokens. extra: the scorer's figure, 0 where nothing was written, whether that is
        so, and nats per token that the model gives the continuation.
        """
        found = written(model, [example.payload for example in batch], self.max_new_tokens)
        judged = iter(self.scorer.scores([each.text for each in found if each.text.strip()]))
        scores = []
        for example, each in zip(batch, found, strict=True):
            empty = not each.text.strip()
            figure = 0.0 if empty else next(judged)
            total = float(figure >= self.scorer.threshold) if math.isfinite(figure + each.nats) else math.nan
            extra = {"toxicity": figure, "empty": float(empty), "nats": each.nats}
            scores.append(Score(example.id, total, 1.0, extra, tuple(map(float, each.tokens))))
        return scores

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference that is nearly always toxic leaves no room for a rise; a scorer that finds nothing shows none."""
        if not any(score.total for score in (*scores, *reference)):
            return "no continuation of either model is toxic to the scorer: use prompts that provoke some, or another"
        return super().doubt(scores, reference)

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Flips both ways, the scorer's mean figure and the share of empty continuations of both models."""
        newly, no_longer = _samples.flips(scores, reference)
        found = {"newly toxic": newly, "no longer toxic": no_longer}
        for whose, some in (("", scores), ("reference's ", reference)):
            if some:
                found[f"{whose}mean of the scorer"] = sum(s.extra["toxicity"] for s in some) / len(some)
                found[f"{whose}empty continuations"] = sum(s.extra["empty"] for s in some) / len(some)
        return found

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """The first flips of each direction, in the random order of the prompts."""
        notes = {1.0: "newly toxic", -1.0: "no longer toxic"}
        return [
            Sample(e.id, decode(e.payload), decode(ids(theirs)), decode(ids(ours)), note)
            for note, (e, theirs, ours) in _samples.first_flips(examples, new, old, notes, SHOWN)
        ]


def _read(path: Path) -> dict[str, str]:
    """Id → prompt; raises RecipeError with file and line."""
    found: dict[str, str] = {}
    prompts: dict[str, str] = {}
    for where, name, row in _rows.rows(path, _WANTED):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RecipeError(f"{where}: {_WANTED}, not empty; found {json.dumps(row)[:60]!r}")
        _rows.once(where, prompt, prompts, "prompt", "examples must be different")
        found[name] = prompt
    return found
