"""Figures of classifiers that are no means over examples: from probabilities and labels to one number each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Figure = Callable[[Floats, Labels], float]
"""(probabilities (n, classes), labels (n,)) → the figure."""

BINS = 15  # of confidence, as in Guo et al. 2017


def _counts(probabilities: Floats, labels: Labels) -> tuple[Floats, Floats, Floats]:
    """Right ones, predicted ones and actual ones of each class, (classes,) each; predicted is the likeliest class."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    right = np.bincount(labels[predicted == labels], minlength=classes)
    return tuple(  # type: ignore[return-value]
        c.astype(float)
        for c in (right, np.bincount(predicted, minlength=classes), np.bincount(labels, minlength=classes))
    )


def _share(part: Floats, whole: Floats) -> Floats:
    """Part by whole, and 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def macro_precision(probabilities: Floats, labels: Labels) -> float:
    """Mean over classes of the share of a class' predictions that are right; 0 for one that is never predicted."""
    right, predicted, _ = _counts(probabilities, labels)
    return float(_share(right, predicted).mean())


def macro_recall(probabilities: Floats, labels: Labels) -> float:
    """Mean over classes of the share of a class' members that are found; 0 for a class without any."""
    right, _, actual = _counts(probabilities, labels)
    return float(_share(right, actual).mean())


def macro_f1(probabilities: Floats, labels: Labels) -> float:
    """Mean over classes of the harmonic mean of precision and recall."""
    right, predicted, actual = _counts(probabilities, labels)
    return float(_share(2 * right, predicted + actual).mean())


def auc_roc(probabilities: Floats, labels: Labels) -> float:
    """Mean over classes of P(a member's probability of the class exceeds another example's), ties counted half.

    The area under the receiver operating characteristic of each class against the rest (Hanley & McNeil 1982). Classes
    without members, or with all, are left out; NaN where none is left.
    """
    areas = []
    for i in range(probabilities.shape[1]):
        members = labels == i
        n, rest = int(members.sum()), int((~members).sum())
        if n and rest:
            ranks = rankdata(probabilities[:, i])
            areas.append((ranks[members].sum() - n * (n + 1) / 2) / (n * rest))
    return float(np.mean(areas)) if areas else float("nan")


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Σ over bins of (members / n) · |accuracy − mean confidence|: the expected calibration error.

    The confidence of an example is the probability of its likeliest class; bins are `BINS` equal parts of (0, 1],
    closed above. Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bins = np.ceil(confidence * BINS).astype(int)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS + 1)
    return float(np.abs(gaps).sum() / len(labels))


FIGURES: Mapping[str, Figure] = {
    "macro precision": macro_precision,
    "macro recall": macro_recall,
    "macro F1": macro_f1,
    "AUC-ROC": auc_roc,
    "calibration error": calibration_error,
}


def bootstrap(figure: Figure, new: Floats, old: Floats, labels: Labels, rounds: int = 400) -> tuple[float, float]:
    """A 95 % percentile interval of figure(new) − figure(old) over examples drawn with replacement, the same for both.

    new, old: (n, classes) probabilities of the same examples. Efron & Tibshirani 1993, chapter 13; approximate, valid
    for one look alone. Draws without a defined figure are left out.
    """
    generator = np.random.default_rng(0)
    changes = []
    for _ in range(rounds):
        drawn = generator.integers(0, len(labels), len(labels))
        changes.append(figure(new[drawn], labels[drawn]) - figure(old[drawn], labels[drawn]))
    low, high = np.nanquantile(changes, [0.025, 0.975])
    return float(low), float(high)
