"""Assay sensitivity: a check is trusted only after it has seen a loss that was planted.

Once per check and data, a loss just above the margin is planted in the baseline (see `compress.planting`), and
the gate's own code looks at it. A check that passes it, or that measures another loss than was planted, would
not see a real one either: it is INVALID wherever it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compress import planting
from compress.decisions import Decision
from compress.errors import GateInconclusive
from compress.gate import Figure, Trial
from compress.interfaces import Documents, Evaluator, Example, LanguageModel, Progress, Score
from compress.scoring import Memo, ScoreCache, batches, cached_scores

VERSION = 2  # raised when results change: it is part of every cache key
DOCUMENTS = 100  # of each source: those of the baseline's own figures, whose scores are shared
EXCESS = 1.05  # planted loss over margin
TOLERANCE = 0.04  # of the margin, by which measured and planted losses may differ: less than the excess
ROUNDING = 1e-5  # nats per token; float32 logits leave errors of some 1e-6


class Assay(BaseModel):
    """What a check made of a planted loss. SEEN: it measured it and did not pass. UNTESTED: see `reason`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    unit: str
    source: str
    margin: Figure
    planted: Figure
    measured: Figure
    examples: int
    verdict: Literal["SEEN", "MISSED", "UNTESTED"]
    reason: str = ""


@dataclass
class _Case:
    """One check on one source, with the planted loss that it shall see, or why there is none."""

    check: Evaluator
    data: Documents
    untested: str = ""  # why nothing can be said
    missed: str = ""  # why nothing could be planted
    planted: planting.Sharpened | planting.Forgotten | None = None
    trial: Trial | None = None

    @property
    def target(self) -> float:
        return EXCESS * self.check.margin

    @property
    def kind(self) -> planting.Kind | None:
        """Which likelihood to harm, if any."""
        return self.check.planted if self.check.planted != "answers" else None

    def plant(self, found: planting.Sharpened | planting.Forgotten | None, baseline: LanguageModel, why: str) -> None:
        """Remember what was planted and open the gate's trial, or why there is none."""
        self.planted, self.missed = found, "" if found else why
        if found:
            check = self.check.model_copy(update={"max_documents": None})
            self.trial = Trial(check, self.data, found.model(baseline), baseline, attempts=1, k=1)

    def look(self, documents: Sequence[tuple[str, str]], memo: LanguageModel, cache: ScoreCache | None) -> None:
        """Show the next documents to the gate, and work out the loss planted in them from the same logits."""
        assert self.trial is not None and self.planted is not None
        if self.trial.decision.verdict == "INVALID":
            return
        self.planted.observe(memo, documents, self.data.length)
        self.trial.take(documents, lambda m: replace(m, inner=memo) if isinstance(m, planting.Planted) else memo, cache)

    def assay(self) -> Assay:
        """What the check made of it."""
        decision = self.trial.decision if self.trial else Decision("INVALID")
        planted = self.planted.loss() if self.planted else math.nan
        missed = self.missed or (_missed(self.check, decision, planted) if self.trial else "")
        return Assay(
            metric=self.check.name,
            unit=self.check.unit,
            source=self.data.source,
            margin=self.check.margin,
            planted=planted,
            measured=decision.loss,
            examples=len(self.trial.new) if self.trial else 0,
            verdict="UNTESTED" if self.untested else "MISSED" if missed else "SEEN",
            reason=self.untested or missed,
        )


def _missed(check: Evaluator, decision: Decision, planted: float) -> str:
    """Why the gate's decision does not show the planted loss; empty where it does."""
    if check.planted != "answers" and check.margin < ROUNDING:
        return f"a margin of {check.margin:.4g} is below what float32 logits resolve, {ROUNDING:g} {check.unit}"
    if not planted > check.margin:
        return f"the loss planted for it is {planted:.4g}, and more than the margin of {check.margin:.4g} was meant"
    where = f"a loss of {planted:.4g} was planted in the baseline (margin {check.margin:.4g}, {check.unit})"
    if decision.verdict == "PASS":
        return f"{where}, and the check passes it"
    allowed = max(TOLERANCE * check.margin, ROUNDING)
    if not abs(decision.loss - planted) <= allowed:  # NaN, too
        return f"{where}, and the check measures {decision.loss:.4g}" + (f": {decision.reason}" * bool(decision.reason))
    return ""


def settings(check: Evaluator) -> list[Any]:
    """What an assay of a check depends on besides data and baseline; equal lists need one assay."""
    kept = check.model_dump(mode="json", exclude={"against", "confidence", "max_documents"})
    return [VERSION, check.name, check.version, kept, check.reads()]


def examine(
    checks: Sequence[Evaluator],
    baseline: LanguageModel,
    datasets: Sequence[Documents],
    *,
    cache: ScoreCache | None = None,
    progress: Progress = lambda label, fraction: None,
) -> list[list[Assay]]:
    """Plant a loss for every check on every source of its own; the assays of each check, in order.

    Takes two passes of the baseline over the first documents of each source, shared by all checks of text.
    Exact checks measure files and a census claims nothing beyond its set: they need none.
    """
    cases = [list(_cases(check, datasets, baseline, cache)) for check in checks]
    everything = [case for own in cases for case in own]
    _plant(everything, baseline, cache, progress)
    _look(everything, baseline, cache, progress)
    return [[case.assay() for case in own] for own in cases]


def _cases(
    check: Evaluator, datasets: Sequence[Documents], baseline: LanguageModel, cache: ScoreCache | None
) -> Iterator[_Case]:
    if check.statistic in ("exact", "census"):
        return
    for data in check.sources(datasets):
        if reason := check.untestable(data):
            yield _Case(check, _first(data), untested=reason)
            continue
        try:
            comparable, _ = check.comparable(data, lambda part: _reference(check, part, baseline, cache)[1])
        except GateInconclusive as error:
            yield _Case(check, _first(data), untested=str(error))
            continue
        n, needed = len(comparable.documents), check.minimum_examples
        few = f"{n} documents, and at least {needed} are needed" if n < needed else ""
        yield _Case(check, _first(comparable), untested=few)


def _first(data: Documents) -> Documents:
    return replace(data, documents=data.documents[:DOCUMENTS])


def _reference(
    check: Evaluator, data: Documents, baseline: LanguageModel, cache: ScoreCache | None
) -> tuple[list[Example], list[Score]]:
    examples: list[Example] = []
    scores: list[Score] = []
    for documents in batches(data.documents):
        batch = check.examples(replace(data, documents=documents), check.encoder(baseline))
        examples += batch
        scores += cached_scores(check, baseline, data, batch, cache)
    return examples, scores


def _plant(cases: Sequence[_Case], baseline: LanguageModel, cache: ScoreCache | None, progress: Progress) -> None:
    """Plant what every case shall see; cases of text that share documents share a pass."""
    for case in cases:
        if case.check.planted == "answers" and not case.untested:
            progress(f"planting in {case.data.source}", 0.0)
            examples, scores = _reference(case.check, case.data, baseline, cache)
            examples = [replace(e, payload=case.check.choices(e)) for e in examples]
            why = f"the baseline has too few right answers to lose {case.target:.2%} of them"
            case.plant(planting.forgetting(examples, scores, case.target), baseline, why)
    for group in _by_documents([case for case in cases if case.kind and not case.untested]):
        progress(f"planting in {group[0].data.source}", 0.0)
        losses = [(case.kind, case.target) for case in group if case.kind]
        for case, found in zip(group, planting.sharpening(baseline, group[0].data, losses), strict=True):
            case.plant(found, baseline, f"no sharpening of the baseline makes a loss of {case.target:.4g} in it")


def _look(cases: Sequence[_Case], baseline: LanguageModel, cache: ScoreCache | None, progress: Progress) -> None:
    """Show every planted loss to the gate; it decides once, at the end, since early looks may err."""
    for group in _by_documents([case for case in cases if case.planted]):
        data, seen = group[0].data, 0
        for documents in batches(data.documents):
            memo = Memo(baseline)
            for case in group:
                case.look(documents, memo, cache)
            seen += len(documents)
            progress(f"planted losses in {data.source}", seen / len(data.documents))


def _by_documents(cases: Sequence[_Case]) -> list[list[_Case]]:
    """Cases that look at the very same documents, together."""
    groups: dict[tuple[object, ...], list[_Case]] = {}
    for case in cases:
        data = case.data
        names = tuple(name for name, _ in data.documents)
        groups.setdefault((data.source, data.digest, data.length, names), []).append(case)
    return list(groups.values())
