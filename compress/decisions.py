"""Decisions: from totals per cluster to a verdict, by bounds that hold at all looks together.

"mean" follows the mean loss with an asymptotic confidence sequence, "betting" follows a bounded one exactly,
and "census" adds up a fixed set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.interfaces import Evaluator
from compress.numerics import betting
from compress.numerics.sequences import detectable, mixture_variance, width

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
Floats = NDArray[np.float64]

# n* of the confidence sequence: a clear pass or fail needs 50 to 200 documents, and the bound stays within
# 18 % of the best one for much larger samples.
PLANNED = 200
_ROUNDING = 1e-9  # by which a mean of metrics in [0, 1] may miss it


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

    No check at all is INVALID, as is what is no verdict of a check: nothing was proven.
    """
    order: tuple[Verdict, ...] = ("FAIL", "INVALID", "INCONCLUSIVE")
    for verdict in order:
        if verdict in verdicts:
            return verdict
    return "PASS" if {*verdicts} == {"PASS"} else "INVALID"


def interval(losses: Floats, weights: Floats, rule: Rule) -> tuple[float, float, float]:
    """Loss per unit of weight with its lower and upper bound, from example totals, each (n,).

    With Z_i = loss_i − margin · weight_i the sequence bounds mean(Z); as the mean weight is w̄, a bound z on
    mean(Z) is the bound margin + z / w̄ on the loss, so that mean(Z) + width ≤ 0 just if upper ≤ margin. Either bound is
    wider where Z is skewed towards it.
    """
    n, mean_weight = len(losses), float(weights.mean())
    excess = losses - rule.margin * weights
    sd, skew = float(np.std(excess, ddof=1)), skewness(excess)
    loss = float(losses.sum() / weights.sum())
    down, up = (
        width(n, sd, alpha, mixture_variance(alpha, rule.planned), side) / mean_weight
        for alpha, side in ((rule.alpha_fail, -skew), (rule.alpha_pass, skew))
    )
    return loss, loss - down, loss + up


def skewness(values: Floats) -> float:
    """Σ (x − mean)³ / (n · sd³), and 0 of equal values.

    >>> round(skewness(np.array([0.0, 0.0, 0.0, 4.0])), 4), skewness(np.array([1.0, 1.0]))
    (1.1547, 0.0)
    """
    if np.ptp(values) == 0:
        return 0.0
    centred = values - values.mean()
    return float(np.mean((centred / np.sqrt(np.mean(centred**2))) ** 3))


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

    Clusters count alike, whatever their weight. No flip at all is evidence here, not a lack of variance. A loss outside
    [−1, 1] is INVALID: no bet is fair on it.
    """
    if reason := _unusable(losses, weights):
        return Decision("INVALID", reason=reason)
    losses = losses / weights
    loss = float(losses.mean()) if len(losses) else math.nan
    if (outside := np.abs(losses) > 1 + _ROUNDING).any():
        return Decision("INVALID", loss, reason=f"{int(outside.sum())} losses lie outside [-1, 1]")
    losses = losses.clip(-1, 1)
    if len(losses) < rule.minimum:
        return Decision("INCONCLUSIVE", loss)
    if identical and not losses.any():
        return Decision(compare(0.0, 0.0, rule.margin), 0.0, 0.0, 0.0)
    lower = betting.lower_bound(losses, rule.alpha_fail, rule.margin)
    upper = betting.upper_bound(losses, rule.alpha_pass, rule.margin)
    return Decision(compare(lower, upper, rule.margin), loss, lower, upper)


def decide_by_census(losses: Floats, weights: Floats, rule: Rule, identical: bool) -> Decision:
    """The same for a fixed set of which nothing is left out: the loss is known, and both bounds are the loss.

    rule.minimum: the size of the set; nothing is decided on a part of it.
    """
    if reason := _unusable(losses, weights):
        return Decision("INVALID", reason=reason)
    loss = float(losses.sum() / weights.sum()) if len(losses) else math.nan
    if len(losses) < rule.minimum:
        return Decision("INCONCLUSIVE", loss)
    return Decision(compare(loss, loss, rule.margin), loss, loss, loss)


def _unusable(losses: Floats, weights: Floats) -> str:
    """Why totals mean nothing, or an empty text."""
    if not (finite := np.isfinite(losses) & np.isfinite(weights)).all():
        return f"{int((~finite).sum())} losses are not finite"
    return "" if (weights > 0).all() else "an example has no scored position"


DECISIONS: Mapping[str, Callable[[Floats, Floats, Rule, bool], Decision]] = {
    "mean": decide,
    "betting": decide_by_betting,
    "census": decide_by_census,
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


def minimum_detectable(evaluator: Evaluator, planned_n: int, sd: float, attempts: int = 1) -> float:
    """Smallest distance from the margin that `planned_n` clusters resolve at 80 % power, in the check's unit.

    sd: standard deviation over clusters of (loss − margin · weight), divided by the mean weight. Where the
    result exceeds the margin, not even a lossless model is likely to pass. 0 where there is no sampling error.
    """
    if evaluator.statistic in ("census", "exact"):
        return 0.0
    if planned_n < evaluator.minimum_examples:
        return math.inf
    return _RESOLVED[evaluator.statistic](planned_n, sd, (1 - evaluator.confidence) / attempts, evaluator.margin)


def _resolved_by_mean(n: int, sd: float, alpha: float, margin: float) -> float:
    return detectable(n, sd, alpha, mixture_variance(alpha, min(n, PLANNED)))


_RESOLVED: Mapping[str, Callable[[int, float, float, float], float]] = {
    "mean": _resolved_by_mean,
    "betting": betting.detectable,
}
