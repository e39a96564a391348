"""Robustness: how many more answers the model gets wrong than the reference where the text before them is disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.errors import RecipeError
from compress.interfaces import Aspect, Documents
from compress.plugin import nearest
from evaluators._perturb import KINDS, perturbed
from evaluators.accuracy import TASKS, Accuracy


class Robustness(Accuracy):
    """Points of accuracy lost on the built-in tasks under seeded typos, capitals, word order, and the like.

    Each perturbation of each task is a source of its own, and the worst decides. Both models answer the very same
    perturbed items: the loss is what compression costs there, not what the perturbation costs.
    """

    name: ClassVar[str] = "robustness"
    aspect: ClassVar[Aspect] = "robustness"
    version: ClassVar[int] = 1
    definition: ClassVar[str] = (
        "accuracy on items whose text before the answer is perturbed, as the source says, by a seed of their own; "
        "the loss is the paired difference in the fraction of wrong answers on the same perturbed items, averaged "
        "per cluster, over the groups on which the reference exceeds chance by three margins; exact at every look."
    )

    tasks: tuple[str, ...] = Field(("cloze",), min_length=1, strict=False)
    perturb: tuple[str, ...] = Field(("typos", "casing"), min_length=1, strict=False)
    task_path: Literal[None] = None
    metric: Literal[None] = None

    @field_validator("perturb")
    @classmethod
    def _kinds(cls, perturb: tuple[str, ...]) -> tuple[str, ...]:
        for kind in perturb:
            if kind not in KINDS:
                raise ValueError(f"unknown perturbation {kind!r}; {nearest(kind, [*KINDS])}")
        if len(set(perturb)) < len(perturb):
            raise ValueError("a perturbation is listed twice")
        return perturb

    @model_validator(mode="after")
    def _still_right(self) -> Robustness:
        if foreign := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"{foreign[0]}: only items made here can be perturbed; use {' or '.join(TASKS)}")
        if "minimal_pairs" in self.tasks and "word_order" in self.perturb:
            raise ValueError("word_order makes both sentences of a minimal pair ungrammatical; use it with cloze alone")
        return self

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """Each source of the tasks, perturbed in each way."""
        for task in self.tasks:
            if task not in TASKS:  # whoever measures without a margin builds the check without validation
                raise RecipeError(f"robustness has no task {task!r}; {nearest(task, [*TASKS])}")
        return [perturbed(data, kind) for data in super().sources(datasets) for kind in self.perturb]

    def foreseen(self, datasets: Sequence[Documents]) -> list[Documents | str]:
        """All is made from what is here."""
        return [*self.sources(datasets)]
