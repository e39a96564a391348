"""Figures of classifiers equal scikit-learn's, and calibration its definition bin by bin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from compress.numerics import classification as c


@st.composite
def answers(draw):
    """Probabilities with ties, and labels of which every class has some."""
    classes, n = draw(st.integers(2, 4)), draw(st.integers(8, 40))
    r = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = r.integers(1, 5, (n, classes)).astype(float)
    labels = r.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    return weights / weights.sum(1, keepdims=True), labels


@given(answers())
def test_they_are_scikit_learns(found):
    probabilities, labels = found
    predicted, options = probabilities.argmax(1), {"average": "macro", "zero_division": 0.0}
    every = list(range(probabilities.shape[1]))
    for ours, theirs in (
        (c.macro_precision, precision_score),
        (c.macro_recall, recall_score),
        (c.macro_f1, f1_score),
    ):
        assert ours(probabilities, labels) == pytest.approx(
            theirs(labels, predicted, labels=every, **options), abs=1e-12
        )
    two = probabilities.shape[1] == 2
    asked = probabilities[:, 1] if two else probabilities
    want = roc_auc_score(labels, asked, **({} if two else {"multi_class": "ovr"}))
    assert c.auc_roc(probabilities, labels) == pytest.approx(want, abs=1e-12)


@given(answers())
def test_calibration_error_is_its_definition(found):
    probabilities, labels = found
    want = 0.0
    for i in range(c.BINS):
        inside = [
            j
            for j, row in enumerate(probabilities)
            if i / c.BINS < row.max() + 1e-12 and row.max() <= (i + 1) / c.BINS + 1e-12
        ]
        inside = [j for j in inside if np.ceil(probabilities[j].max() * c.BINS) == i + 1]
        if inside:
            right = np.mean([probabilities[j].argmax() == labels[j] for j in inside])
            want += len(inside) / len(labels) * abs(right - np.mean([probabilities[j].max() for j in inside]))
    assert c.calibration_error(probabilities, labels) == pytest.approx(want, abs=1e-12)


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    labels = np.array([0, 1, 1, 1])  # 0.9: half are right; 0.6 and 0.8: all are
    assert c.calibration_error(probabilities, labels) == pytest.approx((2 * 0.4 + 0.4 + 0.2) / 4)


def test_a_class_that_is_absent_is_left_out_of_the_area_and_alone_has_none():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.6, 0.3, 0.1]])
    assert c.auc_roc(probabilities, np.array([0, 1, 0])) == 1.0
    assert np.isnan(c.auc_roc(probabilities, np.array([0, 0, 0])))


def test_the_bootstrap_pairs_repeats_itself_and_covers():
    r = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        labels = r.integers(0, 2, 150)
        shared = r.normal(size=150)
        old, new = (_two(labels, shared + 0.3 * r.normal(size=150), s) for s in (1.0, 1.0))
        low, high = c.bootstrap(c.auc_roc, new, old, labels, rounds=100)
        covered += low <= 0 <= high
    assert covered >= 33  # of 40 where nothing changed; 38 are expected
    assert (low, high) == c.bootstrap(c.auc_roc, new, old, labels, rounds=100)
    assert c.bootstrap(c.macro_f1, old, old, labels) == (0.0, 0.0)
    worse = c.bootstrap(c.auc_roc, _two(labels, shared, 0.0), _two(labels, shared, 3.0), labels)
    assert worse[1] < 0


def _two(labels, noise, strength):
    p = 1 / (1 + np.exp(-(strength * (2 * labels - 1) + noise)))
    return np.stack([1 - p, p], 1)
