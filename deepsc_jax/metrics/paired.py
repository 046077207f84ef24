"""Two evaluations of the same scans: is one better by more than chance?"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from deepsc_jax.metrics import classification
from deepsc_jax.metrics.comparison import Difference, delong_test, holm, paired_bootstrap
from deepsc_jax.metrics.intervals import Interval, Resampling
from deepsc_jax.metrics.scan_figures import defined
from deepsc_jax.metrics.statistics import Rows, mcnemar
from deepsc_jax.metrics.summary import class_arrays
from deepsc_jax.metrics.tables import aligned, ends
from deepsc_jax.runtime.types import JsonObject

# Of scans: key of a row, and what it is called.
OF_SCANS = {"dsc": "DSC", "nsd": "NSD at 3 mm"}
OF_CLASSES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "accuracy": ("accuracy", classification.accuracy),
    "auc": ("AUC, macro", classification.macro_auc),
}
BOOTSTRAP, MCNEMAR, DELONG = "paired bootstrap", "exact McNemar", "DeLong"


def paired(
    rows: Sequence[JsonObject],
    others: Sequence[JsonObject],
    patients: Sequence[str],
    classes: Sequence[str],
    resampling: Resampling,
) -> JsonObject:
    """Every figure that both evaluations have: both values, their difference, its interval and p.

    DSC and NSD are over scans with lesions; patients are resampled, both evaluations' together.
    McNemar's test of accuracy and DeLong's of each class's AUC are of scans that are independent:
    they are left out, and `left_out` says so, where a patient has several. The p are Holm's over
    `rows`, and over `evidence`, the energy of maps that both have in lesions.

    Args:
      rows: of each scan, as `summarise` takes them.
      others: the other evaluation's, in the same order.
      patients: whose each scan is.
      classes: the class names, by id.
      resampling: of the bootstraps.

    Raises:
      ValueError: they are of different scans.
    """
    if [row["case"] for row in rows] != [row["case"] for row in others]:
        raise ValueError("the rows are of different scans, or in another order")
    owners = np.asarray(patients)
    found = [
        _of_scans((key,), name, rows, others, owners, resampling) for key, name in OF_SCANS.items()
    ]
    left_out: list[str] = []
    both = [i for i in range(len(rows)) if all("probabilities" in of[i] for of in (rows, others))]
    if both:
        found += _of_classes(
            [rows[i] for i in both],
            [others[i] for i in both],
            owners[both],
            classes,
            resampling,
            left_out,
        )
    if not any(found):
        left_out.append("all: there is no figure that both give")
    evidence = [
        _of_scans(
            ("evidence", name, "energy"), f"energy of {name}", rows, others, owners, resampling
        )
        for name in _common_maps(rows, others)
    ]
    return {"rows": _family(found), "evidence": _family(evidence), "left_out": left_out}


def _family(found: Sequence[JsonObject | None]) -> list[JsonObject]:
    """Those that there are, with their p by Holm."""
    known = [row for row in found if row is not None]
    p = holm([math.nan if row["p"] is None else row["p"] for row in known])
    return [row | {"p_holm": defined(each)} for row, each in zip(known, p, strict=True)]


def _common_maps(rows: Sequence[JsonObject], others: Sequence[JsonObject]) -> list[str]:
    """The names of the maps of evidence that both have."""
    names = [
        dict.fromkeys(name for row in of for name in row.get("evidence", {}))
        for of in (rows, others)
    ]
    return [name for name in names[0] if name in names[1]]


def _value(row: JsonObject, place: tuple[str, ...]) -> float | None:
    for name in place[:-1]:
        row = row.get(name, {})
    return row.get(place[-1])


def _of_scans(
    place: tuple[str, ...],
    name: str,
    rows: Sequence[JsonObject],
    others: Sequence[JsonObject],
    patients: np.ndarray,
    resampling: Resampling,
) -> JsonObject | None:
    pairs = [tuple(_value(each, place) for each in both) for both in zip(rows, others, strict=True)]
    known = [i for i, pair in enumerate(pairs) if None not in pair]
    if not known:
        return None
    one, other = np.array([pairs[i] for i in known], float).T

    def mean_of(values: np.ndarray) -> Callable[[Rows], float]:
        return lambda drawn: float(values[drawn].mean())

    return _bootstrapped(name, mean_of(one), mean_of(other), patients[known], resampling)


def _of_classes(
    rows: Sequence[JsonObject],
    others: Sequence[JsonObject],
    patients: np.ndarray,
    classes: Sequence[str],
    resampling: Resampling,
    left_out: list[str],
) -> list[JsonObject | None]:
    labels, one = class_arrays(rows, classes)
    _, other = class_arrays(others, classes)

    def measured(measure: Callable[[np.ndarray, np.ndarray], float], of: np.ndarray):
        return lambda drawn: measure(labels[drawn], of[drawn])

    found: list[JsonObject | None] = [
        _bootstrapped(name, measured(measure, one), measured(measure, other), patients, resampling)
        for name, measure in OF_CLASSES.values()
    ]
    if len(np.unique(patients)) < len(patients):
        left_out.append(f"{MCNEMAR} and {DELONG}: a patient has several scans")
        return found
    given = one.argmax(axis=1) == labels, other.argmax(axis=1) == labels
    right = np.ones(len(labels), bool)
    only = [int(np.sum(a & ~b)) for a, b in (given, given[::-1])]
    none = Interval(math.nan, math.nan, math.nan, resampling.level, MCNEMAR, 0, 0)
    values = tuple(float(each.mean()) for each in given)
    test = Difference(values[0] - values[1], none, mcnemar(right, *given))
    found.append(_row("accuracy", MCNEMAR, values, test, len(labels)) | {"right_alone": only})
    for i, name in enumerate(classes):
        truth = labels == i
        if min(truth.sum(), (~truth).sum()) < 2:
            left_out.append(f"{DELONG} of {name}: fewer than two scans of it, or of the others")
            continue
        areas = tuple(classification.roc_area(truth, each[:, i]) for each in (one, other))
        test = delong_test(truth, one[:, i], other[:, i], resampling.level)
        found.append(_row(f"AUC, {name}", DELONG, areas, test, len(labels)))
    return found


def _bootstrapped(
    name: str,
    one: Callable[[Rows], float],
    other: Callable[[Rows], float],
    patients: np.ndarray,
    resampling: Resampling,
) -> JsonObject:
    found = paired_bootstrap(
        one,
        other,
        patients,
        level=resampling.level,
        method=resampling.method,
        resamples=resampling.resamples,
        seed=resampling.seed,
    )
    every = np.arange(len(patients))
    row = _row(name, BOOTSTRAP, (one(every), other(every)), found, len(patients))
    return row | {"interval": found.interval.method}


def _row(
    name: str, test: str, values: tuple[float, ...], found: Difference, scans: int
) -> JsonObject:
    return {
        "figure": name,
        "test": test,
        "one": defined(values[0]),
        "other": defined(values[1]),
        "difference": defined(found.difference),
        "low": defined(found.interval.low),
        "high": defined(found.interval.high),
        "p": defined(found.p),
        "n": scans,
    }


HEAD: tuple[str, ...] = (
    "figure",
    "test",
    "n",
    "this",
    "other",
    "difference",
    "interval",
    "p",
    "p, Holm's",
)


def rows_of_table(rows: Sequence[JsonObject]) -> list[list[str]]:
    """A head and the rows that `paired` found, as text."""
    cells = [list(HEAD)]
    for row in rows:
        numbers = [_number(row[key]) for key in ("one", "other", "difference")]
        p = [_number(row[key], 4) for key in ("p", "p_holm")]
        cells.append([row["figure"], row["test"], str(row["n"]), *numbers, ends(row, 3), *p])
    return cells


def paired_table(found: JsonObject) -> str:
    """What `paired` found, as text to print."""
    tables = [aligned(rows_of_table(found[key])) for key in ("rows", "evidence") if found[key]]
    return "\n\n".join(tables + [f"left out: {each}" for each in found["left_out"]])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
