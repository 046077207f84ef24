"""Confidence intervals of figures, by resampling patients."""

import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Shaped
from scipy import stats

from deepsc_jax.metrics.statistics import RESAMPLES, Bootstrap, Rows, bootstrap, rows_of_patients

METHODS = ("percentile", "bca")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with its interval, and how that was made.

    Attributes:
      value: of all cases.
      low, high: the ends; nan where the figure was undefined in every resample.
      level: the share of such intervals that should cover.
      method: `percentile`, `bca` or `delong`.
      resamples: how many; 0 where nothing was drawn.
      undefined: the resamples in which the figure was undefined, which are in no interval.
    """

    value: float
    low: float
    high: float
    level: float
    method: str
    resamples: int
    undefined: int


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How intervals of many figures are made alike; `interval` says what these are."""

    level: float = 0.95
    method: str = "percentile"
    resamples: int = RESAMPLES
    seed: int = 0

    def of(self, figure: Callable[[Rows], float], patients: Shaped[np.ndarray, "case"]) -> Interval:
        """A figure's interval; nan without a case."""
        if not len(patients):
            return Interval(math.nan, math.nan, math.nan, self.level, self.method, 0, 0)
        return interval(
            figure,
            patients,
            level=self.level,
            method=self.method,
            resamples=self.resamples,
            seed=self.seed,
        )


def interval(
    figure: Callable[[Rows], float],
    patients: Shaped[np.ndarray, "case"],
    *,
    level: float = 0.95,
    method: str = "percentile",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A figure's interval over resamples of patients, with replacement.

    `bca` is bias-corrected and accelerated (Efron 1987), by scipy. It does not exist for a figure
    that is undefined in some resample or without some patient, nor for one that is the same in all
    of them: then the percentile interval is given, and `method` says so.

    Args:
      figure: of some of the cases, given by their rows, as often as they were drawn.
      patients: whose a case is; all cases of a patient are drawn together.
      level: the share of such intervals that should cover.
      method: `percentile` or `bca`.
      resamples: how many.
      seed: of the draws.

    Raises:
      ValueError: the method is another, or there is no case.
    """
    drawn = bootstrap(figure, patients, resamples, seed)
    return of_resamples(drawn, figure, patients, level=level, method=method, seed=seed)


def of_resamples(
    drawn: Bootstrap,
    figure: Callable[[Rows], float],
    patients: Shaped[np.ndarray, "case"],
    *,
    level: float = 0.95,
    method: str = "percentile",
    seed: int = 0,
) -> Interval:
    """What `interval` returns, of resamples that `bootstrap` drew of this figure, by this seed."""
    if method not in METHODS:
        raise ValueError(f"method is {method}: expected one of {', '.join(METHODS)}")
    low, high = drawn.interval(level)
    if method == "bca":
        ends = _bca(figure, rows_of_patients(patients), level, len(drawn.values), seed)
        if all(map(math.isfinite, ends)):
            low, high = ends
        else:
            method = "percentile"
    value = float(figure(np.arange(len(patients))))
    return Interval(value, low, high, level, method, len(drawn.values), drawn.undefined)


def _bca(
    figure: Callable[[Rows], float], rows: list[Rows], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    if len(rows) < 2:
        return math.nan, math.nan

    def of_patients(drawn: Int[np.ndarray, "patient"]) -> float:
        return figure(np.concatenate([rows[i] for i in drawn]))

    with warnings.catch_warnings():  # that the ends are nan is seen by the caller
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.bootstrap(
            (np.arange(len(rows)),),
            of_patients,
            n_resamples=resamples,
            vectorized=False,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)
