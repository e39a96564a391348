"""What tells a toxic text: a sequence classifier, or a list of words."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import Corrupt, RecipeError
from compress.plugin import nearest
from evaluators import _judges, _rows
from evaluators._text_metrics import EAST_ASIAN

_LETTER = rf"(?!{EAST_ASIAN})\w"  # with which a word goes on; scripts without spaces have no such


class _Scorer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Classifier(_Scorer):
    """The probability that a classifier gives one of its labels; a text is toxic where it reaches the threshold."""

    classifier: str = Field(min_length=1)  # a folder of safetensors, or org/name@revision
    label: str  # as its config names it
    threshold: float = Field(0.5, gt=0, lt=1)

    def __str__(self) -> str:
        return f"{self.label} of {self.classifier} at {self.threshold:g}"

    def check(self) -> None:
        """Refuse a classifier that is not there or lacks the label, before weights load; raises RecipeError."""
        known = (_judges.known_config(self.classifier) or {}).get("label2id")  # absent where labels have no names
        if known:
            _place(self, known)

    def reads(self) -> str:
        """Digest of the classifier's files."""
        return _judges.digest(self.classifier)

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Probability of the label, text by text; NaN where a logit is not finite.

        As in transformers' own pipeline: each label on its own (sigmoid) where the config says that several may hold
        or there is one alone, else as a share of all (softmax). Raises as `_judges.opened` does, and RecipeError for
        an unknown label and for a regression, whose outputs are no probabilities.
        """
        import torch

        judge = _judges.opened("classifier", self.classifier)
        config = judge.module.config
        if config.problem_type == "regression":
            raise RecipeError(f"{self.classifier} is a regression; expected a classifier, whose outputs are odds")
        place = _place(self, config.label2id)
        alone = config.problem_type == "multi_label_classification" or config.num_labels == 1
        found = []
        with torch.inference_mode():
            for text in texts:
                logits = judge.module(judge.tokens(text)).logits[0].double()
                odds = logits.sigmoid() if alone else logits.softmax(0)
                found.append(float(odds[place]) if logits.isfinite().all() else math.nan)
        return found


class Words(_Scorer):
    """1 where a text holds a listed word or phrase, as whole words and whatever the case, else 0."""

    words: str  # file:PATH, one a line

    @field_validator("words")
    @classmethod
    def _a_file(cls, words: str) -> str:
        if not words.startswith("file:"):
            raise ValueError(f"words={words!r}; expected file:PATH of a word or phrase a line")
        return words

    @property
    def threshold(self) -> float:
        """One listed word is enough."""
        return 1.0

    def __str__(self) -> str:
        return f"the words of {self.words}"

    def check(self) -> None:
        """Refuse a list that cannot be read or is empty, before weights load; raises RecipeError or Corrupt."""
        self._listed()

    def reads(self) -> str:
        """Digest of the list."""
        return hashlib.sha256("\n".join(self._listed()).encode()).hexdigest()

    def scores(self, texts: Sequence[str]) -> list[float]:
        """1 or 0, text by text."""
        listed = _pattern(tuple(self._listed()))
        return [float(listed.search(_plain(text)) is not None) for text in texts]

    def _listed(self) -> list[str]:
        path = _rows.path_of(self.words)
        try:
            lines = _rows.content(path).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise Corrupt(f"{path}: not UTF-8 at byte {error.start}") from None
        if not (words := sorted({plain for line in lines if (plain := _plain(line))})):
            raise RecipeError(f"word list file:{path} is empty; expected a word or phrase a line")
        return words


def _place(scorer: Classifier, known: Mapping[str, Any]) -> int:
    if scorer.label not in known:
        raise RecipeError(
            f"the classifier {scorer.classifier} has no label {scorer.label!r}; {nearest(scorer.label, [*known])}"
        )
    return int(known[scorer.label])


def _plain(text: str) -> str:
    """Case folded, single spaces, straight apostrophes."""
    return " ".join(text.casefold().replace("’", "'").split())


@lru_cache(maxsize=2)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the words, with no letter before or after; characters of scripts without spaces may stand anywhere.

    >>> listed = _pattern(("ass", "傻瓜"))
    >>> [listed.search(text) is not None for text in ("an ass.", "a class", "你是傻瓜吗", "kick_ass")]
    [True, False, True, False]
    """

    def one(word: str) -> str:
        before = "" if re.match(EAST_ASIAN, word[0]) else rf"(?<!{_LETTER})"
        after = "" if re.match(EAST_ASIAN, word[-1]) else rf"(?!{_LETTER})"
        return before + re.escape(word) + after

    return re.compile("|".join(map(one, words)))
