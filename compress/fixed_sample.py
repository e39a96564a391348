"""What a fixed sample would say of a change in answers, beside what the gate decides.

For reading: a gate looks again and again, where these hold at one look, chosen beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.decisions import by_cluster
from compress.interfaces import P_VALUE, Evaluator, Score
from compress.numerics import paired


def figures(check: Evaluator, new: Sequence[Score], old: Sequence[Score], clusters: Sequence[str]) -> dict[str, float]:
    """Points of 100 by which the check's metric changed, as a 95 % interval; and the p of no change, where exact.

    Where every cluster is one answer, right or wrong, that is the exact McNemar test and Newcombe's interval; where
    several answers stand and fall together, or count in part, clusters are drawn with replacement. clusters: of each
    score. Empty for checks that no bets decide, and where nothing finite was compared.
    """
    before, after = (np.array([score.total for score in scores]) for scores in (old, new))
    if check.statistic != "betting" or not len(before) or not np.isfinite([*before, *after]).all():
        return {}
    found: dict[str, float] = {}
    if len({*clusters}) == len(clusters) and {*before, *after} <= {0.0, 1.0}:
        both, risen, fallen = (int(n.sum()) for n in (before * after, after > before, before > after))
        low, high = paired.newcombe(both, risen, fallen, len(before) - both - risen - fallen)
        found[P_VALUE], how = paired.mcnemar(fallen, risen), "Newcombe"
    else:
        means = by_cluster(clusters, after - before) / by_cluster(clusters, np.ones(len(before)))
        low, high = paired.cluster_bootstrap(means)
        how = "cluster bootstrap"
    # Accuracy falls as wrong answers rise.
    falling = check.value([Score("", 1.0, 1.0)]) < check.value([Score("", 0.0, 1.0)])
    ends = sorted((-100 if falling else 100) * end + 0.0 for end in (low, high))
    return found | {f"change in points, from ({how}, 95 %)": ends[0], "to": ends[1]}
