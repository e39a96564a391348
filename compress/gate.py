"""Gates: whether a model's loss against a reference is proven to stay within its margins.

Each check looks at each of its sources on its own, so that the worst source decides. Documents arrive in their seeded
random order; after every batch the bounds of a confidence sequence are compared with the margin, and a check stops
once it is decided. The bounds hold at all looks together, so that stopping early costs no validity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from compress import fixed_sample
from compress.decisions import DECISIONS, PLANNED, Decision, Rule, Verdict, by_cluster, combine, compare
from compress.errors import GateInconclusive, RecipeError
from compress.interfaces import (
    P_REGRESSION,
    P_VALUE,
    Aspect,
    Documents,
    Evaluator,
    Example,
    LanguageModel,
    Progress,
    Sample,
    Score,
)
from compress.numerics import betting
from compress.numerics.paired import holm
from compress.scoring import Memo, ScoreCache, batches, cached_scores

Figure = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, return_type=float | None),
]
"""A number of a report: NaN and infinities, which JSON cannot hold, become null."""

Distrust = Callable[[Evaluator, str], str]
"""(check, source) → why the check means nothing there, or an empty text."""

EXAMPLES_KEPT = 500  # of each check and source, from which samples are chosen: 35 MB where one has 32 choices


class CheckResult(BaseModel):
    """What one check found on one source.

    loss, lower and upper are in `unit`; `upper` holds at the level that PASS needs, `lower` at the one that
    FAIL needs (see `Gate.evaluate`). reference and value are the metric itself. `source` is "files" for a
    quantity of the files. An INVALID check says why in `definition`. review: why somebody must look at this
    result before it counts, or empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    unit: str
    source: str
    against: str
    reference: Figure
    value: Figure
    loss: Figure
    lower: Figure
    upper: Figure
    margin: Figure
    confidence: Figure
    examples: int
    tokens: int
    verdict: Verdict
    definition: str
    details: dict[str, Figure] = Field(default_factory=dict)
    review: str = ""
    aspect: Aspect = "quality"
    samples: list[Sample] = Field(default_factory=list)


class GateResult(BaseModel):
    """The verdict of a gate and of each of its checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    checks: list[CheckResult]


@dataclass(frozen=True)
class Sizes:
    """Facts of the stored files that exact checks look at."""

    size_bytes: int
    bits_per_weight: float


class _Invalid(Exception):
    """A comparison that means nothing; the message says why."""


@dataclass(frozen=True)
class Gate:
    """A list of checks. An empty one is refused: whoever wants none says so in the recipe (`gate: off`)."""

    checks: tuple[Evaluator, ...]

    def __post_init__(self) -> None:
        if not self.checks:
            raise RecipeError("a gate without checks would prove nothing; name a check, or turn the gate off")

    def evaluate(
        self,
        model: LanguageModel,
        baseline: LanguageModel,
        datasets: Sequence[Documents],
        *,
        parent: LanguageModel | None = None,
        sizes: Sizes | None = None,
        attempts: int = 1,
        cache: ScoreCache | None = None,
        progress: Progress = lambda label, fraction: None,
        distrust: Distrust = lambda check, source: "",
    ) -> GateResult:
        """Check the model against its baseline (or parent) on every source.

        A check passes at α = (1 − confidence) / attempts on each source: all must pass, so that no further
        correction is due (intersection–union). It fails at α / k, k being the number of pairs of a
        sampled check and a source, since any one of them fails the gate. attempts: how many alternatives
        may be tried, counted beforehand. model must be another object than its references. distrust: why a
        check means nothing on a source (see `compress.assay`), which makes it INVALID; empty where it does.
        """
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}, expected at least 1")
        scored = [check for check in self.checks if check.statistic in DECISIONS]
        pairs = [(check, data) for check in scored for data in check.sources(datasets)]
        k = max(1, sum(check.statistic != "census" for check, _ in pairs))
        trials = [Trial(check, data, model, _pick(check, baseline, parent), attempts, k) for check, data in pairs]
        for trial in trials:
            trial.prepare(cache, distrust(trial.check, trial.data.source))
        groups = _by_source(trials)
        for i, group in enumerate(groups):
            _run(group, cache, _share(progress, i, len(groups)))
        found = []
        for check in self.checks:
            own = [trial.result() for trial in trials if trial.check is check]
            found += own or [_exact(check, sizes) if check.statistic == "exact" else _without_source(check)]
        results = [_without_regression(result) for result in _corrected(found)]
        return GateResult(verdict=combine([result.verdict for result in results]), checks=results)


class Trial:
    """One check on one source, while documents come in."""

    def __init__(
        self,
        check: Evaluator,
        data: Documents,
        model: LanguageModel,
        reference: LanguageModel,
        attempts: int,
        k: int,
    ) -> None:
        if model is reference:
            raise ValueError("a model cannot be compared with the same object: changes in place would be unseen")
        alpha = (1 - check.confidence) / attempts
        self.check, self.data, self.model, self.reference = check, data, model, reference
        planned = max(1, min(self.limit, PLANNED))
        fewest = 2 if check.statistic == "mean" else 1  # one loss alone has no variance
        least = max(fewest, check.minimum_examples, self.limit if check.statistic == "census" else 0)
        self.rule = Rule(check.margin, alpha, alpha / k, planned, least)
        self.new: list[Score] = []
        self.old: list[Score] = []
        self.examples: list[Example] = []  # the first `EXAMPLES_KEPT`
        self.clusters: list[str] = []
        self.figures: dict[str, float] = {}
        self.seen: set[str] = set()
        self.documents = 0
        self.decision = Decision("INCONCLUSIVE")

    @property
    def limit(self) -> int:
        """Most documents that will be looked at."""
        return min(self.check.max_documents or len(self.data.documents), len(self.data.documents))

    @property
    def identical(self) -> bool:
        """Whether both models execute the same weights."""
        return self.model.digest == self.reference.digest

    def prepare(self, cache: ScoreCache | None, distrust: str) -> None:
        """Leave out what cannot be compared with this reference, by its scores alone."""
        if distrust:
            self.decision = Decision("INVALID", reason=distrust)
            return

        def scores(part: Documents) -> list[Score]:
            found: list[Score] = []
            for documents in batches(part.documents):
                batch = self.check.examples(replace(part, documents=documents), self.check.encoder(self.reference))
                found += cached_scores(self.check, self.reference, part, batch, cache)
            return found

        try:
            self.data, self.figures = self.check.comparable(self.data, scores)
        except GateInconclusive as error:
            self.decision = Decision("INVALID", reason=str(error))

    @property
    def open(self) -> bool:
        """Whether it looks at further documents."""
        # Where any loss is forbidden, one within the margin may still be found.
        undecided = ("INCONCLUSIVE", "PASS") if self.check.forbids_any_loss else ("INCONCLUSIVE",)
        return self.decision.verdict in undecided and self.documents < self.limit

    @property
    def done(self) -> float:
        """Finished fraction: of the documents that usually decide, and then of those that there are."""
        if not self.open:
            return 1.0
        usual = min(self.limit, PLANNED)
        return self.documents / (usual if self.documents < usual else self.limit)

    def take(
        self,
        documents: Sequence[tuple[str, str]],
        view: Callable[[LanguageModel], LanguageModel],
        cache: ScoreCache | None,
    ) -> None:
        """Score the next documents and look at the bounds. view: a model with memory, see `Memo`."""
        documents = documents[: self.limit - self.documents]
        self.documents += len(documents)
        try:
            self._score(documents, view, cache)
        except (_Invalid, GateInconclusive) as error:
            self.decision = replace(self.decision, verdict="INVALID", reason=str(error))
            return
        losses = np.array([s.total for s in self.new], dtype=np.float64)
        if not self.check.relative:
            losses = losses - np.array([s.total for s in self.old], dtype=np.float64)
        weights = np.array([s.weight for s in self.new], dtype=np.float64)
        losses, weights = by_cluster(self.clusters, losses), by_cluster(self.clusters, weights)
        if self.check.statistic != "mean" and len(losses) >= self.rule.minimum and self._untouched():
            reason = f"all {len(self.new)} scores of both models are equal, and the weights are not"
            self.decision = Decision("INVALID", float(losses.mean()), reason=reason)
            return
        self.decision = DECISIONS[self.check.statistic](losses, weights, self.rule, self.identical)

    def _untouched(self) -> bool:
        """Different weights with the same scores to the last bit: one model was compared with itself."""
        return self.new == self.old and not self.identical

    def _score(
        self,
        documents: Sequence[tuple[str, str]],
        view: Callable[[LanguageModel], LanguageModel],
        cache: ScoreCache | None,
    ) -> None:
        batch = _same_examples(self.check, replace(self.data, documents=documents), self.model, self.reference)
        ids = [example.id for example in batch]
        if len({*ids, *self.seen}) != len(ids) + len(self.seen):
            raise _Invalid("an example id occurs twice")
        self.seen.update(ids)
        if not batch:
            return
        if self.check.relative:
            new = self.check.score(view(self.model), batch, view(self.reference))
            old = []
        else:
            old = cached_scores(self.check, view(self.reference), self.data, batch, cache)
            judge = view(self.reference) if self.check.statistic == "census" else None
            new = self.check.score(view(self.model), batch, judge)
            _match(old, ids, "the reference")
            if [s.weight for s in old] != [s.weight for s in new]:
                raise _Invalid("model and reference were scored on different numbers of positions")
        _match(new, ids, "the model")
        self.new += new
        self.old += old
        self.clusters += [example.cluster for example in batch]
        self.examples += batch[: EXAMPLES_KEPT - len(self.examples)]

    def result(self) -> CheckResult:
        """What was found when documents ran out or the check was decided."""
        decision, n = self.decision, len(set(self.clusters))
        if decision.verdict == "INCONCLUSIVE" and n < self.rule.minimum:
            reason = f"{n} examples, and at least {self.rule.minimum} are needed"
            decision = replace(decision, verdict="INVALID", reason=reason)
        if decision.verdict == "PASS" and (doubt := self.check.doubt(self.new, self.old)):
            decision = replace(decision, verdict="INVALID", reason=doubt)
        if review := self._review(decision):
            decision = replace(decision, verdict="INCONCLUSIVE")
        result = _result(self.check, self.data.source, decision, self.new, self.old)
        beside = fixed_sample.figures(self.check, self.new, self.old, self.clusters)
        details = {**self.figures, **result.details, **beside, **self._regression()}
        return result.model_copy(update={"details": details, "review": review, "samples": self._samples()})

    def _regression(self) -> dict[str, float]:
        """The p-value of no loss at all, where the check asks for it and could be decided."""
        if not self.check.forbids_any_loss or self.decision.verdict == "INVALID" or not self.new:
            return {}
        losses = np.array([new.total - old.total for new, old in zip(self.new, self.old, strict=True)])
        weights = np.array([s.weight for s in self.new])
        means = by_cluster(self.clusters, losses) / by_cluster(self.clusters, weights)
        return {P_REGRESSION: betting.p_value(means, 0.0)}

    def _review(self, decision: Decision) -> str:
        """Why a pass is too good to be taken without question: its bound proves a gain beyond what is plausible.

        What a step wins back from its own parent is no such gain.
        """
        check, bound = self.check, -self.check.plausible_gain
        if decision.verdict != "PASS" or check.against != "baseline" or not decision.upper < bound:
            return ""
        proven = f"a gain beyond {check.display(bound)} is proven, and compression adds no knowledge"
        causes = "evaluation text in the training data, a broken baseline, or training that is meant to adapt"
        return f"{proven}; look for {causes}, and raise max_gain where it is the last"

    def _samples(self) -> list[Sample]:
        kept = len(self.examples)
        return self.check.samples(self.examples, self.new[:kept], self.old[:kept], self.model.decode)


def _by_source(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that look at the very same documents, together."""
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(id(trial.data), []).append(trial)
    return list(groups.values())


def _run(trials: Sequence[Trial], cache: ScoreCache | None, progress: Progress) -> None:
    """Feed their one source to the trials until all are decided or documents run out."""
    data = trials[0].data
    for documents in batches(data.documents):
        active = [trial for trial in trials if trial.open]
        if not active:
            return
        memos: dict[int, LanguageModel] = {}

        def view(model: LanguageModel) -> LanguageModel:
            # A single check reads every row of logits once: keeping copies would be pure cost.
            if len(active) == 1:  # noqa: B023
                return model
            return memos.setdefault(id(model), Memo(model))  # noqa: B023

        for trial in active:
            trial.take(documents, view, cache)
        progress(f"{', '.join(t.check.name for t in active)} on {data.source}", min(t.done for t in trials))


def _share(progress: Progress, i: int, count: int) -> Progress:
    """Progress of the i-th of `count` parts of equal size."""
    return lambda label, fraction: progress(label, (i + fraction) / count)


def _corrected(results: Sequence[CheckResult]) -> list[CheckResult]:
    """With p-values that answer, for all of them together, on which task anything changed."""
    corrected = list(results)
    for name in (P_VALUE, P_REGRESSION):
        testing = [i for i, result in enumerate(corrected) if name in result.details]
        adjusted = holm([corrected[i].details[name] for i in testing])
        for i, p in zip(testing, adjusted, strict=True):
            if len(testing) > 1:
                details = {**corrected[i].details, f"{name}, Holm": p}
                corrected[i] = corrected[i].model_copy(update={"details": details})
    return corrected


def _without_regression(result: CheckResult) -> CheckResult:
    """FAIL where any loss is forbidden and one is proven on this source, corrected for all that were looked at."""
    p = result.details.get(f"{P_REGRESSION}, Holm", result.details.get(P_REGRESSION, 1.0))
    if not p <= 1 - result.confidence:
        return result
    why = f"a loss is proven here (p {p:.2g} after Holm's correction), and the check forbids any"
    return result.model_copy(update={"verdict": "FAIL", "review": why})


def _pick(check: Evaluator, baseline: LanguageModel, parent: LanguageModel | None) -> LanguageModel:
    if check.against == "baseline":
        return baseline
    if parent is None:
        raise RecipeError(f"{check.name}: there is no parent to compare with here; use against: baseline")
    return parent


def _same_examples(check: Evaluator, data: Documents, model: LanguageModel, reference: LanguageModel) -> list[Example]:
    """The examples as both tokenizers see them; a difference would compare unlike things."""
    ours, theirs = (check.examples(data, check.encoder(m)) for m in (model, reference))
    if [e.id for e in ours] != [e.id for e in theirs]:
        raise _Invalid("model and reference have different examples")
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            raise _Invalid(f"model and reference tokenize {a.id!r} differently")
    return ours


def _match(scores: Sequence[Score], ids: Sequence[str], whose: str) -> None:
    if [s.id for s in scores] != list(ids):
        raise _Invalid(f"the scores of {whose} are not those of the examples asked for")


def _exact(check: Evaluator, sizes: Sizes | None) -> CheckResult:
    """An exact check has no sampling error: its value is its own bound."""
    if sizes is None or sizes.size_bytes < 1:  # False for NaN
        return _result(check, "files", Decision("INVALID", reason="no files were measured"))
    value = check.measure(sizes.size_bytes, sizes.bits_per_weight)
    verdict = compare(value, value, check.margin)
    reason = "the measurement is not finite" if verdict == "INVALID" else ""
    result = _result(check, "files", Decision(verdict, value, value, value, reason))
    return result.model_copy(update={"value": value, "examples": 1, "details": asdict(sizes)})


def _without_source(check: Evaluator) -> CheckResult:
    return _result(check, "", Decision("INVALID", reason="no evaluation source"))


def _result(
    check: Evaluator, source: str, decision: Decision, new: Sequence[Score] = (), old: Sequence[Score] = ()
) -> CheckResult:
    return CheckResult(
        metric=check.name,
        unit=check.unit,
        source=source,
        against=check.against,
        reference=0.0 if check.relative else _value(check, old),
        value=_value(check, new),
        loss=decision.loss,
        lower=decision.lower,
        upper=decision.upper,
        margin=check.margin,
        confidence=check.confidence,
        examples=len(new),
        tokens=round(weight) if math.isfinite(weight := sum(s.weight for s in new)) else 0,
        verdict=decision.verdict,
        definition=check.definition + (f" Invalid here: {decision.reason}." if decision.reason else ""),
        details=check.details(new, old) if new else {},
        aspect=check.aspect,
    )


def invalidated(result: CheckResult, reason: str) -> CheckResult:
    """A result that turned out to mean nothing."""
    definition = f"{result.definition} Invalid here: {reason}."
    return result.model_copy(update={"verdict": "INVALID", "definition": definition})


def _value(check: Evaluator, scores: Sequence[Score]) -> float:
    return check.value(scores) if sum(s.weight for s in scores) > 0 else math.nan
