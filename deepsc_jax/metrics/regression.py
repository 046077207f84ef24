"""Figures of predicted clinical indicators: of each alone, their mean, and of all pooled."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy import stats

Values = Float[np.ndarray, "case"]
Table = Float[np.ndarray, "case indicator"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """How far predictions are from the truth.

    Attributes:
      mse, mae, rmse: mean squared and mean absolute errors, and the root of the first.
      r: Pearson's correlation; nan where either is constant.
      r2: the share of the truth's variance that is explained, below 0 for worse than its mean; nan
        for a constant truth.
      n: cases.
    """

    mse: float
    mae: float
    rmse: float
    r: float
    r2: float
    n: int


def fit(truth: Values, given: Values) -> Fit:
    """The figures of one indicator.

    Raises:
      ValueError: they are not as many finite numbers of both, at least one.
    """
    truth, given = np.asarray(truth, float), np.asarray(given, float)
    finite = np.isfinite(truth).all() and np.isfinite(given).all()
    if truth.shape != given.shape or truth.ndim != 1 or not truth.size or not finite:
        raise ValueError(
            f"truth of shape {truth.shape} and predictions of shape {given.shape}: expected as "
            "many finite numbers of both, at least one"
        )
    errors = given - truth
    mse, about = float(np.mean(errors**2)), truth - truth.mean()
    spread = float(np.mean(about**2))
    of_given = given - given.mean()
    both = math.sqrt(spread * float(np.mean(of_given**2)))
    # By its values: a constant's mean may differ from it by a rounding.
    varied, answered = np.ptp(truth) > 0, np.ptp(given) > 0
    return Fit(
        mse,
        float(np.mean(np.abs(errors))),
        math.sqrt(mse),
        float(np.mean(about * of_given)) / both if varied and answered and both else math.nan,
        1 - mse / spread if varied and spread else math.nan,
        truth.size,
    )


def fits(truth: Table, given: Table) -> list[Fit]:
    """The figures of each indicator by itself."""
    return [fit(*columns) for columns in zip(np.transpose(truth), np.transpose(given), strict=True)]


def pooled(truth: Table, given: Table) -> Fit:
    """The figures over all indicators at once, as the paper has them.

    They reward a predictor that only knows the indicators' different means: beside them must stand
    those of such a constant one.
    """
    return fit(np.ravel(truth), np.ravel(given))


def critical_r(cases: int, alpha: float) -> float:
    """The correlation that so many cases exceed with probability `alpha`, two-sided, by chance."""
    t = stats.t.isf(alpha / 2, cases - 2)
    return float(t / math.sqrt(cases - 2 + t**2))
