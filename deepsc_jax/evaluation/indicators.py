"""Predicted indicators of a split against the true ones, and what needs no network beside them.

Figures are of shares: 0 is the least and 1 the largest of the training cases. Each indicator stands
by itself; pooled, as the paper has them, they reward whoever knows the indicators' different means,
so that the constant prediction is pooled beside them.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.metrics.intervals import interval
from deepsc_jax.metrics.regression import Fit, fit, fits, pooled
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject

BINS = 16
PENALTIES = np.logspace(-3, 5, 17)  # of ridge; chosen by leaving out each case of training
NEEDED = 3  # training cases for that

ROWS = {
    "constant": "the training cases' means",
    "nuisances": "ridge on what varies whatever the lesions are: must be at 0",
    "ridge": f"ridge on a histogram of {BINS} grey levels of the patches",
    "oracle": "ridge on what the indicators of phantoms are made of",
}

Table = Float[np.ndarray, "case indicator"]
Features = Callable[[StoredCase], Sequence[float] | np.ndarray]


class Ends(NamedTuple):
    """Of each indicator."""

    low: Float[np.ndarray, "indicator"]
    high: Float[np.ndarray, "indicator"]
    mean: Float[np.ndarray, "indicator"]

    def shares(self, values: Table) -> Table:
        """Values as shares of the way from `low` to `high`."""
        extent = self.high - self.low
        return (values - self.low) / np.where(extent > 0, extent, 1)


def ends_of(cases: Sequence[StoredCase]) -> Ends:
    """The ends of the cases' indicators."""
    targets = targets_of(cases)
    return Ends(targets.min(axis=0), targets.max(axis=0), targets.mean(axis=0))


def targets_of(cases: Sequence[StoredCase]) -> Table:
    """The true indicators."""
    return np.array([case.targets for case in cases], float)


def figures(store: Store, cases: Sequence[StoredCase], values: Table) -> JsonObject:
    """Every indicator's figures, their means, and those of all pooled; nan is None.

    `each` holds `Fit` of every indicator with `r_low` and `r_high`, the ends of its 95 % interval
    over resamples of patients; `constant` is the pooled fit of the training cases' means.

    Args:
      store: whose training cases say what the shares are; without any the cases do.
      cases: what was predicted.
      values: of each case, in the indicators' own units.
    """
    ends = ends_of(store.cases("train") or cases)
    truth, given = ends.shares(targets_of(cases)), ends.shares(values)
    patients = np.array([case.patient for case in cases])
    each = {}
    for name, real, said, one in zip(
        store.data.indicators, truth.T, given.T, fits(truth, given), strict=True
    ):
        of_r = interval(lambda rows, a=real, b=said: fit(a[rows], b[rows]).r, patients)
        each[name] = _shown(one) | {"r_low": _defined(of_r.low), "r_high": _defined(of_r.high)}
    constant = np.tile(ends.shares(ends.mean[None]), (len(cases), 1))
    return {
        "n": len(cases),
        "each": each,
        "mean": {key: _mean([one[key] for one in each.values()]) for key in ("r", "r2", "mae")},
        "pooled": _shown(pooled(truth, given)),
        "constant": _shown(pooled(truth, constant)),
    }


def require_baselines(store: Store) -> None:
    """Refuse a store that cannot fit the baselines.

    Raises:
      InputError: its training split is too small, or it has no indicators.
    """
    cases, names = len(store.cases("train")), len(store.data.indicators)
    if cases < NEEDED or not names:
        raise InputError(
            f"--baselines: the training split of {store.path} has {cases} cases with {names} "
            f"indicators; they are fitted on it and need {NEEDED} cases and an indicator: add "
            "some, or leave --baselines out"
        )


def baselines(store: Store, data_dir: pathlib.Path, split: str) -> dict[str, JsonObject]:
    """The `figures` of each of `ROWS` that there is data for, fitted on training.

    Raises:
      InputError: see `require_baselines`.
    """
    require_baselines(store)
    train, test = store.cases("train"), store.cases(split)
    truth = targets_of(train)
    found = {"constant": figures(store, test, np.tile(truth.mean(axis=0), (len(test), 1)))}
    features: dict[str, Features] = {"ridge": lambda case: histogram(store, case)}
    for name, file in (("nuisances", "nuisances.json"), ("oracle", "oracle.json")):
        if (data_dir / file).exists():
            facts = json.loads((data_dir / file).read_text("utf-8"))
            features[name] = lambda case, facts=facts: list(facts[case.name].values())
    for name, of in features.items():
        x, of_test = (np.array([of(case) for case in cases], float) for cases in (train, test))
        given = [ridge(x, column).predict(of_test) for column in truth.T]
        found[name] = figures(store, test, np.stack(given, axis=1))
    return {name: found[name] for name in ROWS if name in found}


def ridge(x: Float[np.ndarray, "case feature"], y: Float[np.ndarray, "case"]):
    """A standardised ridge regression, fitted."""
    return make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(x, y)


def histogram(store: Store, case: StoredCase) -> Float[np.ndarray, "bin"]:
    """The share of a case's patches at each of `BINS` grey levels."""
    patches = store.read(case.name, "volume")
    return np.histogram(patches, BINS, (0, 1))[0] / patches.size


def table(found: dict[str, JsonObject]) -> str:
    """`baselines` as lines to print below the network's table."""
    lines = []
    for name, text in ROWS.items():
        if name in found:
            each = [_number(one["r"]) for one in found[name]["each"].values()]
            mse = found[name]["pooled"]["mse"]
            lines.append(f"r  {'  '.join(each)}  MSE, pooled  {mse:.4f}  {text}")
    return "\n  ".join(["Without a network (fitted on the training split)", *lines])


def _shown(one: Fit) -> JsonObject:
    return {
        name: _defined(value) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(one).items()
    }


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.2f}"
