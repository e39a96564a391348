"""Classification: how much worse the model tells your classes apart, by its head or by the words for them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.interfaces import Documents, Example, LanguageModel, Sample, Score
from evaluators import _choices, _head, _rows, _samples
from evaluators._fields import Drop

SHOWN = 6
TEXT = "{text}"
TEMPLATE = TEXT + "\nLabel:"
_WANTED = 'expected a JSON object with a text "text" and a "label"'


class Classification(Drop):
    """Points lost of accuracy, mean reciprocal rank or Brier score on your own labelled texts.

    A class is as likely as the words for it after the text, or, where the model has a classification head, as its head
    says of the text alone. Precision, recall, F1, AUC-ROC and calibration error of both models are in the report, with
    intervals of their change for reading: they are no means over examples, and decide nothing.
    labels: label in the data → the words for it, or the head's name or number of its class; by default the head's
    names or numbers stand in the data themselves.
    """

    name: ClassVar[str] = "classification"
    definition: ClassVar[str] = (
        "mean over texts of the metric, named with the source: accuracy (the right class is the likeliest; a tie is "
        "wrong), mrr (1 / rank of the right class, behind those it ties with) or brier (1 less half the squared "
        "distance between the classes' probabilities and the right class); a class' probability is that of its words "
        "after the text, as a share of all classes', or what the model's classification head says; the loss is the "
        "paired mean fall; exact at every look."
    )
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "answers"
    classifiers: ClassVar[bool] = True

    data: str  # file:PATH, JSON lines with text, label and perhaps id
    labels: dict[str, str] = Field(default_factory=dict, max_length=1000)  # e.g. {"1": " positive"}
    template: str = TEMPLATE  # what stands before the words; of no use to a head
    metric: Literal["accuracy", "mrr", "brier"] = "accuracy"

    @model_validator(mode="after")
    def _sensible(self) -> Classification:
        _rows.check_source(self.data)
        if self.template.count(TEXT) != 1:
            raise ValueError(
                f"template={self.template!r} holds {TEXT} {self.template.count(TEXT)} times, expected once"
            )
        if len(self.labels) == 1:
            raise ValueError("labels: one class is always right; name at least two")
        if not all(self.labels.values()) or len(set(self.labels.values())) < len(self.labels):
            raise ValueError("labels: the words for each class must be different, and not empty")
        return self

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse missing words for the classes, and what a head has no use for."""
        if not labels and not self.labels:
            raise RecipeError('labels are missing: the words for each class, e.g. {"1": " positive", "0": " negative"}')
        if labels and self.template != TEMPLATE:
            raise RecipeError("template: a classification head reads the text alone; leave it out")
        if labels and self.labels:
            _head.places(labels, list(self.labels.values()))

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """The rows of the file, in a random order, whatever the evaluation data."""
        return [_rows.documents(f"{self.data} by {self.metric}", self._read(_rows.path_of(self.data)))]

    def reads(self) -> str:
        """The file."""
        return _rows.digest(self.data)

    def _read(self, path: Path) -> dict[str, str]:
        """Id → place of the label and an item of `_choices`, as JSON."""
        found: dict[str, str] = {}
        texts: dict[str, str] = {}
        labels = self._labels()
        places, missing = {label: i for i, label in enumerate(labels)}, set(labels)
        for where, name, row in _rows.rows(path, _WANTED):
            text, label = row.get("text"), row.get("label")
            if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int):
                raise RecipeError(f"{where}: {_WANTED}, not empty; found {json.dumps(row)[:60]!r}")
            if str(label) not in places:
                raise RecipeError(f"{where}: the label {str(label)!r} is none of labels: {', '.join(places)}")
            _rows.once(where, text, texts, "text", "examples must be different")
            missing.discard(str(label))
            item = [[self.template.replace(TEXT, text), *labels.values()]]
            found[name] = json.dumps([places[str(label)], item], ensure_ascii=False)
        if missing:
            raise RecipeError(f"{path}: no row has the label {sorted(missing)[0]!r}; add some, or drop it from labels")
        return found

    def _labels(self) -> dict[str, str]:
        """`labels`, or those of the data, each standing for itself."""
        rows = () if self.labels else _rows.rows(_rows.path_of(self.data), _WANTED)
        return self.labels or {label: label for label in sorted({str(row.get("label")) for _, _, row in rows})}

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """The model's own, with the classes of its head if it has one."""
        return _head.encoder(model)

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per text; its payload is the place of its label and the tokens of each choice, see `Head`."""
        found = []
        for name, text in data.documents:
            place, item = json.loads(text)
            if isinstance(encode, _head.Head):
                tokens = self._of_head(item[0], encode)
            else:
                (tokens,) = _choices.sequences(json.dumps(item), encode, data.length)
            found.append(Example(name, name, (place, tokens)))
        return found

    def _of_head(self, item: Sequence[str], head: _head.Head) -> tuple[tuple[int, ...], ...]:
        """The choices of a head, which reads the text without the template."""
        prompt, *names = item
        before, after = self.template.split(TEXT)
        return head.choices(prompt[len(before) : len(prompt) - len(after)], names)

    def choices(self, example: Example) -> Sequence[Sequence[int]]:
        """The right one first."""
        place, tokens = example.payload
        return (tokens[place], *tokens[:place], *tokens[place + 1 :])

    def untestable(self, data: Documents) -> str:
        """Ranks and probabilities have no planted loss."""
        return "" if self.metric == "accuracy" else super().untestable(data) or f"none is known for {self.metric}"

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """What is missing of the metric. positions: the classes' probabilities. extra: the place of the right one."""
        found = _choices.log_probabilities(model, [example.payload[1] for example in batch])
        scores = []
        for example, logs in zip(batch, found, strict=True):
            place, probabilities = example.payload[0], _shares(logs)
            extra = {"label": float(place), "lead": logs[place] - max(x for i, x in enumerate(logs) if i != place)}
            scores.append(Score(example.id, self._missing(probabilities, place), 1.0, extra, probabilities))
        return scores

    def _missing(self, probabilities: Sequence[float], place: int) -> float:
        if not all(map(math.isfinite, probabilities)):
            return math.nan
        if self.metric == "brier":
            return sum((p - (i == place)) ** 2 for i, p in enumerate(probabilities)) / 2
        rank = sum(p >= probabilities[place] for p in probabilities)  # itself counted, and those that tie with it
        return float(rank > 1) if self.metric == "accuracy" else 1 - 1 / rank

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference that is hardly better than always giving the same answer leaves no loss to be seen."""
        earned, constant = self.value(reference), self._constant(reference)
        if earned > constant + 3 * self.margin:
            return ""
        return (
            f"the reference earns {100 * earned:.1f} points, and must earn more than three margins beyond the best "
            f"answer that never looks at the text, which earns {100 * constant:.1f}"
        )

    def _constant(self, scores: Sequence[Score]) -> float:
        """The most that one ranking, or one distribution, earns on these labels."""
        counts = Counter(s.extra["label"] for s in scores).values()
        shares = sorted((count / len(scores) for count in counts), reverse=True)
        if self.metric == "brier":
            return 1 - (1 - sum(share**2 for share in shares)) / 2
        return shares[0] if self.metric == "accuracy" else sum(s / rank for rank, s in enumerate(shares, start=1))

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Flips, and the figures of the whole set with their change, from a paired bootstrap over the texts."""
        import numpy as np

        from compress.numerics.classification import FIGURES, bootstrap

        def table(some: Sequence[Score]) -> Any:
            return np.array([s.positions for s in some], dtype=np.float64)

        labels = np.array([int(s.extra["label"]) for s in scores])
        new, old = table(scores), table(reference)
        found = {"right to wrong": 0.0, "wrong to right": 0.0}
        for before, after in zip(reference, scores):
            worse, better = (
                before.extra["lead"] > 0 >= after.extra["lead"],
                after.extra["lead"] > 0 >= before.extra["lead"],
            )
            found["right to wrong"] += worse
            found["wrong to right"] += better
        for name, figure in FIGURES.items() if np.isfinite(new).all() and np.isfinite(old).all() else ():
            found[name] = figure(new, labels)
            if len(old):
                low, high = bootstrap(figure, new, old, labels)
                found |= {f"reference's {name}": figure(old, labels)}
                found |= {f"change of {name}, from (paired bootstrap, 95 %)": low, f"change of {name}, to": high}
        return found

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """The texts that lost most, and then the first of those that are left; the classes that both models choose."""
        names, found = list(self._labels()), []
        for example, before, after in _samples.most_changed(examples, new, old, SHOWN):
            tokens = example.payload[1]
            theirs, ours = (names[_likeliest(score.positions)] for score in (before, after))
            prompt = decode(tokens[0][: _choices.start_of(tokens)])
            found.append(Sample(example.id, prompt, theirs, ours, f"right: {names[example.payload[0]]}"))
        return found


def _shares(logs: Sequence[float]) -> tuple[float, ...]:
    """Probabilities in proportion to exp(logs)."""
    if not all(map(math.isfinite, logs)):
        return (math.nan,) * len(logs)
    weights = [math.exp(x - max(logs)) for x in logs]
    return tuple(w / sum(weights) for w in weights)


def _likeliest(probabilities: Sequence[float]) -> int:
    return max(range(len(probabilities)), key=lambda i: probabilities[i])
