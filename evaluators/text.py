"""Text: how much worse the model's written answers match their references, by a metric of one's choice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.interfaces import Documents, Example, LanguageModel, Sample, Score
from evaluators import _bertscore, _rows, _samples, _text_metrics, _wordnet
from evaluators._answers import ids, written
from evaluators._fields import Drop

SHOWN = 6
_WANTED = 'expected a JSON object with a text "prompt" and "reference" or a list "references"'


class Text(Drop):
    """Points lost of BLEU, chrF, ROUGE, METEOR, BERTScore, exact match or F1 on your own prompts with references.

    Every greedy answer is scored on its own and paired with the baseline's; the mean difference is bounded exactly,
    whatever its distribution. A baseline that earns hardly anything proves nothing: INVALID.
    """

    name: ClassVar[str] = "text"
    definition: ClassVar[str] = (
        "mean over prompts of the metric, named with the source, of the greedy answer (cut at the first of `until`) "
        "against its references, in [0, 1]; the loss is the paired mean fall; exact at every look."
    )

    data: str  # file:PATH, JSON lines with prompt, reference or references, and perhaps id
    metric: _text_metrics.Metric
    tokenize: _text_metrics.Tokenize = "13a"  # of BLEU; zh for Chinese
    bertscore: _bertscore.BertScore | None = None  # the encoder of the metrics bertscore, bertscore_precision, _recall
    wordnet: str | None = Field(None, min_length=1)  # a folder with WordNet's files, for the metric meteor
    chat: bool = True  # through the model's chat template, where it ships one; false for plain continuations
    until: tuple[str, ...] = Field((), strict=False)  # texts that end an answer, e.g. a newline
    max_new_tokens: int = Field(64, ge=1, le=4096)

    @model_validator(mode="after")
    def _sensible(self) -> Text:
        _rows.check_source(self.data)
        if self.tokenize != "13a" and self.metric != "bleu":
            raise ValueError(f"tokenize is for the metric bleu, not for {self.metric}; drop it")
        if (self.bertscore is not None) != (self.metric in _bertscore.FIGURES):
            lacks = "needs" if self.bertscore is None else "has no use for"
            raise ValueError(f"the metric {self.metric} {lacks} bertscore: {{encoder: FOLDER}}")
        if (self.wordnet is not None) != (self.metric == "meteor"):
            lacks = "needs" if self.wordnet is None else "has no use for"
            raise ValueError(f"the metric {self.metric} {lacks} wordnet: FOLDER (meteor_stem does without)")
        if not all(self.until):
            raise ValueError("until holds an empty text, which would end every answer before it begins")
        return self

    @property
    def written(self) -> int:
        """Tokens of an answer."""
        return self.max_new_tokens

    def check(self) -> None:
        """Refuse an encoder or WordNet that is not there, before weights load; raises RecipeError."""
        if self.bertscore is not None:
            self.bertscore.check()
        if self.wordnet is not None:
            _wordnet.check(self.wordnet)

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """The rows of the file, in a random order that depends on their ids alone, whatever the evaluation data."""
        return [self._documents(self._instrument())]

    def foreseen(self, datasets: Sequence[Documents]) -> list[Documents | str]:
        """The same rows; an encoder of the hub is not asked for."""
        return [self._documents("" if self.bertscore else self._instrument())]

    def _documents(self, instrument: str) -> Documents:
        rows, within = _read(_rows.path_of(self.data), self.metric), self.bertscore and f" in {self.bertscore}"
        return _rows.documents(f"{self.data} by {self.metric}{within or ''}", rows, instrument)

    def _instrument(self) -> str:
        """What computes the metric, as a part of cache keys: the library's name and version, digests of what it reads.

        Downloads an encoder of the hub.
        """
        if self.bertscore:
            return self.bertscore.digest()
        library = _text_metrics.library(self.metric)
        return f"{library} {_wordnet.digest(self.wordnet)}" if self.wordnet else library

    def reads(self) -> str:
        """The file, and what computes the metric."""
        return f"{_rows.digest(self.data)} {self._instrument()}"

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """As a message to answer, or as it stands."""
        return model.encode_chat if self.chat else model.encode

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per row; its payload is the prompt's tokens and the references."""
        found = []
        for name, text in data.documents:
            prompt, *references = json.loads(text)
            found.append(Example(name, name, (tuple(encode(prompt)), tuple(references))))
        return found

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """1 less the metric: what is missing to a perfect answer. NaN where the model's logits are not finite.

        positions: the answer's tokens. extra: nats per token that the model gives it, in which different weights
        differ even where their answers do not.
        """
        answers = written(model, [example.payload[0] for example in batch], self.max_new_tokens)
        measure = self._measure()
        scores = []
        for example, answer in zip(batch, answers, strict=True):
            earned, figures = measure(self._cut(answer.text), example.payload[1])
            total = 1 - earned if math.isfinite(answer.nats) else math.nan
            extra = {"nats": answer.nats, **figures}
            scores.append(Score(example.id, total, 1.0, extra, tuple(map(float, answer.tokens))))
        return scores

    def _measure(self) -> Callable[[str, Sequence[str]], tuple[float, Mapping[str, float]]]:
        """A function of an answer and its references: the metric, and further figures for the report."""
        if self.bertscore is None:
            plain = _text_metrics.scorer(self.metric, self.tokenize, self.wordnet)
            return lambda answer, references: (plain(answer, references), {})
        rows = _read(_rows.path_of(self.data), self.metric).values() if self.bertscore.idf else ()
        judged = _bertscore.scorer(self.bertscore, [text for row in rows for text in json.loads(row)[1:]])

        def match(answer: str, references: Sequence[str]) -> tuple[float, Mapping[str, float]]:
            figures = judged(answer, references)
            return figures[_bertscore.FIGURES[self.metric]], figures

        return match

    def _cut(self, text: str) -> str:
        """What is compared with the references: up to the end of the answer, or to the first text of `until`."""
        ends = [at for at in map(text.find, self.until) if at >= 0]
        return text[: min(ends, default=len(text))].strip()

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference that earns little leaves no room for a loss beyond the margin."""
        return self.earned(reference)

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Answers that match worse and better than the reference's, the same ones, and their length."""
        pairs = list(zip(reference, scores))
        found = {"tokens per answer": sum(len(s.positions) for s in scores) / len(scores)}
        for figure in _bertscore.FIGURES.values() if self.bertscore else ():
            for whose, some in (("", scores), ("reference's ", reference)):
                if some:
                    found[f"{whose}{figure}"] = sum(s.extra[figure] for s in some) / len(some)
        if pairs:
            found["worse answers"] = float(sum(new.total > old.total for old, new in pairs))
            found["better answers"] = float(sum(new.total < old.total for old, new in pairs))
            same = sum(tuple(new.positions) == tuple(old.positions) for old, new in pairs)
            found["answers equal to the reference's"] = same / len(pairs)
        return found

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """The answers that lost most, and then the first of those that are left."""
        return [
            Sample(e.id, decode(e.payload[0]), decode(ids(theirs)), decode(ids(ours)), self._note(e, theirs, ours))
            for e, theirs, ours in _samples.most_changed(examples, new, old, SHOWN)
        ]

    def _note(self, example: Example, old: Score, new: Score) -> str:
        points = f"{self.metric} {100 - 100 * old.total:.0f} to {100 - 100 * new.total:.0f}"
        return f"{points}; reference: {example.payload[1][0]}"


def _read(path: Path, metric: str) -> dict[str, str]:
    """Id → prompt and references as JSON, row by row; raises RecipeError, or Corrupt for what is no text."""
    found: dict[str, str] = {}
    prompts: dict[str, str] = {}
    for where, name, row in _rows.rows(path, _WANTED):
        prompt, references = _row(where, row)
        for reference in references:
            if reason := _text_metrics.unscorable(metric, reference):
                raise RecipeError(f"{where}: reference {reference[:40]!r}: {reason}")
        _rows.once(where, prompt, prompts, "prompt", "give one row all references")
        found[name] = json.dumps([prompt, *references], ensure_ascii=False)
    return found


def _row(where: str, row: dict[str, Any]) -> tuple[str, list[str]]:
    references = row.get("references", [row.get("reference")])
    texts: list[Any] = [row.get("prompt"), *references] if isinstance(references, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RecipeError(f"{where}: {_WANTED}, none of them empty; found {json.dumps(row)[:60]!r}")
    return texts[0], texts[1:]
