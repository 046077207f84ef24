"""Voxel overlap of a predicted and a true lesion mask, and errors of volume."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax.metrics.findings import lesion_volume_ratio, voxel_ml

# Of lesion probability, among which the one is chosen on validation.
THRESHOLDS = tuple(i / 20 for i in range(2, 19))


TOLERATED_DICE = 0.01  # what a threshold may cost: higher ones mark less where no lesion is


def best_threshold(means: Float[np.ndarray, "threshold"]) -> int:
    """The index of the highest of `THRESHOLDS` whose mean DSC is within 0.01 of the best.

    The mean is over scans with lesions; of thresholds that serve them alike, the highest marks the
    least in scans without.
    """
    return int(np.flatnonzero(means >= means.max() - TOLERATED_DICE)[-1])


def dice(pred: Bool[np.ndarray, "..."], truth: Bool[np.ndarray, "..."]) -> float:
    """The Dice similarity coefficient, 2·|P∩T| / (|P| + |T|).

    A missed lesion (empty `pred`, some `truth`) scores 0, and so does a lesion predicted where
    there is none. Two empty masks have no Dice: nan, as in DeepMind's `surface-distance`.

    Args:
        pred: the predicted mask, any shape.
        truth: the true mask, of the same shape.

    Raises:
        ValueError: the masks are not boolean, or their shapes differ.
    """
    check_masks(pred=pred, truth=truth)
    total = np.count_nonzero(pred) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(pred & truth) / total) if total else math.nan


def sensitivity(pred: Bool[np.ndarray, "..."], truth: Bool[np.ndarray, "..."]) -> float:
    """The share of true lesion voxels that are predicted, |P∩T| / |T|; nan where `truth` is empty.

    Args:
        pred: the predicted mask, any shape.
        truth: the true mask, of the same shape.

    Raises:
        ValueError: the masks are not boolean, or their shapes differ.
    """
    check_masks(pred=pred, truth=truth)
    positives = np.count_nonzero(truth)
    return float(np.count_nonzero(pred & truth) / positives) if positives else math.nan


def specificity(
    pred: Bool[np.ndarray, "..."],
    truth: Bool[np.ndarray, "..."],
    region: Bool[np.ndarray, "..."] | None = None,
) -> float:
    """The share of lesion-free voxels that are not predicted: of `region`, or of the whole scan.

    Over the whole scan it is near 1 for any prediction, air being most of it; the paper's figure of
    about 95 % implies the lung as the region. nan where no voxel of the region is lesion-free.

    Args:
        pred: the predicted mask, any shape.
        truth: the true mask, of the same shape.
        region: the voxels that count, of the same shape; all of them by default.

    Raises:
        ValueError: the masks are not boolean, or their shapes differ.
    """
    if region is None:
        check_masks(pred=pred, truth=truth)
        negative = ~truth
    else:
        check_masks(pred=pred, truth=truth, region=region)
        negative = region & ~truth
    negatives = np.count_nonzero(negative)
    return float(np.count_nonzero(negative & ~pred) / negatives) if negatives else math.nan


def volume_error_ml(
    pred: Bool[np.ndarray, "D H W"], truth: Bool[np.ndarray, "D H W"], spacing_mm: Sequence[float]
) -> float:
    """The predicted volume less the true one, ml: below 0 where too little was predicted.

    Defined for empty masks too: a missed lesion's error is all of its volume.

    Raises:
        ValueError: the masks are not boolean, or their shapes differ.
    """
    check_masks(pred=pred, truth=truth)
    return (np.count_nonzero(pred) - np.count_nonzero(truth)) * voxel_ml(spacing_mm)


def lvr_error(
    pred: Bool[np.ndarray, "..."], truth: Bool[np.ndarray, "..."], lung: Bool[np.ndarray, "..."]
) -> float:
    """The predicted lesion volume ratio (LVR) less the true one, in one lung mask; nan without one.

    Raises:
        ValueError: the masks are not boolean, or their shapes differ.
    """
    check_masks(pred=pred, truth=truth, lung=lung)
    if not lung.any():
        return math.nan
    return lesion_volume_ratio(pred, lung) - lesion_volume_ratio(truth, lung)


def check_masks(**masks: np.ndarray) -> None:
    """Raises ValueError, naming the mask, unless all are boolean arrays of one shape."""
    reference = next(iter(masks))
    for name, mask in masks.items():
        if mask.dtype != np.bool_:
            raise ValueError(f"{name} holds {mask.dtype}, expected bool: threshold it first")
        if mask.shape != masks[reference].shape:
            raise ValueError(
                f"{name} has shape {mask.shape}, {reference} has {masks[reference].shape}: "
                "bring both to one grid first"
            )
