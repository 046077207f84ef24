"""Figures of the three-way diagnosis, from the class probabilities of every scan.

Macro figures are the plain mean over the classes that the labels contain: a class without a scan
has no sensitivity, and counting it as 0 (scikit-learn's default) or 1 would be an invention.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from sklearn import metrics

from deepsc_jax.metrics.statistics import confusion, pr_area, roc_area

Labels = Int[np.ndarray, "scans"]
Probabilities = Float[np.ndarray, "scans classes"]


def accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """The share of scans whose most probable class is their label."""
    labels, probabilities = check_scores(labels, probabilities)
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


def macro_precision(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over classes of the share of what is given the class that is of it.

    0 for a class that is given to no scan but has some, as its sensitivity and F1 are: were it left
    out, never answering a class would raise the mean.
    """

    def precision(is_class: np.ndarray, given: np.ndarray, _: np.ndarray) -> float:
        return confusion(is_class, given).precision if given.any() else 0.0

    return _macro(precision, labels, probabilities)


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


def class_auc(labels: Labels, probabilities: Probabilities) -> Float[np.ndarray, "classes"]:
    """The area under each class's one-versus-rest ROC curve; nan where all or none are of it."""
    return _of_classes(roc_area, labels, probabilities)


def class_auprc(labels: Labels, probabilities: Probabilities) -> Float[np.ndarray, "classes"]:
    """The average precision of each class against the rest; nan where no scan is of it.

    A class that is guessed has its share of the scans, not 0.5.
    """
    return _of_classes(pr_area, labels, probabilities)


def macro_auprc(labels: Labels, probabilities: Probabilities) -> float:
    """The mean of `class_auprc` over the classes that the labels contain."""
    return float(np.nanmean(class_auprc(labels, probabilities)))


def cohen_kappa(labels: Labels, probabilities: Probabilities) -> float:
    """Cohen's kappa: agreement beyond chance, as a share of what is left; nan for one class alone.

    Unweighted: the classes have no order.
    """
    labels, given = _answers(labels, probabilities)
    if len(np.unique(np.concatenate([labels, given]))) == 1:
        return math.nan
    return float(metrics.cohen_kappa_score(labels, given))


def matthews(labels: Labels, probabilities: Probabilities) -> float:
    """Matthews' correlation of label and most probable class (Gorodkin 2004 for several classes).

    0 if all scans are given one class; nan if they are all of one, to which nothing correlates.
    """
    labels, given = _answers(labels, probabilities)
    if len(np.unique(labels)) == 1:
        return math.nan
    return float(metrics.matthews_corrcoef(labels, given))


def confusion_matrix(
    labels: Labels, probabilities: Probabilities
) -> Int[np.ndarray, "classes classes"]:
    """Counts of scans: row = label, column = most probable class."""
    labels, probabilities = check_scores(labels, probabilities)
    classes = np.arange(probabilities.shape[1])
    return metrics.confusion_matrix(labels, probabilities.argmax(axis=1), labels=classes)


def _macro(
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    labels: Labels,
    probabilities: Probabilities,
) -> float:
    """The mean of measure(scan is of class, scan is given class, class's probability)."""
    labels, probabilities = check_scores(labels, probabilities)
    given = probabilities.argmax(axis=1)
    return float(
        np.mean([measure(labels == c, given == c, probabilities[:, c]) for c in np.unique(labels)])
    )


def _of_classes(
    measure: Callable[[np.ndarray, np.ndarray], float], labels: Labels, probabilities: Probabilities
) -> Float[np.ndarray, "classes"]:
    labels, probabilities = check_scores(labels, probabilities)
    return np.array([measure(labels == c, row) for c, row in enumerate(probabilities.T)])


def _answers(labels: Labels, probabilities: Probabilities) -> tuple[Labels, Labels]:
    labels, probabilities = check_scores(labels, probabilities)
    return labels, probabilities.argmax(axis=1)


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
