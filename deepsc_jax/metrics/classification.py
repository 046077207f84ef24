"""Figures of the three-way diagnosis, from the class probabilities of every scan.

Macro figures are the plain mean over the classes that the labels contain: a class without a scan
has no sensitivity, and counting it as 0 (scikit-learn's default) or 1 would be an invention. The
oracle of all is scikit-learn, whose F1 of 60 scans takes 65 times as long and whose macro AUC 13
times: an interval needs a thousand of each.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from deepsc_jax.metrics.statistics import pr_area, roc_area

Labels = Int[np.ndarray, "scans"]
Probabilities = Float[np.ndarray, "scans classes"]
Rows = Float[np.ndarray, "classes"]


def accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """The share of scans whose most probable class is their label."""
    counts = confusion_matrix(labels, probabilities)
    return float(np.trace(counts) / counts.sum())


def macro_sensitivity(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the share of the class's scans that are given it (recall)."""
    cells = _cells(labels, probabilities)
    return float(np.mean(cells.tp / (cells.tp + cells.fn)))


def macro_specificity(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the share of the other classes' scans that are not given it.

    nan if all scans are of one class: there are no others.
    """
    cells = _cells(labels, probabilities)
    others = cells.tn + cells.fp
    return float(np.mean(cells.tn / others)) if others.all() else math.nan


def macro_precision(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the share of what is given the class that is of it.

    0 for a class that is given to no scan but has some, as its sensitivity and F1 are: were it left
    out, never answering a class would raise the mean.
    """
    cells = _cells(labels, probabilities)
    return float(np.mean(cells.tp / np.maximum(cells.tp + cells.fp, 1)))


def macro_f1(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the harmonic mean of precision and recall."""
    cells = _cells(labels, probabilities)
    return float(np.mean(2 * cells.tp / (2 * cells.tp + cells.fp + cells.fn)))


def macro_auc(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the area under the one-versus-rest ROC curve.

    nan if all scans are of one class.
    """
    return _over_present(class_auc, labels, probabilities)


def class_auc(labels: Labels, probabilities: Probabilities) -> Rows:
    """The area under each class's one-versus-rest ROC curve; nan where all or none are of it."""
    return _of_classes(roc_area, labels, probabilities)


def class_auprc(labels: Labels, probabilities: Probabilities) -> Rows:
    """The average precision of each class against the rest; nan where no scan is of it.

    A class that is guessed has its share of the scans, not 0.5.
    """
    return _of_classes(pr_area, labels, probabilities)


def macro_auprc(labels: Labels, probabilities: Probabilities) -> float:
    """The mean of `class_auprc` over the classes that the labels contain."""
    return _over_present(class_auprc, labels, probabilities)


def cohen_kappa(labels: Labels, probabilities: Probabilities) -> float:
    """Cohen's kappa: agreement beyond chance, as a share of what is left; nan for one class alone.

    Unweighted: the classes have no order.
    """
    right, by_chance, real, given = _agreement(confusion_matrix(labels, probabilities))
    if np.count_nonzero(real + given) == 1:
        return math.nan
    return float((right - by_chance) / (1 - by_chance))


def matthews(labels: Labels, probabilities: Probabilities) -> float:
    """Matthews' correlation of label and most probable class (Gorodkin 2004 for several classes).

    0 if all scans are given one class; nan if they are all of one, to which nothing correlates.
    """
    right, by_chance, real, given = _agreement(confusion_matrix(labels, probabilities))
    if np.count_nonzero(real) == 1:
        return math.nan
    variances = (1 - np.square(real).sum()) * (1 - np.square(given).sum())
    return float((right - by_chance) / math.sqrt(variances)) if variances > 0 else 0.0


def confusion_matrix(
    labels: Labels, probabilities: Probabilities
) -> Int[np.ndarray, "classes classes"]:
    """Counts of scans: row = label, column = most probable class."""
    labels, probabilities = check_scores(labels, probabilities)
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


class _Cells(NamedTuple):
    """Of each class that the labels contain, against the rest."""

    tp: Int[np.ndarray, "class"]
    fp: Int[np.ndarray, "class"]
    fn: Int[np.ndarray, "class"]
    tn: Int[np.ndarray, "class"]


def _cells(labels: Labels, probabilities: Probabilities) -> _Cells:
    counts = confusion_matrix(labels, probabilities)
    right, real, given = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    others = counts.sum() - real - given + right
    present = real > 0
    return _Cells(*(cells[present] for cells in (right, given - right, real - right, others)))


def _agreement(counts: Int[np.ndarray, "classes classes"]) -> tuple[float, float, Rows, Rows]:
    """Shares of scans: given their label; given it by chance; of each label; given each class."""
    shares = counts / counts.sum()
    real, given = shares.sum(axis=1), shares.sum(axis=0)
    return float(np.trace(shares)), float(real @ given), real, given


def _over_present(
    measure: Callable[[Labels, Probabilities], Rows], labels: Labels, probabilities: Probabilities
) -> float:
    return float(measure(labels, probabilities)[np.unique(labels)].mean())


def _of_classes(
    measure: Callable[[np.ndarray, np.ndarray], float], labels: Labels, probabilities: Probabilities
) -> Rows:
    labels, probabilities = check_scores(labels, probabilities)
    return np.array([measure(labels == c, row) for c, row in enumerate(probabilities.T)])


def check_scores(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; raises ValueError, saying what is wrong, unless they fit each other."""
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
