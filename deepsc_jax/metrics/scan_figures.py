"""The segmentation figures of one scan, as scans.json holds them.

Undefined figures are None (`null` in JSON), never a number and never left out.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Bool

from deepsc_jax.metrics.lesionwise import Lesions, match_lesions
from deepsc_jax.metrics.overlap import dice, lvr_error, sensitivity, specificity, volume_error_ml
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


def single_lesions(row: JsonObject) -> Lesions:
    """The lesions that a row holds."""
    found: SingleLesions = row["single_lesions"]
    return Lesions(*(np.array(found[key]) for key in ("truth_ml", "iou", "unpaired_ml")))


def defined(value: float) -> float | None:
    """What JSON holds: None for nan."""
    return None if math.isnan(value) else float(value)
