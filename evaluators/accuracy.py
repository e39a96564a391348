"""Accuracy: how many more answers the model gets wrong than the reference, on tasks with a right answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.errors import GateInconclusive, NetworkError, RecipeError
from compress.interfaces import Documents, Example, LanguageModel, Sample, Score
from compress.plugin import nearest
from evaluators import _choices, _cloze, _facts, _lm_eval, _lm_eval_tasks, _minimal_pairs, _samples
from evaluators._fields import Drop

_LENGTH = 512  # tokens at most of an item that is made here


def _from_each_source(datasets: Sequence[Documents]) -> Iterator[Documents]:
    for data in datasets:
        yield _choices.as_documents(f"cloze: {data.source}", [*_cloze.clusters(data)], data.length)


def _from_templates(datasets: Sequence[Documents]) -> Iterator[Documents]:
    """The same sentences whatever the sources: looked at once, not once per source."""
    yield _choices.as_documents("minimal_pairs", [*_minimal_pairs.clusters()], _LENGTH)


def _of_facts(datasets: Sequence[Documents]) -> Iterator[Documents]:
    yield _choices.as_documents("facts", [*_facts.clusters()], _LENGTH)


@dataclass(frozen=True)
class Task:
    """Where a task's items come from, and how often guessing is right."""

    documents: Callable[[Sequence[Documents]], Iterator[Documents]]
    chance: float
    summary: str


TASKS: Mapping[str, Task] = {
    "minimal_pairs": Task(_from_templates, 0.5, "a sentence, and one that a single change makes ungrammatical"),
    "cloze": Task(_from_each_source, 1 / _cloze.CHOICES, "the word that ends a sentence of the evaluation data"),
    "facts": Task(
        _of_facts, 1 / _facts.CHOICES, "capitals, chemical symbols and authors, without a text to look them up"
    ),
}
HARNESS = f"{_lm_eval.PREFIX}NAME"  # as it is listed


def summaries() -> dict[str, str]:
    """Every task with what it asks."""
    harness = "any task of lm-evaluation-harness, or of your own YAML (task_path), decided by its own metric"
    return {name: task.summary for name, task in TASKS.items()} | {HARNESS: harness}


def _check_task(name: str) -> None:
    if name not in TASKS and not (name.startswith(_lm_eval.PREFIX) and name != _lm_eval.PREFIX):
        raise RecipeError(f"unknown task {name!r}; {nearest(name, [*TASKS, HARNESS])}")


class Accuracy(Drop):
    """Points of accuracy lost, where the reference is proven to be far better than guessing.

    Each task is decided on its own, and cloze on each source: the worst decides. Before any comparison, the
    reference answers the first `QUALIFYING` clusters of each group (a phenomenon, or the task), which then
    leave the comparison; a group counts where chance plus three margins is refuted at 95 %.
    A task lm_eval:NAME is one of lm-evaluation-harness; its documents are the clusters.
    """

    name: ClassVar[str] = "accuracy"
    version: ClassVar[int] = 3  # 2: scores hold the choice; 3: fewer clusters qualify a group
    definition: ClassVar[str] = (
        "fraction of items on which the right continuation has the highest total log-probability (a tie is "
        "wrong), or on which the task's own metric, named with it, says right (lm_eval); the loss is the paired "
        "difference in the fraction of wrong answers, averaged per cluster, over the groups on which the reference "
        "exceeds chance by three margins; exact at every look."
    )
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_drop", "max_gain", "no_regression"})
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = "answers"
    QUALIFYING: ClassVar[int] = 32  # clusters per group, of which the first item is looked at
    SHOWN: ClassVar[int] = 4  # flips of each direction

    # Not strict: a list fills a tuple, in Python as in YAML.
    tasks: tuple[str, ...] = Field(("minimal_pairs", "cloze"), min_length=1, strict=False)
    task_path: str | None = None  # of the user's own task YAML for lm_eval: a folder, or one file
    metric: str | None = None  # of lm_eval's tasks: "acc_norm", or with a filter "exact_match,strict-match"
    no_regression: bool = False  # fail, too, where any loss at all is proven on any task (Holm), however small
    max_gain: float = Field(10.0, gt=0, le=100, allow_inf_nan=False)  # points; beyond, a proven gain needs a review

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for task in tasks:
                _check_task(task)
        except RecipeError as error:
            raise ValueError(str(error)) from None  # pydantic adds the field
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is listed twice")
        return tasks

    @model_validator(mode="after")
    def _provable(self) -> Accuracy:
        for field in ("task_path", "metric"):
            if getattr(self, field) is not None and not self._names:
                raise ValueError(f"{field} is for tasks of lm_eval, and tasks holds none; write {HARNESS}, or drop it")
        for task in [task for task in self.tasks if task in TASKS]:  # the harness' own are not known yet
            needed = TASKS[task].chance + 3 * self.margin
            if needed >= 1:
                raise ValueError(
                    f"max_drop={self.max_drop:g}: no baseline exceeds chance on {task} "
                    f"({TASKS[task].chance:.0%}) by three such margins; use a smaller one"
                )
        return self

    @property
    def forbids_any_loss(self) -> bool:
        """Where the recipe says `no_regression: true`."""
        return self.no_regression

    @property
    def plausible_gain(self) -> float:
        """Largest rise of accuracy, as a fraction."""
        return self.max_gain / 100

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """One source per task that brings its items along, and one per evaluation source for the others.

        A document is a cluster; documents that hold no fitting item are left out.
        """
        found: list[Documents] = []
        for task in self.tasks:
            found += TASKS[task].documents(datasets) if task in TASKS else [self._loaded(task).documents]
        return found

    def foreseen(self, datasets: Sequence[Documents]) -> list[Documents | str]:
        """Data of the hub are known where they were downloaded before."""
        found: list[Documents | str] = []
        for task in self.tasks:
            try:
                found += TASKS[task].documents(datasets) if task in TASKS else [self._loaded(task, True).documents]
            except NetworkError:
                found.append(task)
        return found

    def reads(self) -> str:
        """The harness, and the local files of its tasks."""
        return " ".join(_lm_eval_tasks.fingerprint(name, self.task_path) for name in self._names)

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """The model's own, which also knows what stands before an answer without a prompt."""
        return _lm_eval.Encoder(model)

    def untestable(self, data: Documents) -> str:
        """Where the harness does not say which of some choices is the right answer."""
        found = [self._loaded(task) for task in self.tasks if task not in TASKS]
        return next((loaded.untestable for loaded in found if loaded.documents.source == data.source), "")

    def choices(self, example: Example) -> Sequence[Sequence[int]]:
        """The payload, or what it says of a question of the harness."""
        payload = example.payload
        return _lm_eval.choices(payload) if isinstance(payload, _lm_eval.Question) else super().choices(example)

    @property
    def _names(self) -> list[str]:
        return [task.removeprefix(_lm_eval.PREFIX) for task in self.tasks if task not in TASKS]

    def _loaded(self, task: str, offline: bool = False) -> _lm_eval.Loaded:
        _check_task(task)  # whoever measures without a margin builds the check without validation
        return _lm_eval.load(task.removeprefix(_lm_eval.PREFIX), self.task_path, self.metric, offline)

    def _parts(self) -> dict[str, _lm_eval.Part]:
        loaded = [self._loaded(task) for task in self.tasks if task not in TASKS]
        return {name: part for found in loaded for name, part in found.parts.items()}

    def _chances(self, source: str, groups: Iterable[str]) -> dict[str, float]:
        if source.startswith(_lm_eval.PREFIX):
            parts = self._parts()
            return {group: parts[group].chance for group in groups}
        return dict.fromkeys(groups, TASKS[source.replace(":", " ").split()[0]].chance)

    def comparable(
        self, data: Documents, reference: Callable[[Documents], list[Score]]
    ) -> tuple[Documents, dict[str, float]]:
        """The groups on which the reference is far above chance, without the clusters that showed it.

        Looking at other clusters, and at the reference alone, keeps the choice from favouring a verdict.
        """
        groups: dict[str, list[tuple[str, str]]] = {}
        for document in data.documents:
            groups.setdefault(_choices.group_of(document[0]), []).append(document)
        asked = [d for members in groups.values() for d in members[: self.QUALIFYING]]
        right: dict[str, list[bool]] = {group: [] for group in groups}
        for score in reference(replace(data, documents=[(name, _choices.first(text)) for name, text in asked])):
            right[_choices.group_of(score.id)].append(score.total == 0)
        bars = {group: c + 3 * self.margin for group, c in self._chances(data.source, groups).items()}
        counting = {g for g, answers in right.items() if _refutes(sum(answers), len(answers), bars[g])}
        rates = {group: sum(answers) / len(answers) for group, answers in sorted(right.items())}
        if not counting:
            shown = ", ".join(f"{group} {rate:.0%} of {len(right[group])}" for group, rate in rates.items())
            bar = " to ".join(sorted({f"{b:.0%}" for b in (min(bars.values()), max(bars.values()))})) if bars else "0%"
            raise GateInconclusive(
                f"the reference is not proven to exceed {bar} (chance and three margins) on anything: "
                f"{shown or 'there are no items'}"
            )
        used = {name for name, _ in asked}
        kept = [d for d in data.documents if d[0] not in used and _choices.group_of(d[0]) in counting]
        figures = {
            f"baseline on {group}{'' if group in counting else ' (not counted)'}": rates[group] for group in rates
        }
        return replace(data, documents=kept), figures

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per item; its payload is the tokens of its choices, the right one first, or a `Question`."""
        if data.source.startswith(_lm_eval.PREFIX):
            return [
                Example(f"{name}/{i}", name, question)
                for name, text in data.documents
                for i, question in enumerate(_lm_eval.questions(text, encode))
            ]
        return [
            Example(f"{name}/{i}", name, tokens)
            for name, text in data.documents
            for i, tokens in enumerate(_choices.sequences(text, encode, data.length))
        ]

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """1 for a wrong answer, 0 for a right one.

        `lead` is how far the right choice leads, in nats; `chosen` is the index of the likeliest choice, on a
        tie with the right one a wrong one.
        """
        if batch and isinstance(batch[0].payload, _lm_eval.Question):
            return _lm_eval.score(model, self._parts(), [(e.id, e.payload) for e in batch])
        scores = []
        for example, (right, *others) in zip(
            batch, _choices.log_probabilities(model, [e.payload for e in batch]), strict=True
        ):
            lead = right - max(others) if all(map(math.isfinite, others)) else math.nan
            wrong = math.nan if math.isnan(lead) else float(not lead > 0)
            chosen = 1.0 + others.index(max(others)) if wrong else 0.0
            scores.append(Score(example.id, wrong, 1.0, {"lead": lead, "chosen": chosen}))
        return scores

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Flips both ways, and the accuracy of every group."""
        down, up = _samples.flips(scores, reference)
        found = {"right to wrong": down, "wrong to right": up}
        groups: dict[str, list[Score]] = {}
        for score in scores:
            groups.setdefault(_choices.group_of(score.id), []).append(score)
        return found | {f"accuracy on {group}": self.value(groups[group]) for group in sorted(groups)}

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """The first flips of each direction, in the random order of the clusters: none is picked for its looks."""
        found, notes = [], {1.0: "right to wrong", -1.0: "wrong to right"}
        for note, (example, before, after) in _samples.first_flips(examples, new, old, notes, self.SHOWN):
            if "chosen" not in after.extra:
                continue
            chosen = [int(s.extra["chosen"]) for s in (before, after)]
            if isinstance(example.payload, _lm_eval.Question):
                prompt, answers = _lm_eval.shown(example.payload, chosen)
            else:
                start = _choices.start_of(example.payload)
                prompt, answers = example.payload[0][:start], [example.payload[i][start:] for i in chosen]
            reference, written = map(decode, answers)
            found.append(Sample(example.id, decode(prompt), reference, written, note))
        return found


def _refutes(right: int, asked: int, chance: float) -> bool:
    """Whether so many right answers refute, at 5 %, that each is right with a probability of `chance` or less.

    The exact binomial test: it rejects just if the lower bound of Clopper and Pearson exceeds `chance`.

    >>> _refutes(24, 32, 0.59), _refutes(23, 32, 0.59), _refutes(0, 0, 0.59)
    (True, False, False)
    """
    if chance >= 1:
        return False
    tail = sum(math.comb(asked, i) * chance**i * (1 - chance) ** (asked - i) for i in range(right, asked + 1))
    return tail <= 0.05
