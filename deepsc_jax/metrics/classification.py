"""Figures of the three-way diagnosis, from the class probabilities of every scan.

Macro figures are the plain mean over the classes that the labels contain: a class without a scan
has no sensitivity, and counting it as 0 (scikit-learn's default) or 1 would be an invention.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from sklearn import metrics

Labels = Int[np.ndarray, "scans"]
Probabilities = Float[np.ndarray, "scans classes"]


def accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """The share of scans whose most probable class is their label."""
    labels, probabilities = _checked(labels, probabilities)
    return float(metrics.accuracy_score(labels, probabilities.argmax(axis=1)))


def macro_sensitivity(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the share of the class's scans that are given it (recall)."""

    def recall(is_class: np.ndarray, given: np.ndarray, _: np.ndarray) -> float:
        return float(metrics.recall_score(is_class, given))

    return _macro(recall, labels, probabilities)


def macro_specificity(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the share of the other classes' scans that are not given it.

    nan if all scans are of one class: there are no others.
    """

    def recall_of_others(is_class: np.ndarray, given: np.ndarray, _: np.ndarray) -> float:
        return math.nan if is_class.all() else float(metrics.recall_score(~is_class, ~given))

    return _macro(recall_of_others, labels, probabilities)


def macro_f1(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the harmonic mean of precision and recall."""

    def f1(is_class: np.ndarray, given: np.ndarray, _: np.ndarray) -> float:
        return float(metrics.f1_score(is_class, given))

    return _macro(f1, labels, probabilities)


def macro_auc(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the area under the one-versus-rest ROC curve.

    nan if all scans are of one class.
    """

    def auc(is_class: np.ndarray, _: np.ndarray, probability: np.ndarray) -> float:
        return math.nan if is_class.all() else float(metrics.roc_auc_score(is_class, probability))

    return _macro(auc, labels, probabilities)


def confusion_matrix(
    labels: Labels, probabilities: Probabilities
) -> Int[np.ndarray, "classes classes"]:
    """Counts of scans: row = label, column = most probable class."""
    labels, probabilities = _checked(labels, probabilities)
    classes = np.arange(probabilities.shape[1])
    return metrics.confusion_matrix(labels, probabilities.argmax(axis=1), labels=classes)


def _macro(
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    labels: Labels,
    probabilities: Probabilities,
) -> float:
    """The mean of measure(scan is of class, scan is given class, class's probability)."""
    labels, probabilities = _checked(labels, probabilities)
    given = probabilities.argmax(axis=1)
    return float(
        np.mean([measure(labels == c, given == c, probabilities[:, c]) for c in np.unique(labels)])
    )


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not labels.size:
        raise ValueError(
            f"labels of shape {labels.shape}, probabilities of shape {probabilities.shape}: "
            "expected (scans,) and (scans, classes) with at least one scan"
        )
    if not np.isfinite(probabilities).all():
        scan = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0])
        raise ValueError(
            f"the probabilities of scan {scan} are {probabilities[scan]}: expected numbers"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}: expected 0 to "
            f"{probabilities.shape[1] - 1}, one for each column of the probabilities"
        )
    return labels, probabilities
