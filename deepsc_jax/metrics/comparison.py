"""Two runs on the same patients, or two groups of patients: is a difference more than chance?

McNemar's exact test is in `statistics`. Of several comparisons the p are Holm's (`holm`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from deepsc_jax.metrics.intervals import Interval, of_resamples
from deepsc_jax.metrics.statistics import (
    RESAMPLES,
    Bootstrap,
    Decisions,
    Rows,
    Scores,
    bootstrap,
)


@dataclasses.dataclass(frozen=True)
class Area:
    """An area under the ROC curve by DeLong, with its standard error (0 if the classes part)."""

    area: float
    error: float

    def interval(self, level: float = 0.95) -> Interval:
        """The area ± its error times a normal quantile, cut to [0, 1]."""
        reach = stats.norm.isf((1 - level) / 2) * self.error
        low, high = max(self.area - reach, 0.0), min(self.area + reach, 1.0)
        return Interval(self.area, float(low), float(high), level, "delong", 0, 0)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A figure of one run less that of the other.

    Attributes:
      difference: one - other.
      interval: of it.
      p: two-sided, that there is none.
    """

    difference: float
    interval: Interval
    p: float


def delong_area(truth: Decisions, scores: Scores) -> Area:
    """The area under the ROC curve and its error.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 1988; by midranks as Sun and Xu, IEEE
    Signal Processing Letters 2014. Of cases that are independent: one a patient.

    Raises:
      ValueError: there are fewer than two cases of either class.
    """
    areas, covariance = _areas(truth, [scores])
    return Area(float(areas[0]), math.sqrt(covariance[0, 0]))


def delong_test(truth: Decisions, one: Scores, other: Scores, level: float = 0.95) -> Difference:
    """DeLong's test that two scores of the same cases have one area under the ROC curve.

    p is 1 where the two order the cases alike, and their difference has no variance.

    Raises:
      ValueError: there are fewer than two cases of either class.
    """
    areas, covariance = _areas(truth, [one, other])
    difference = float(areas[0] - areas[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    error = math.sqrt(max(variance, 0.0))
    reach = float(stats.norm.isf((1 - level) / 2)) * error
    if error:
        p = float(2 * stats.norm.sf(abs(difference) / error))
    else:
        p = 1.0 if difference == 0 else 0.0
    ends = Interval(difference, difference - reach, difference + reach, level, "delong", 0, 0)
    return Difference(difference, ends, p)


def paired_bootstrap(
    one: Callable[[Rows], float],
    other: Callable[[Rows], float],
    patients: Shaped[np.ndarray, "case"],
    *,
    level: float = 0.95,
    method: str = "percentile",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of two runs' figures of the same patients, resampled together.

    p is twice the share of resamples on the rarer side of 0, where ties are on both and one more
    resample is counted there: it is never 0.

    Args:
      one: a figure of some of the cases, given by their rows.
      other: the same of the other run.
      patients: whose a case is.
      level: of the interval.
      method: of the interval, as `intervals.interval` has them.
      resamples: how many.
      seed: of the draws.
    """

    def difference(rows: Rows) -> float:
        return one(rows) - other(rows)

    drawn = bootstrap(difference, patients, resamples, seed)
    ends = of_resamples(drawn, difference, patients, level=level, method=method, seed=seed)
    defined = drawn.values[~np.isnan(drawn.values)]
    rarer = min(np.sum(defined <= 0), np.sum(defined >= 0)) + 1
    p = min(2 * rarer / (len(defined) + 1), 1.0) if len(defined) else math.nan
    return Difference(ends.value, ends, float(p))


def permutation_test(
    figure: Callable[[Rows], float],
    first: Sequence[Rows],
    second: Sequence[Rows],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """A figure of one group of patients less that of another, who have nothing to do with them.

    The interval is percentile, over resamples of the patients of each group by itself. p is the
    share of the ways to deal the patients into groups of these sizes that give as large a
    difference, either way; one more is counted there, so that it is never 0. Ways, or resamples,
    where the figure is undefined are left out; p is nan where it is undefined as it stands.

    Args:
      figure: of some cases, given by their rows.
      first: the rows of each patient of the one group.
      second: of the other.
      level: of the interval.
      resamples: drawn for each.
      seed: of the draws.

    Raises:
      ValueError: a group has no patient.
    """
    if not (len(first) and len(second)):
        raise ValueError(f"{len(first)} and {len(second)} patients: expected some in both groups")
    rng, count = np.random.default_rng(seed), len(first)
    patients = [*first, *second]

    def difference(chosen: Rows, others: Rows) -> float:
        one, other = (np.concatenate([patients[i] for i in group]) for group in (chosen, others))
        return figure(one) - figure(other)

    every = np.arange(len(patients))
    value = difference(every[:count], every[count:])
    drawn, dealt = np.empty((2, resamples))
    for i in range(resamples):
        sizes = ((0, count), (count, len(second)))
        drawn[i] = difference(*(start + rng.integers(size, size=size) for start, size in sizes))
        order = rng.permutation(every)
        dealt[i] = difference(order[:count], order[count:])
    spread = Bootstrap(drawn)
    low, high = spread.interval(level)
    ends = Interval(value, low, high, level, "percentile", resamples, spread.undefined)
    defined = dealt[~np.isnan(dealt)]
    # Sums in another order differ by rounding: a tie is one.
    beyond = np.sum(np.abs(defined) >= abs(value) * (1 - 1e-9))
    p = math.nan if math.isnan(value) else (beyond + 1) / (len(defined) + 1)
    return Difference(value, ends, float(p))


def holm(p_values: Sequence[float]) -> Float[np.ndarray, "comparison"]:
    """The p of several comparisons, so adjusted that the chance of any false one is kept.

    Source: Holm, Scandinavian Journal of Statistics 1979. Where a p is nan, so is what it becomes,
    and it is not counted.
    """
    p = np.asarray(p_values, float)
    adjusted = np.full(p.shape, math.nan)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _areas(truth: Decisions, scores: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """The areas of several scores of the same cases, and the covariance of the areas."""
    truth, table = np.asarray(truth), np.asarray(scores, float)
    if truth.dtype != bool or table.shape[1:] != truth.shape or not np.isfinite(table).all():
        raise ValueError(
            f"truth is {truth.dtype} {truth.shape}, scores are of shape {table.shape[1:]}: "
            "expected as many true or false as finite scores"
        )
    m, n = np.count_nonzero(truth), np.count_nonzero(~truth)
    if min(m, n) < 2:
        raise ValueError(f"{m} positive and {n} negative cases: expected two of each for an error")
    positive, negative = table[:, truth], table[:, ~truth]
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    # Of a case: the share of the other class that it is on the right side of, ties half.
    of_positive = (ranks[:, :m] - stats.rankdata(positive, axis=1)) / n
    of_negative = 1 - (ranks[:, m:] - stats.rankdata(negative, axis=1)) / m
    covariance = np.atleast_2d(np.cov(of_positive)) / m + np.atleast_2d(np.cov(of_negative)) / n
    return of_positive.mean(axis=1), covariance
