"""Scores: examples in batches, reference scores that are kept, and logits that checks share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from compress.interfaces import Documents, Evaluator, Example, LanguageModel, Score

if TYPE_CHECKING:
    from torch import Tensor

BATCH_DOCUMENTS = 16
BATCH_CHARACTERS = 2_000  # about 500 tokens: keeps the logits that checks share within `MEMO_BYTES`
MEMO_BYTES = 128 * 2**20  # of logits kept per model


class ScoreCache(Protocol):
    """Where scores of reference models are kept between gates; values are made of JSON's types."""

    def get(self, key: str) -> Any | None:
        """What was put under the key, or None."""

    def put(self, key: str, value: Any) -> None:
        """Keep a value."""


def batches(documents: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    """Consecutive slices of at most 16 documents and about 500 tokens, whichever is less.

    >>> [len(batch) for batch in batches([("a", "x" * 9000), *[("b", "y")] * 17])]
    [1, 16, 1]
    """
    start, characters = 0, 0
    for i, (_, text) in enumerate(documents):
        full = i - start == BATCH_DOCUMENTS or characters + len(text) > BATCH_CHARACTERS
        if full and i > start:
            yield documents[start:i]
            start, characters = i, 0
        characters += len(text)
    if start < len(documents):
        yield documents[start:]


@dataclass
class Memo:
    """A model that keeps the logits of one batch, so that checks on the same windows share a forward pass."""

    inner: LanguageModel
    kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    free: int = MEMO_BYTES

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """As the inner model's; windows beyond the memory's size are computed anew each time."""
        known = dict(self.kept)  # a window that is kept on the way was still asked from the inner model
        missing = [window for window in windows if tuple(window) not in known]
        fresh = self.inner.logits(missing) if missing else iter(())
        for window in map(tuple, windows):
            if window in known:
                yield known[window]
                continue
            rows = next(fresh)
            if window not in self.kept and rows.nbytes <= self.free:
                rows = rows.clone()  # the runtime may overwrite its own
                self.kept[window] = rows
                self.free -= rows.nbytes
            yield rows


def cached_scores(
    check: Evaluator,
    model: LanguageModel,
    data: Documents,
    batch: Sequence[Example],
    cache: ScoreCache | None,
) -> list[Score]:
    """Scores of a reference model, from the cache where they are known."""
    if cache is None:
        return check.score(model, batch)
    key = score_key(check, model, data, batch)
    kept = cache.get(key)
    if kept is not None:
        return [Score(**{**row, "positions": tuple(row["positions"])}) for row in kept]
    scores = check.score(model, batch)
    if all(math.isfinite(s.total) for s in scores):
        cache.put(key, [{**asdict(s), "positions": list(s.positions)} for s in scores])
    return scores


def score_key(check: Evaluator, model: LanguageModel, data: Documents, batch: Sequence[Example]) -> str:
    """Digest of all that a score depends on: evaluator and what it reads, model, runtime, processor and examples."""
    import platform

    import torch

    settings = check.model_dump(mode="json", exclude={"against", "confidence", "max_documents", *check.margin_fields})
    facts = {
        "evaluator": [check.name, check.version, check.definition, settings, check.reads()],
        # What a model writes ends where these say; they are no weights, and a digest may leave them out.
        "model": [model.digest, model.runtime, model.compute, sorted(model.eos_ids)],
        "host": [
            torch.__version__,
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
            platform.machine(),
        ],
        "data": [data.source, data.digest, data.length],
        "examples": [[e.id, e.cluster, e.payload] for e in batch],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
