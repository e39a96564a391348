"""Gates: whether a model's loss against a reference is proven to stay within its margins.

Each check looks at each of its sources on its own, so that the worst source decides. Documents arrive in
their seeded random order; after every batch the bounds of a confidence sequence are compared with the margin,
and a check stops once it is decided. The bounds hold at all looks together, so that stopping early costs no
validity.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from compress.errors import GateInconclusive, RecipeError
from compress.interfaces import Documents, Evaluator, Example, LanguageModel, Progress, Score
from compress.numerics import betting
from compress.numerics.sequences import detectable, mixture_variance, width

if TYPE_CHECKING:
    from torch import Tensor

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
Floats = NDArray[np.float64]

# n* of the confidence sequence: a clear pass or fail needs 50 to 200 documents, and the bound stays within
# 18 % of the best one for much larger samples.
_PLANNED = 200
_BATCH_DOCUMENTS = 16
_BATCH_CHARACTERS = 8_000  # about 2,000 tokens: keeps the logits that checks share within `_MEMO_BYTES`
_MEMO_BYTES = 512 * 2**20  # of logits kept per model

Figure = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, return_type=float | None),
]
"""A number of a report: NaN and infinities, which JSON cannot hold, become null."""


class CheckResult(BaseModel):
    """What one check found on one source.

    loss, lower and upper are in `unit`; `upper` holds at the level that PASS needs, `lower` at the one that
    FAIL needs (see `Gate.evaluate`). reference and value are the metric itself. `source` is "files" for a
    quantity of the files. An INVALID check says why in `definition`.
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


class GateResult(BaseModel):
    """The verdict of a gate and of each of its checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    checks: list[CheckResult]


class ScoreCache(Protocol):
    """Where scores of reference models are kept between gates; values are made of JSON's types."""

    def get(self, key: str) -> Any | None:
        """What was put under the key, or None."""

    def put(self, key: str, value: Any) -> None:
        """Keep a value."""


@dataclass(frozen=True)
class Sizes:
    """Facts of the stored files that exact checks look at."""

    size_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Rule:
    """How a check of samples decides: margin per unit of weight, error levels, planned and smallest n."""

    margin: float
    alpha_pass: float
    alpha_fail: float
    planned: int
    minimum: int


@dataclass(frozen=True)
class Decision:
    """A verdict with the loss per unit of weight and its bounds."""

    verdict: Verdict
    loss: float = math.nan
    lower: float = math.nan
    upper: float = math.nan
    reason: str = ""


class _Invalid(Exception):
    """A comparison that means nothing; the message says why."""


def compare(lower: float, upper: float, margin: float) -> Verdict:
    """PASS where the upper bound is within the margin, FAIL where the lower bound is beyond it.

    >>> compare(0.01, 0.05, margin=0.05), compare(0.06, 0.08, margin=0.05), compare(0.05, 0.06, margin=0.05)
    ('PASS', 'FAIL', 'INCONCLUSIVE')
    """
    finite = math.isfinite(lower) and math.isfinite(upper) and math.isfinite(margin)
    if not finite:
        return "INVALID"
    if upper <= margin:
        return "PASS"
    return "FAIL" if lower > margin else "INCONCLUSIVE"


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over checks: FAIL before INVALID before INCONCLUSIVE; PASS only if all pass.

    No check at all is INVALID: nothing was proven.
    """
    order: tuple[Verdict, ...] = ("FAIL", "INVALID", "INCONCLUSIVE")
    for verdict in order:
        if verdict in verdicts:
            return verdict
    return "PASS" if verdicts else "INVALID"


def interval(losses: Floats, weights: Floats, rule: Rule) -> tuple[float, float, float]:
    """Loss per unit of weight with its lower and upper bound, from example totals, each (n,).

    With Z_i = loss_i − margin · weight_i the sequence bounds mean(Z); as the mean weight is w̄, a bound z on
    mean(Z) is the bound margin + z / w̄ on the loss, so that mean(Z) + width ≤ 0 just if upper ≤ margin.
    """
    n, mean_weight = len(losses), float(weights.mean())
    sd = float(np.std(losses - rule.margin * weights, ddof=1))
    loss = float(losses.sum() / weights.sum())
    down, up = (
        width(n, sd, alpha, mixture_variance(alpha, rule.planned)) / mean_weight
        for alpha in (rule.alpha_fail, rule.alpha_pass)
    )
    return loss, loss - down, loss + up


def decide(losses: Floats, weights: Floats, rule: Rule, identical: bool) -> Decision:
    """The decision after n examples; INCONCLUSIVE means that more are needed.

    losses, weights: (n,) totals per example. identical: both models execute the same weights, which alone
    excuses losses without any variance: otherwise they mean that one model was compared with itself.
    """
    if reason := _unusable(losses, weights):
        return Decision("INVALID", reason=reason)
    if len(losses) < rule.minimum:
        loss = float(losses.sum() / weights.sum()) if len(losses) else math.nan
        return Decision("INCONCLUSIVE", loss)
    if identical and not losses.any():
        return Decision(compare(0.0, 0.0, rule.margin), 0.0, 0.0, 0.0)
    loss, lower, upper = interval(losses, weights, rule)
    if np.ptp(losses) == 0 or lower == upper:
        return Decision("INVALID", loss, reason=f"all {len(losses)} losses are equal, and the weights are not")
    return Decision(compare(lower, upper, rule.margin), loss, lower, upper)


def decide_by_betting(losses: Floats, weights: Floats, rule: Rule, identical: bool) -> Decision:
    """The same for mean losses in [−1, 1] per cluster, exactly and at any n: see `compress.numerics.betting`.

    Clusters count alike, whatever their weight. No flip at all is evidence here, not a lack of variance.
    """
    if reason := _unusable(losses, weights):
        return Decision("INVALID", reason=reason)
    losses = losses / weights
    loss = float(losses.mean()) if len(losses) else math.nan
    if len(losses) < rule.minimum:
        return Decision("INCONCLUSIVE", loss)
    if identical and not losses.any():
        return Decision(compare(0.0, 0.0, rule.margin), 0.0, 0.0, 0.0)
    lower = betting.lower_bound(losses, rule.alpha_fail, rule.margin)
    upper = betting.upper_bound(losses, rule.alpha_pass, rule.margin)
    return Decision(compare(lower, upper, rule.margin), loss, lower, upper)


def _unusable(losses: Floats, weights: Floats) -> str:
    """Why totals mean nothing, or an empty text."""
    if not (np.isfinite(losses).all() and np.isfinite(weights).all()):
        return f"{int((~np.isfinite(losses)).sum())} losses are not finite"
    return "" if (weights > 0).all() else "an example has no scored position"


_DECISIONS: Mapping[str, Callable[[Floats, Floats, Rule, bool], Decision]] = {
    "mean": decide,
    "betting": decide_by_betting,
}
"""Statistic of samples → the decision over totals per cluster, each (n,)."""


def by_cluster(clusters: Sequence[str], values: Floats) -> Floats:
    """Sums of values over the members of each cluster, in order of first appearance.

    >>> by_cluster(["a", "a", "b"], np.array([1.0, 2.0, 4.0])).tolist()
    [3.0, 4.0]
    """
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(place))
    np.add.at(sums, [place[cluster] for cluster in clusters], values)
    return sums


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
    ) -> GateResult:
        """Check the model against its baseline (or parent) on every source.

        A check passes at α = (1 − confidence) / attempts on each source: all must pass, so that no further
        correction is due (intersection–union). It fails at α / k, k being the number of pairs of a
        statistical check and a source, since any one of them fails the gate. attempts: how many alternatives
        may be tried, counted beforehand. model must be another object than its references.
        """
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}, expected at least 1")
        sampled = [check for check in self.checks if check.statistic in _DECISIONS]
        pairs = [(check, data) for check in sampled for data in check.sources(datasets)]
        trials = [
            _Trial(check, data, model, _pick(check, baseline, parent), attempts, len(pairs)) for check, data in pairs
        ]
        for trial in trials:
            trial.prepare(cache)
        for group in _by_source(trials):
            _run(group, cache, progress)
        results = []
        for check in self.checks:
            own = [trial.result() for trial in trials if trial.check is check]
            results += own or [_exact(check, sizes) if check.statistic == "exact" else _without_source(check)]
        return GateResult(verdict=combine([result.verdict for result in results]), checks=results)


def minimum_detectable(evaluator: Evaluator, planned_n: int, sd: float, attempts: int = 1) -> float:
    """Smallest distance from the margin that `planned_n` clusters resolve at 80 % power, in the check's unit.

    sd: standard deviation over clusters of (loss − margin · weight), divided by the mean weight. Where the
    result exceeds the margin, not even a lossless model is likely to pass. 0 for exact checks.
    """
    if evaluator.statistic == "exact":
        return 0.0
    if planned_n < evaluator.minimum_examples:
        return math.inf
    return _RESOLVED[evaluator.statistic](planned_n, sd, (1 - evaluator.confidence) / attempts, evaluator.margin)


def _resolved_by_mean(n: int, sd: float, alpha: float, margin: float) -> float:
    return detectable(n, sd, alpha, mixture_variance(alpha, min(n, _PLANNED)))


_RESOLVED: Mapping[str, Callable[[int, float, float, float], float]] = {
    "mean": _resolved_by_mean,
    "betting": betting.detectable,
}


class _Trial:
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
        planned = max(1, min(self.limit, _PLANNED))
        self.rule = Rule(check.margin, alpha, alpha / k, planned, check.minimum_examples)
        self.new: list[Score] = []
        self.old: list[Score] = []
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

    def prepare(self, cache: ScoreCache | None) -> None:
        """Leave out what cannot be compared with this reference, by its scores alone."""

        def scores(part: Documents) -> list[Score]:
            found: list[Score] = []
            for documents in batches(part.documents):
                batch = self.check.examples(replace(part, documents=documents), self.reference.encode)
                found += cached_scores(self.check, self.reference, part, batch, cache)
            return found

        try:
            self.data, self.figures = self.check.comparable(self.data, scores)
        except GateInconclusive as error:
            self.decision = Decision("INVALID", reason=str(error))

    @property
    def open(self) -> bool:
        return self.decision.verdict == "INCONCLUSIVE" and self.documents < self.limit

    def take(
        self,
        documents: Sequence[tuple[str, str]],
        view: Callable[[LanguageModel], LanguageModel],
        cache: ScoreCache | None,
    ) -> None:
        """Score the next documents and look at the bounds. view: a model with memory, see `_Memo`."""
        documents = documents[: self.limit - self.documents]
        self.documents += len(documents)
        try:
            self._score(documents, view, cache)
        except _Invalid as error:
            self.decision = replace(self.decision, verdict="INVALID", reason=str(error))
            return
        losses = np.array([s.total for s in self.new], dtype=np.float64)
        if not self.check.relative:
            losses = losses - np.array([s.total for s in self.old], dtype=np.float64)
        weights = np.array([s.weight for s in self.new], dtype=np.float64)
        losses, weights = by_cluster(self.clusters, losses), by_cluster(self.clusters, weights)
        if self.check.statistic == "betting" and len(losses) >= self.rule.minimum and self._untouched():
            reason = f"all {len(self.new)} scores of both models are equal, and the weights are not"
            self.decision = Decision("INVALID", float(losses.mean()), reason=reason)
            return
        self.decision = _DECISIONS[self.check.statistic](losses, weights, self.rule, self.identical)

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
            new = self.check.score(view(self.model), batch)
            _match(old, ids, "the reference")
            if [s.weight for s in old] != [s.weight for s in new]:
                raise _Invalid("model and reference were scored on different numbers of positions")
        _match(new, ids, "the model")
        self.new += new
        self.old += old
        self.clusters += [example.cluster for example in batch]

    def result(self) -> CheckResult:
        """What was found when documents ran out or the check was decided."""
        decision, n = self.decision, len(set(self.clusters))
        if decision.verdict == "INCONCLUSIVE" and n < self.rule.minimum:
            reason = f"{n} examples, and at least {self.rule.minimum} are needed"
            decision = replace(decision, verdict="INVALID", reason=reason)
        result = _result(self.check, self.data.source, decision, self.new, self.old)
        return result.model_copy(update={"details": {**self.figures, **result.details}})


def _by_source(trials: Sequence[_Trial]) -> list[list[_Trial]]:
    """Trials that look at the very same documents, together."""
    groups: dict[int, list[_Trial]] = {}
    for trial in trials:
        groups.setdefault(id(trial.data), []).append(trial)
    return list(groups.values())


def _run(trials: Sequence[_Trial], cache: ScoreCache | None, progress: Progress) -> None:
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
            return memos.setdefault(id(model), _Memo(model))  # noqa: B023

        for trial in active:
            trial.take(documents, view, cache)
            done = min(1.0, trial.documents / min(trial.limit, _PLANNED)) if trial.open else 1.0
            progress(f"{trial.check.name} on {data.source}", done)


def batches(documents: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    """Consecutive slices of at most 16 documents and about 2,000 tokens, whichever is less.

    >>> [len(batch) for batch in batches([("a", "x" * 9000), *[("b", "y")] * 17])]
    [1, 16, 1]
    """
    start, characters = 0, 0
    for i, (_, text) in enumerate(documents):
        full = i - start == _BATCH_DOCUMENTS or characters + len(text) > _BATCH_CHARACTERS
        if full and i > start:
            yield documents[start:i]
            start, characters = i, 0
        characters += len(text)
    if start < len(documents):
        yield documents[start:]


@dataclass
class _Memo:
    """A model that keeps the logits of one batch, so that checks on the same windows share a forward pass."""

    inner: LanguageModel
    kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    free: int = _MEMO_BYTES

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


def _pick(check: Evaluator, baseline: LanguageModel, parent: LanguageModel | None) -> LanguageModel:
    if check.against == "baseline":
        return baseline
    if parent is None:
        raise RecipeError(f"{check.name}: there is no parent to compare with here; use against: baseline")
    return parent


def _same_examples(check: Evaluator, data: Documents, model: LanguageModel, reference: LanguageModel) -> list[Example]:
    """The examples as both tokenizers see them; a difference would compare unlike things."""
    ours, theirs = check.examples(data, model.encode), check.examples(data, reference.encode)
    if [e.id for e in ours] != [e.id for e in theirs]:
        raise _Invalid("model and reference have different examples")
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            raise _Invalid(f"model and reference tokenize {a.id!r} differently")
    return ours


def _match(scores: Sequence[Score], ids: Sequence[str], whose: str) -> None:
    if [s.id for s in scores] != list(ids):
        raise _Invalid(f"the scores of {whose} are not those of the examples asked for")


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
        return [Score(**row) for row in kept]
    scores = check.score(model, batch)
    if all(math.isfinite(s.total) for s in scores):
        cache.put(key, [{**asdict(s), "positions": list(s.positions)} for s in scores])
    return scores


def score_key(check: Evaluator, model: LanguageModel, data: Documents, batch: Sequence[Example]) -> str:
    """Digest of all that a score depends on: evaluator, model, runtime, processor and examples."""
    import platform

    import torch

    settings = check.model_dump(mode="json", exclude={"against", "confidence", "max_documents", *check.margin_fields})
    facts = {
        "evaluator": [check.name, check.version, check.definition, settings],
        "model": [model.digest, model.runtime, model.compute],
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


def _exact(check: Evaluator, sizes: Sizes | None) -> CheckResult:
    """An exact check has no sampling error: its value is its own bound."""
    if sizes is None:
        return _result(check, "files", Decision("INVALID", reason="no files were measured"))
    value = check.measure(sizes.size_bytes, sizes.bits_per_weight)
    verdict = compare(value, value, check.margin)
    reason = "the measurement is not finite" if verdict == "INVALID" else ""
    result = _result(check, "files", Decision(verdict, value, value, value, reason))
    return result.model_copy(update={"value": value, "examples": 1, "details": asdict(sizes)})


def _without_source(check: Evaluator) -> CheckResult:
    return _result(check, "", Decision("INVALID", reason="no evaluation source"))


def _result(
    check: Evaluator,
    source: str,
    decision: Decision,
    new: Sequence[Score] = (),
    old: Sequence[Score] = (),
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
        tokens=round(sum(s.weight for s in new)),
        verdict=decision.verdict,
        definition=check.definition + (f" Invalid here: {decision.reason}." if decision.reason else ""),
        details=check.details(new, old) if new else {},
    )


def _value(check: Evaluator, scores: Sequence[Score]) -> float:
    return check.value(scores) if sum(s.weight for s in scores) > 0 else math.nan
