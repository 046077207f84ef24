"""Statistics of decisions between a positive class and the rest, and how sure they are.

Arguments are in the order (truth, given), as scikit-learn's: exchanged, sensitivity is precision
and specificity is the negative predictive value.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

RESAMPLES = 1000  # Liang et al. 2021
THRESHOLDS = np.arange(201) / 200  # of their curves

Decisions = Bool[np.ndarray, "case"]
Scores = Float[np.ndarray, "case"]
Rows = Int[np.ndarray, "row"]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Numbers of cases by truth and decision; figures are nan where they are undefined."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def cases(self) -> int:
        """All."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def accuracy(self) -> float:
        """The share that is decided rightly."""
        return _share(self.tp + self.tn, self.cases)

    @property
    def sensitivity(self) -> float:
        """The share of positive cases that is found."""
        return _share(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """The share of negative cases that is left alone."""
        return _share(self.tn, self.tn + self.fp)

    @property
    def precision(self) -> float:
        """The share of what is called positive that is."""
        return _share(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and sensitivity."""
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def kappa(self) -> float:
        """Cohen's: the agreement beyond chance, as a share of what is left beyond it."""
        called, real = self.tp + self.fp, self.tp + self.fn
        by_chance = called * real + (self.cases - called) * (self.cases - real)
        agreed = (self.tp + self.tn) * self.cases
        return _share(agreed - by_chance, self.cases**2 - by_chance)


FIGURES = ("accuracy", "sensitivity", "specificity", "precision", "f1", "kappa")


def confusion(truth: Decisions, given: Decisions) -> Confusion:
    """How many cases are what, where True is the positive class.

    Raises:
      ValueError: they are no decisions of the same cases.
    """
    truth, given = np.asarray(truth), np.asarray(given)
    if truth.shape != given.shape or truth.dtype != bool or given.dtype != bool:
        raise ValueError(
            f"truth is {truth.dtype} {truth.shape} and decisions are {given.dtype} {given.shape}: "
            "expected as many true or false of both"
        )
    cells = (truth & given, ~truth & given, truth & ~given, ~truth & ~given)
    return Confusion(*(int(np.count_nonzero(cell)) for cell in cells))


@dataclasses.dataclass(frozen=True)
class Curves:
    """The ROC and PR curves at `THRESHOLDS`, for figures; areas are `roc_area` and `pr_area`.

    A case is called positive if its score is at least the threshold. Where nothing is, the
    precision is nan.
    """

    false_positive_rate: Float[np.ndarray, "threshold"]
    sensitivity: Float[np.ndarray, "threshold"]
    precision: Float[np.ndarray, "threshold"]


def curves(truth: Decisions, scores: Scores) -> Curves:
    """The curves of scores of [0, 1]."""
    at = [confusion(truth, np.asarray(scores) >= threshold) for threshold in THRESHOLDS]
    return Curves(
        np.array([1 - cells.specificity for cells in at]),
        np.array([cells.sensitivity for cells in at]),
        np.array([cells.precision for cells in at]),
    )


def roc_area(truth: Decisions, scores: Scores) -> float:
    """The area under the ROC curve at all thresholds, ties half; nan for one class alone."""
    positive, negative = np.count_nonzero(truth), np.count_nonzero(~np.asarray(truth))
    if not (positive and negative):
        return math.nan
    above = stats.rankdata(scores)[truth].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def pr_area(truth: Decisions, scores: Scores) -> float:
    """The average precision at all thresholds; nan without a positive case.

    The sum over thresholds of precision times what sensitivity gains there.
    """
    if not np.any(truth):
        return math.nan
    order = np.argsort(-np.asarray(scores), kind="stable")
    ranked = np.asarray(scores)[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # of the cases of one score
    found = np.cumsum(np.asarray(truth)[order])[last]
    called = np.flatnonzero(last) + 1
    gained = np.diff(found, prepend=0) / found[-1]
    return float(gained @ (found / called))


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """A figure of every resample; nan where it was undefined."""

    values: Float[np.ndarray, "resample"]

    @property
    def undefined(self) -> int:
        """The resamples in which the figure was undefined, which are in no interval."""
        return int(np.isnan(self.values).sum())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The percentile interval; nan if the figure was always undefined."""
        if self.undefined == len(self.values):
            return math.nan, math.nan
        tail = 50 * (1 - level)
        low, high = np.nanpercentile(self.values, [tail, 100 - tail])
        return float(low), float(high)


def bootstrap(
    figure: Callable[[Rows], float],
    patients: Shaped[np.ndarray, "case"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrap:
    """A figure of resamples, each of as many patients, drawn with replacement.

    A difference of two figures of the same rows makes it a paired bootstrap.

    Args:
      figure: of some of the cases, given by their rows, as often as they were drawn.
      patients: whose a case is; all cases of a patient are drawn together.
      resamples: how many.
      seed: of the draws, which are those of `scipy.stats.bootstrap` with this generator.

    Raises:
      ValueError: there is no case.
    """
    if not len(patients):
        raise ValueError("there are no cases: expected at least one to draw from")
    rows_of = rows_of_patients(patients)
    alone = np.concatenate(rows_of) if len(rows_of) == len(patients) else None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = rng.integers(len(rows_of), size=len(rows_of))
        rows = np.concatenate([rows_of[i] for i in drawn]) if alone is None else alone[drawn]
        values.append(figure(rows))
    return Bootstrap(np.array(values, float))


def rows_of_patients(patients: Shaped[np.ndarray, "case"]) -> list[Rows]:
    """The rows of each patient's cases, in the order of the patients' names."""
    _, ids = np.unique(patients, return_inverse=True)
    return np.split(np.argsort(ids, kind="stable"), np.cumsum(np.bincount(ids))[:-1])


def mcnemar(truth: Decisions, one: Decisions, other: Decisions) -> float:
    """The exact p of McNemar's test that two readers of the same cases err equally often.

    Binomial, two-sided, of the cases that one of them alone decided rightly; 1 where there is none.
    """
    right, also = np.asarray(one) == truth, np.asarray(other) == truth
    first, second = int(np.sum(right & ~also)), int(np.sum(~right & also))
    if first + second == 0:
        return 1.0
    return float(stats.binomtest(first, first + second, 0.5).pvalue)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
