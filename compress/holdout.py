"""The sealed holdout: documents that only the final model sees, and a ledger of who has seen them.

Whoever tries recipe after recipe against the same evaluation data selects what those data happen to favour. The
holdout is looked at once, when all steps and the release gate have passed. The store remembers each model that was: the
k-th one, on the same documents against the same baseline, is judged at α / (k (k + 1)), so that all uses together,
however many there will be, pass a model that should not with a chance of at most α: 1/2 + 1/6 + 1/12 + … = 1.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from compress import lock
from compress.errors import Corrupt, RecipeError
from compress.gate import GateResult
from compress.interfaces import Documents, Evaluator
from compress.recipe import Recipe
from compress.store import Store, key_of


class Holdout(BaseModel):
    """What the final model's one look at the holdout found. use: which model it was to look, counted from 1."""

    model_config = ConfigDict(extra="forbid")

    source: str
    documents: int
    digest: str
    use: int
    before: list[str]  # recipes that have looked earlier, in order
    left_out: list[str]  # release checks that bring all or some of their items along
    gate: GateResult


def checks(recipe: Recipe) -> tuple[list[Evaluator], list[str]]:
    """The release checks that read documents of the data alone, and the names of the others.

    What brings items along was seen by every gate before: it is not held out. Raises RecipeError where none is left.
    """
    sampled = [check for check in recipe.release if check.statistic != "exact"]
    reads = [check for check in sampled if not check.sources([])]
    if not reads:
        place, names = recipe.place("data", "holdout"), ", ".join(check.name for check in recipe.release)
        problem = f"no release check reads its documents ({names}); add perplexity or divergence, or drop the holdout"
        raise RecipeError(f"{place}  data.holdout: {problem}")
    return reads, [check.name for check in sampled if check not in reads]


def spend(store: Store, baseline: str, data: Documents, model: str, recipe: str) -> tuple[int, list[str]]:
    """Put a model on record as having seen the holdout; which use it is, from 1, and the recipes of those before.

    baseline, model: digests. A model that is on record already uses nothing up: its verdict is known. Documents are the
    same whatever the source is called, their order and the length of windows. Raises Corrupt where the record is
    damaged: who has seen them would be forgotten.
    """
    texts = hashlib.sha256(json.dumps(sorted(data.documents)).encode()).hexdigest()
    key = key_of({"holdout": texts, "baseline": baseline})
    store.root.mkdir(parents=True, exist_ok=True)
    with lock.guarded(store.root):  # two runs that end at once are two uses
        try:
            uses: list[dict[str, Any]] = store.read(key) or []
        except Corrupt as error:
            problem = "who has seen this holdout cannot be told any more: take other documents, or remove that file"
            raise Corrupt(f"{error}; {problem}") from None
        models = [use["model"] for use in uses]
        if model not in models:
            models.append(model)
            store.put(key, [*uses, {"model": model, "recipe": recipe}])
    at = models.index(model)
    return at + 1, [use["recipe"] for use in uses[:at]]


def attempts(use: int) -> int:
    """By what the error of the k-th use is divided.

    >>> [attempts(k) for k in (1, 2, 3)], round(sum(1 / attempts(k) for k in range(1, 1000)), 2)
    ([2, 6, 12], 1.0)
    """
    return use * (use + 1)
