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
from deepsc_jax.metrics.lesionwise import (
    SIZES_ML,
    Detection,
    Lesions,
    detection,
    detection_by_size,
    match_lesions,
)
from deepsc_jax.metrics.overlap import dice, lvr_error, sensitivity, specificity, volume_error_ml
from deepsc_jax.metrics.statistics import Rows
from deepsc_jax.metrics.surface import root_mean_square_surface_distance, surface_distances
from deepsc_jax.runtime.types import JsonObject

NSD_TOLERANCE_MM = 3.0
NSD_TOLERANCES_MM = {"nsd_1_mm": 1.0, "nsd_2_mm": 2.0, "nsd": NSD_TOLERANCE_MM, "nsd_5_mm": 5.0}
# Key in metrics.json, and how the table prints it: name, decimals.
SEGMENTATION = {
    "dsc": ("DSC", 3),
    "sensitivity": ("sensitivity", 3),
    "specificity": ("specificity, lung", 3),
    "specificity_scan": ("specificity, scan", 3),
    **{key: (f"NSD at {mm:g} mm", 3) for key, mm in NSD_TOLERANCES_MM.items()},
    "rmsd_mm": ("RMSD, mm", 1),
    "hd95_mm": ("HD95, mm", 1),
    "assd_mm": ("ASSD, mm", 1),
    "volume_error_ml": ("volume error, ml", 1),
    "volume_error_abs_ml": ("volume error, absolute, ml", 1),
    "lvr_error": ("LVR error", 4),
    "lvr_error_abs": ("LVR error, absolute", 4),
}
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


class SingleLesions(TypedDict):
    """`lesionwise.Lesions` of a scan."""

    truth_ml: list[float]
    iou: list[float]
    unpaired_ml: list[float]


class ScanFigures(TypedDict):
    """The segmentation figures of a scan; None where one is not defined (`per_scan`)."""

    dsc: float | None
    sensitivity: float | None
    specificity: float | None
    specificity_scan: float | None
    nsd_1_mm: float | None
    nsd_2_mm: float | None
    nsd: float | None
    nsd_5_mm: float | None
    rmsd_mm: float | None
    hd95_mm: float | None
    assd_mm: float | None
    volume_error_ml: float
    volume_error_abs_ml: float
    lvr_error: float | None
    lvr_error_abs: float | None
    has_lesion: bool
    missed: bool
    lesion_ml: float
    predicted_ml: float
    false_positive_ml: float
    single_lesions: SingleLesions


class Spread(TypedDict):
    """A figure over scans: `n` of them have it; `low` and `high` are the ends of the mean's interval.

    `method` is there where the interval is of another kind than asked for.
    """

    mean: float | None
    sd: float | None
    n: int
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    method: NotRequired[str]


def per_scan(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    lung: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
) -> ScanFigures:
    """The segmentation figures of one scan, a row for `summarise` once it has a `label`.

    Args:
        pred: the predicted lesion mask.
        truth: the true lesion mask.
        lung: the lung mask, over which `specificity` and the lesion volume ratio (LVR) are taken.
        spacing_mm: voxel spacing in (D, H, W) order, mm.

    Returns:
        `dsc`, `sensitivity`, `specificity` (over the lung), `specificity_scan` and the NSD at 1, 2,
        3 (`nsd`) and 5 mm as shares; `rmsd_mm`, `hd95_mm`, `assd_mm`; `lesion_ml`, `predicted_ml`,
        `false_positive_ml` and the errors of volume in ml, the LVR's as shares; `has_lesion`: the
        truth has one; `missed`: it has one and nothing was predicted, so that `dsc` and NSD are 0
        and distances None; `single_lesions`: `match_lesions`. Without a lesion overlap, NSD,
        distances are None.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    has_lesion = bool(truth.any())
    voxel_ml = math.prod(spacing_mm) / 1000
    of_volume, of_ratio = volume_error_ml(pred, truth, spacing_mm), lvr_error(pred, truth, lung)
    found = match_lesions(pred, truth, spacing_mm)
    row: ScanFigures = {
        "dsc": dice(pred, truth) if has_lesion else None,
        "sensitivity": defined(sensitivity(pred, truth)),
        "specificity": defined(specificity(pred, truth, lung)),
        "specificity_scan": defined(specificity(pred, truth)),
        "nsd_1_mm": None,
        "nsd_2_mm": None,
        "nsd": None,
        "nsd_5_mm": None,
        "rmsd_mm": None,
        "hd95_mm": None,
        "assd_mm": None,
        "volume_error_ml": of_volume,
        "volume_error_abs_ml": abs(of_volume),
        "lvr_error": defined(of_ratio),
        "lvr_error_abs": defined(abs(of_ratio)),
        "has_lesion": has_lesion,
        "missed": has_lesion and not pred.any(),
        "lesion_ml": float(np.count_nonzero(truth) * voxel_ml),
        "predicted_ml": float(np.count_nonzero(pred) * voxel_ml),
        "false_positive_ml": float(np.count_nonzero(pred & ~truth) * voxel_ml),
        "single_lesions": {
            "truth_ml": found.truth_ml.tolist(),
            "iou": found.iou.tolist(),
            "unpaired_ml": found.unpaired_ml.tolist(),
        },
    }
    if has_lesion:
        surfaces = surface_distances(pred, truth, spacing_mm)
        for key, tolerance_mm in NSD_TOLERANCES_MM.items():
            row[key] = surfaces.normalized_dice(tolerance_mm)
        row["hd95_mm"] = defined(surfaces.hausdorff_mm())
        row["assd_mm"] = defined(surfaces.average_mm())
        row["rmsd_mm"] = defined(root_mean_square_surface_distance(pred, truth, spacing_mm))
    return row


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
        places = np.flatnonzero(chosen)
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


def single_lesions(row: JsonObject) -> Lesions:
    """The lesions that a row holds."""
    found: SingleLesions = row["single_lesions"]
    return Lesions(*(np.array(found[key]) for key in ("truth_ml", "iou", "unpaired_ml")))


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
    """A class against the rest: DeLong's interval of the AUC where each scan has its own patient."""

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


def defined(value: float) -> float | None:
    """What JSON holds: None for nan."""
    return None if math.isnan(value) else float(value)
