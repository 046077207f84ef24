"""From single scans to `metrics.json`.

Undefined figures are None (`null` in JSON), never a number and never left out.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int

from deepsc_jax.config import CLASSES
from deepsc_jax.metrics import calibration, classification
from deepsc_jax.metrics.comparison import delong_area
from deepsc_jax.metrics.intervals import Interval, Resampling
from deepsc_jax.metrics.lesionwise import SIZES_ML, Detection, detection, detection_by_size
from deepsc_jax.metrics.scan_figures import SEGMENTATION, defined, single_lesions
from deepsc_jax.metrics.statistics import Rows
from deepsc_jax.runtime.types import JsonObject

# Key in metrics.json, how the table prints it, and its measure.
CLASSIFICATION = {
    "accuracy": ("accuracy", classification.accuracy),
    "sensitivity": ("sensitivity, macro", classification.macro_sensitivity),
    "specificity": ("specificity, macro", classification.macro_specificity),
    "precision": ("precision, macro", classification.macro_precision),
    "f1": ("F1, macro", classification.macro_f1),
    "auc": ("AUC, macro", classification.macro_auc),
    "auprc": ("AUPRC, macro", classification.macro_auprc),
    "kappa": ("Cohen's kappa", classification.cohen_kappa),
    "mcc": ("Matthews' correlation", classification.matthews),
    "ece": ("calibration error (ECE)", calibration.expected_calibration_error),
    "brier": ("Brier score", calibration.brier_score),
}
# Of single lesions: key in metrics.json, and how the table prints it.
DETECTION = {
    "sensitivity": "lesions found",
    "false_positives_a_scan": "false lesions a scan",
    "f1": "F1 of lesions",
    "segmentation_quality": "mean IoU of those found",
    "panoptic_quality": "panoptic quality",
}
Patients = Sequence[str]


class Spread(TypedDict):
    """A figure over scans: `n` of them have it.

    `low` and `high` are the ends of the mean's interval; `method` is there where that is of another
    kind than asked for.
    """

    mean: float | None
    sd: float | None
    n: int
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    method: NotRequired[str]


def summarise(
    rows: Sequence[JsonObject],
    classes: Sequence[str] = CLASSES,
    *,
    patients: Patients | None = None,
    resampling: Resampling | None = None,
) -> JsonObject:
    """The content of `metrics.json`.

    `lesions` holds each figure of `per_scan` as a `Spread` over the scans that have truth lesions
    (n: of them, those where it is defined; sd: sample standard deviation, None for n < 2), `missed`
    (scans with lesions and nothing predicted), the same again for the scans of each class that has
    lesions (`covid-19`, `cap`), `lesion_free` for the others: share of scans with any false
    positive voxel, and their ml; and `detection` of single lesions. `classes` holds the figures of
    the one run (sd is None), those of each class against the rest (`by_class`), `confusion` (rows:
    label; columns: given class) and `classes`. `intervals` says how the intervals were made.

    Args:
        rows: of each scan its class name as `label`, the figures of `per_scan` where its lesions
            are known and were segmented, and `probabilities`, by class, where it was classified.
        classes: the class names, by id.
        patients: whose each scan is; by default each has a patient of its own.
        resampling: of the intervals.
    """
    resampling = resampling or Resampling()
    owners = np.arange(len(rows)) if patients is None else np.asarray(patients)
    document: JsonObject = {}
    segmented = [i for i, row in enumerate(rows) if "has_lesion" in row]
    if segmented:
        document["lesions"] = _lesions(
            [rows[i] for i in segmented], owners[segmented], classes, resampling
        )
    classified = [i for i, row in enumerate(rows) if "probabilities" in row]
    if classified:
        labels, probabilities = class_arrays([rows[i] for i in classified], classes)
        document["classes"] = _classes(
            labels, probabilities, owners[classified], classes, resampling
        )
    if document:
        method = dataclasses.asdict(resampling)
        document["intervals"] = method | {"over": "patients", "patients": len(np.unique(owners))}
    return document


def class_arrays(
    rows: Sequence[JsonObject], classes: Sequence[str]
) -> tuple[Int[np.ndarray, "scans"], Float[np.ndarray, "scans classes"]]:
    """The class ids and the probabilities of rows that have both by name."""
    labels = np.array([classes.index(row["label"]) for row in rows])
    return labels, np.array([[row["probabilities"][name] for name in classes] for row in rows])


def _lesions(
    rows: Sequence[JsonObject],
    patients: np.ndarray,
    classes: Sequence[str],
    resampling: Resampling,
) -> JsonObject:
    has = np.array([row["has_lesion"] for row in rows])
    labels = np.array([row.get("label", "") for row in rows])

    def group(chosen: np.ndarray) -> JsonObject:
        places = np.flatnonzero(chosen).tolist()
        return _over_lesions([rows[i] for i in places], patients[places], resampling)

    figures = group(has)
    for name in classes:
        if np.any(has & (labels == name)):
            figures[name] = group(has & (labels == name))
    free = [row for row in rows if not row["has_lesion"]]
    figures["lesion_free"] = _over_lesion_free(free, patients[~has], resampling)
    figures["detection"] = _detection(rows, patients, resampling)
    return figures


def _over_lesions(
    rows: Sequence[JsonObject], patients: np.ndarray, resampling: Resampling
) -> JsonObject:
    figures: JsonObject = {
        key: spread([row[key] for row in rows], patients, resampling) for key in SEGMENTATION
    }
    return figures | {"n": len(rows), "missed": sum(row["missed"] for row in rows)}


def _over_lesion_free(
    rows: Sequence[JsonObject], patients: np.ndarray, resampling: Resampling
) -> JsonObject:
    false_positive_ml = [row["false_positive_ml"] for row in rows]
    with_false_positives = sum(volume > 0 for volume in false_positive_ml)
    return {
        "n": len(rows),
        "with_false_positives": with_false_positives,
        "share": with_false_positives / len(rows) if rows else None,
        "false_positive_ml": spread(false_positive_ml, patients, resampling),
        "specificity": spread([row["specificity"] for row in rows], patients, resampling),
    }


def _detection(
    rows: Sequence[JsonObject], patients: np.ndarray, resampling: Resampling
) -> JsonObject:
    """Single lesions of all scans, found and not, and by the lesion's size."""
    scans = [single_lesions(row) for row in rows]
    # Sums over scans are those of their counts: no lesion is matched again in a resample.
    counts = np.array([dataclasses.astuple(detection([scan])) for scan in scans])

    def figure(name: str) -> Callable[[Rows], float]:
        return lambda chosen: getattr(Detection(*counts[chosen].sum(axis=0)), name)

    figures: JsonObject = _counted(detection(scans))
    for key in DETECTION:
        figures[key] = _shown(resampling.of(figure(key), patients), resampling)
    sizes = zip(SIZES_ML[:-1], SIZES_ML[1:], detection_by_size(scans), strict=True)
    figures["by_size_ml"] = [
        {"from": low, "to": None if math.isinf(high) else high}
        | _counted(each)
        | {key: defined(getattr(each, key)) for key in DETECTION}
        for low, high, each in sizes
    ]
    return figures


def _counted(found: Detection) -> JsonObject:
    names = ("found", "missed", "false_positives", "scans", "lesion_free")
    return {name: getattr(found, name) for name in names}


def _classes(
    labels: Int[np.ndarray, "scans"],
    probabilities: Float[np.ndarray, "scans classes"],
    patients: np.ndarray,
    classes: Sequence[str],
    resampling: Resampling,
) -> JsonObject:
    figures: JsonObject = {}
    for key, (_, measure) in CLASSIFICATION.items():
        found = resampling.of(
            lambda rows, of=measure: of(labels[rows], probabilities[rows]), patients
        )
        shown = _shown(found, resampling)
        figures[key] = {"mean": shown.pop("value"), "sd": None, "n": len(labels)} | shown
    alone = len(np.unique(patients)) == len(patients)
    by_class = {
        name: _one_class(labels == i, probabilities[:, i], patients, resampling, alone=alone)
        for i, name in enumerate(classes)
    }
    return figures | {
        "by_class": by_class,
        "confusion": classification.confusion_matrix(labels, probabilities).tolist(),
        "classes": list(classes),
    }


def _one_class(
    truth: Bool[np.ndarray, "scans"],
    scores: Float[np.ndarray, "scans"],
    patients: np.ndarray,
    resampling: Resampling,
    *,
    alone: bool,
) -> JsonObject:
    """A class against the rest: DeLong's interval of the AUC where scans are independent."""

    def of(area: Callable[[np.ndarray, np.ndarray], float]) -> Interval:
        return resampling.of(lambda rows: area(truth[rows], scores[rows]), patients)

    few = min(np.count_nonzero(truth), np.count_nonzero(~truth)) < 2
    if alone and not few:
        auc = delong_area(truth, scores).interval(resampling.level)
    else:
        auc = of(classification.roc_area)
    return {
        "n": int(truth.sum()),
        "auc": _shown(auc, resampling),
        "auprc": _shown(of(classification.pr_area), resampling),
    }


def spread(
    values: Sequence[float | None],
    patients: Sequence[str] | np.ndarray | None = None,
    resampling: Resampling | None = None,
) -> Spread:
    """The mean and sample deviation of those that are defined; with an interval, given patients."""
    known = [i for i, value in enumerate(values) if value is not None]
    x = np.array([values[i] for i in known], float)
    found: Spread = {
        "mean": float(x.mean()) if known else None,
        "sd": float(x.std(ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }
    if patients is None or resampling is None:
        return found
    if not known:
        found["low"] = found["high"] = None
        return found
    ends = resampling.of(lambda rows: float(x[rows].mean()), np.asarray(patients)[known])
    shown = _shown(ends, resampling)
    found["low"], found["high"] = shown["low"], shown["high"]
    if "method" in shown:
        found["method"] = shown["method"]
    return found


def _shown(found: Interval, resampling: Resampling) -> JsonObject:
    """A figure and its interval; how that was made where it is not as asked for."""
    shown: JsonObject = {key: defined(getattr(found, key)) for key in ("value", "low", "high")}
    if found.method != resampling.method:
        shown["method"] = found.method
    return shown
