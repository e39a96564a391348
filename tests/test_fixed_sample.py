"""What a fixed sample says of a change, beside the gate's decision."""

import math

import numpy as np
import pytest

from compress.fixed_sample import figures
from compress.interfaces import P_VALUE, Score
from compress.numerics.paired import cluster_bootstrap, mcnemar, newcombe
from evaluators.accuracy import Accuracy
from evaluators.perplexity import Perplexity
from evaluators.stereotypes import Stereotypes

ACCURACY, STEREOTYPES = Accuracy(max_drop=3.0), Stereotypes(max_rise=3.0)
OLD, NEW = [0.0] * 30 + [1.0] * 10, [0.0] * 25 + [1.0] * 13 + [0.0] * 2  # 5 rise, 2 fall, 8 stay 1, 25 stay 0
FROM = "change in points, from ({}, 95 %)"


def scores(totals):
    return [Score(str(i), total, 1.0) for i, total in enumerate(totals)]


def test_flips_of_single_answers_are_judged_exactly():
    clusters = [str(i) for i in range(40)]
    low, high = newcombe(8, 5, 2, 25)
    found = figures(STEREOTYPES, scores(NEW), scores(OLD), clusters)
    assert found[P_VALUE] == mcnemar(2, 5)
    assert (found[FROM.format("Newcombe")], found["to"]) == pytest.approx((100 * low, 100 * high))
    assert low < 3 / 40 < high
    fallen = figures(ACCURACY, scores(NEW), scores(OLD), clusters)  # more wrong answers are less accuracy
    assert (fallen[FROM.format("Newcombe")], fallen["to"]) == pytest.approx((-100 * high, -100 * low))


def test_answers_that_share_a_cluster_are_drawn_together():
    clusters = [str(i // 4) for i in range(40)]
    means = [sum(b - a for a, b in zip(OLD[i : i + 4], NEW[i : i + 4])) / 4 for i in range(0, 40, 4)]
    low, high = cluster_bootstrap(np.array(means))
    found = figures(ACCURACY, scores(NEW), scores(OLD), clusters)
    assert found == pytest.approx({FROM.format("cluster bootstrap"): -100 * high, "to": -100 * low})
    assert low < 3 / 40 < high


def test_no_change_is_no_fall():
    found = figures(ACCURACY, scores(OLD), scores(OLD), [str(i // 4) for i in range(40)])
    assert list(found.values()) == [0.0, 0.0] and all(math.copysign(1, end) > 0 for end in found.values())


def test_answers_that_count_in_part_have_no_exact_test():
    clusters = [str(i) for i in range(40)]
    for new, old in ((NEW[:-1] + [0.5], OLD), (NEW, [0.5] + OLD[1:])):
        found = figures(ACCURACY, scores(new), scores(old), clusters)
        assert set(found) == {FROM.format("cluster bootstrap"), "to"}


def test_nothing_is_said_of_what_was_not_compared_or_is_no_answer():
    clusters = [str(i) for i in range(40)]
    assert figures(ACCURACY, [], [], []) == figures(ACCURACY, scores(NEW), [], clusters) == {}
    assert figures(Perplexity(max_increase="5%"), scores(NEW), scores(OLD), clusters) == {}
    for bad in (math.nan, math.inf):
        assert figures(ACCURACY, scores([bad, *NEW[1:]]), scores(OLD), clusters) == {}
        assert figures(ACCURACY, scores(NEW), scores([bad, *OLD[1:]]), clusters) == {}
