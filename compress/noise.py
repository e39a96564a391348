"""The noise floor: what loss identical weights show when they are asked otherwise (an A/A test).

Float arithmetic is not associative: batches of another make-up, another number of threads or products in bfloat16
change scores a little, and no margin below that can be proven. The baseline is scored once as gates score it, and once
with every window alone, on another number of threads, with float32 products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.decisions import by_cluster
from compress.errors import GateInconclusive
from compress.gate import CheckResult, Figure, invalidated
from compress.interfaces import Documents, Evaluator, LanguageModel, Progress, Score
from compress.scoring import Memo, ScoreCache, batches, cached_scores

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # raised when results change: it is part of every cache key
POOL = 100  # documents of which the first are taken, in the very batches whose baseline scores are in the cache
DOCUMENTS = 32  # at least
_Z95 = 1.959964  # two-sided normal quantile


class Noise(BaseModel):
    """The loss of identical weights in one check on one source, with its fixed-sample 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    unit: str
    source: str
    loss: Figure
    lower: Figure
    upper: Figure
    examples: int

    @property
    def floor(self) -> float:
        """What a margin must exceed: the size of the loss where it is not chance, that of NaN included; else 0.

        A loss that chance explains is left to the gate's bounds, which allow for it.
        """
        return 0.0 if self.lower <= 0 <= self.upper else abs(self.loss)


@dataclass(frozen=True)
class Alone:
    """A model that is given one window at a time, on another number of threads than it would take."""

    inner: LanguageModel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """As the inner model's, but for rounding."""
        for window in windows:
            with _other_threads():
                rows = next(self.inner.logits([window]))
            yield rows


@contextmanager
def _other_threads() -> Iterator[None]:
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(1 if usual > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def otherwise(model: LanguageModel) -> LanguageModel:
    """The same weights, to be asked otherwise; a model in torch computes in float32 and recalls nothing."""
    from compress.classifier import model_of
    from compress.model import Model

    if isinstance(model, Model):
        return Alone(model_of(model.module, model.tokenizer, "float32"))
    return Alone(model)


def settings(check: Evaluator) -> list[Any]:
    """What the noise of a check depends on besides data, baseline, host and dtype: not on its margin."""
    out = {"against", "confidence", "max_documents", *check.margin_fields}
    return [VERSION, check.name, check.version, check.model_dump(mode="json", exclude=out), check.reads()]


def applies(check: Evaluator) -> bool:
    """Whether a check has scores that rounding can move: not of files, of the clock, of a fixed set or of writing.

    What a model writes costs as much again, and its scores are shares that change with whole answers.
    """
    return check.statistic in ("mean", "betting") and not check.timed and not check.written


def measure(
    checks: Sequence[Evaluator],
    baseline: LanguageModel,
    datasets: Sequence[Documents],
    *,
    cache: ScoreCache | None = None,
    progress: Progress = lambda label, fraction: None,
) -> list[list[Noise]]:
    """The noise of each check, of those that it applies to, on every source of its own.

    One more pass over at least `DOCUMENTS` documents of each source; checks of the same documents share it.
    """
    pairs = [[_Pair(c, _first(d)) for d in c.sources(datasets)] if applies(c) else [] for c in checks]
    groups: dict[tuple[str, str, tuple[str, ...]], list[_Pair]] = {}
    for pair in (pair for own in pairs for pair in own):
        data = pair.data
        groups.setdefault((data.source, data.digest, tuple(n for n, _ in data.documents)), []).append(pair)
    for (source, _, names), group in groups.items():
        done = 0
        for documents in batches(group[0].data.documents):
            usual, other = Memo(baseline), Memo(otherwise(baseline))
            for pair in group:
                pair.score(documents, usual, other, cache)
            done += len(documents)
            progress(f"noise in {source}", done / len(names))
    return [[noise for pair in own if (noise := pair.noise()) is not None] for own in pairs]


def _first(data: Documents) -> Documents:
    """Whole batches of at least `DOCUMENTS` documents."""
    kept: list[tuple[str, str]] = []
    for documents in batches(data.documents[:POOL]):
        if len(kept) >= DOCUMENTS:
            break
        kept += documents
    return replace(data, documents=kept)


@dataclass
class _Pair:
    """One check on one source, scored both ways."""

    check: Evaluator
    data: Documents
    losses: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)

    def score(self, documents: Sequence[tuple[str, str]], usual: Memo, other: Memo, cache: ScoreCache | None) -> None:
        """Add some documents; one that the check refuses is the gate's affair."""
        check, part = self.check, replace(self.data, documents=documents)
        try:
            batch = check.examples(part, check.encoder(usual))
            old = [] if check.relative else cached_scores(check, usual, part, batch, cache)
            new = check.score(other, batch, usual if check.relative else None)
        except GateInconclusive:
            return
        olds = [s.total for s in old] if old else [0.0] * len(new)
        self.losses += [s.total - total for s, total in zip(new, olds, strict=True)]
        self.scores += new
        self.clusters += [example.cluster for example in batch]

    def noise(self) -> Noise | None:
        """What was found; None where no document could be scored."""
        if not self.scores:
            return None
        losses = by_cluster(self.clusters, np.array(self.losses, dtype=np.float64))
        weights = by_cluster(self.clusters, np.array([s.weight for s in self.scores], dtype=np.float64))
        if self.check.statistic == "betting":  # clusters count alike
            losses, weights = losses / weights, np.ones_like(weights)
        n, loss = len(losses), float(losses.sum() / weights.sum())
        half = math.inf
        if n > 1:
            half = float(_Z95 * np.std(losses - loss * weights, ddof=1) / (weights.mean() * math.sqrt(n)))
        return Noise(
            metric=self.check.name,
            unit=self.check.unit,
            source=self.data.source,
            loss=loss,
            lower=loss - half,
            upper=loss + half,
            examples=len(self.scores),
        )


def refusal(check: Evaluator, noise: Noise) -> str:
    """Why the margin of a check means nothing on the noise's source; empty where it exceeds the floor."""
    if check.margin > noise.floor:  # False for NaN
        return ""
    shown = f"identical weights show a loss of {noise.floor:.3g} {noise.unit} here"
    how = f"{noise.examples} examples, asked in other batches, threads and float32"
    return f"the margin of {check.margin:.3g} is not above the noise: {shown} ({how}); widen it"


def above_decoding(
    results: Sequence[CheckResult], gate: Sequence[Evaluator], decoded: Sequence[CheckResult]
) -> list[CheckResult]:
    """Results of an artifact's gate, where margins of KL that its own runtime exceeds by rounding are INVALID.

    decoded: see `compress.parity`: the divergence of one runtime with itself, prefill against decoding, by source.
    """
    kl = {check.name for check in gate if check.planted == "kl"}
    floors = {result.source: result.loss for result in decoded}

    def judged(result: CheckResult) -> CheckResult:
        floor = floors.get(result.source, 0.0)
        if result.metric not in kl or result.margin > floor or result.verdict == "INVALID":
            return result
        what = f"this runtime differs from itself, prefill against decoding, by {floor:.3g} {result.unit}"
        return invalidated(result, f"the margin of {result.margin:.3g} is not above the noise: {what}")

    return [judged(result) for result in results]
