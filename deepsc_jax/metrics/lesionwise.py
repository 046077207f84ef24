"""Detection of single lesions: 26-connected components of the masks, matched one to one.

A predicted component and a true one are a pair if their intersection over union (IoU) is at least
`MIN_IOU`; where several would be, the pair of highest IoU is taken first. Above 0.5, the default,
no component can be in two (Kirillov et al., "Panoptic segmentation", CVPR 2019).

Figures are of all lesions of all scans together: a mean of scans' figures would leave out the scans
without lesions, which have none. `tests/metrics/panoptica_peer.py` compares pairs and panoptic
quality with panoptica's (2.1.7) on 200 random pairs of masks, in which 253 lesions are found and
1,399 missed: all counts are equal, and panoptic quality to 1.2e-16.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from deepsc_jax.metrics.findings import MIN_COMPONENT_ML, label_components, voxel_ml
from deepsc_jax.metrics.surface import check_volumes

MIN_IOU = 0.5
SIZES_ML = (0.0, 1.0, 10.0, math.inf)  # assumed: a lesion of 1 ml is 12 mm across, of 10 ml 27 mm


@dataclasses.dataclass(frozen=True)
class Lesions:
    """The lesions of one scan, and which of them were found.

    Attributes:
      truth_ml: the volume of each true lesion.
      iou: with the predicted lesion that it is paired with, 0 where it was missed.
      unpaired_ml: the volume of each predicted lesion that is in no pair: a false positive.
    """

    truth_ml: Float[np.ndarray, "lesion"]
    iou: Float[np.ndarray, "lesion"]
    unpaired_ml: Float[np.ndarray, "false_positive"]


@dataclasses.dataclass(frozen=True)
class Detection:
    """Lesions of several scans, found and not; figures are nan where they are undefined.

    Attributes:
      found: true lesions in a pair.
      missed: true lesions in none.
      false_positives: predicted lesions in none.
      iou: the sum over the pairs.
      scans: all.
      lesion_free: scans without a true lesion.
      lesion_free_with_false_positives: those of them in which one was predicted.
    """

    found: int
    missed: int
    false_positives: int
    iou: float
    scans: int
    lesion_free: int
    lesion_free_with_false_positives: int

    @property
    def sensitivity(self) -> float:
        """The share of true lesions that was found."""
        return _share(self.found, self.found + self.missed)

    @property
    def false_positives_a_scan(self) -> float:
        """Over all scans, with lesions or without."""
        return _share(self.false_positives, self.scans)

    @property
    def f1(self) -> float:
        """Of detection; panoptica's recognition quality."""
        return _share(2 * self.found, 2 * self.found + self.missed + self.false_positives)

    @property
    def segmentation_quality(self) -> float:
        """The mean IoU of the pairs."""
        return _share(self.iou, self.found)

    @property
    def panoptic_quality(self) -> float:
        """The sum of the pairs' IoU over pairs and half of the errors; 0 if nothing was found."""
        return _share(2 * self.iou, 2 * self.found + self.missed + self.false_positives)


def match_lesions(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    *,
    min_iou: float = MIN_IOU,
    min_ml: float = MIN_COMPONENT_ML,
) -> Lesions:
    """The lesions of one scan and their pairs.

    Args:
        pred: the predicted mask.
        truth: the true mask.
        spacing_mm: voxel spacing in (D, H, W) order, mm.
        min_iou: of a pair, above 0.
        min_ml: smaller components of either mask are no lesions.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, a spacing is not positive, or
            `min_iou` is not in (0, 1].
    """
    check_volumes(pred, truth, spacing_mm)
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou is {min_iou}: expected above 0, at most 1")
    of_pred, of_truth = (label_components(mask, spacing_mm, min_ml) for mask in (pred, truth))
    pred_voxels, truth_voxels = (np.bincount(labels.ravel())[1:] for labels in (of_pred, of_truth))
    iou = _iou(of_pred, of_truth, pred_voxels, truth_voxels)
    paired, unpaired = np.zeros(len(truth_voxels)), np.ones(len(pred_voxels), bool)
    candidates = np.argwhere(iou >= min_iou)
    for i, j in candidates[np.argsort(-iou[tuple(candidates.T)], kind="stable")]:
        if unpaired[i] and not paired[j]:
            paired[j], unpaired[i] = iou[i, j], False
    ml = voxel_ml(spacing_mm)
    return Lesions(truth_voxels * ml, paired, pred_voxels[unpaired] * ml)


def detection(scans: Sequence[Lesions]) -> Detection:
    """The lesions of all scans, counted."""
    return _counted(scans, 0.0, math.inf)


def detection_by_size(
    scans: Sequence[Lesions], sizes_ml: Sequence[float] = SIZES_ML
) -> list[Detection]:
    """The same for lesions of at least each of the sizes and below the next, ml.

    A pair is of the true lesion's size and a false positive of its own. A scan without true lesions
    of that size is lesion-free here.
    """
    return [_counted(scans, low, high) for low, high in itertools.pairwise(sizes_ml)]


def _counted(scans: Sequence[Lesions], low_ml: float, high_ml: float) -> Detection:
    def within(ml: np.ndarray) -> np.ndarray:
        return (ml >= low_ml) & (ml < high_ml)

    iou = [scan.iou[within(scan.truth_ml)] for scan in scans]
    false = [int(np.count_nonzero(within(scan.unpaired_ml))) for scan in scans]
    free = [not scan.size for scan in iou]
    return Detection(
        found=sum(int(np.count_nonzero(scan)) for scan in iou),
        missed=sum(int(np.count_nonzero(scan == 0)) for scan in iou),
        false_positives=sum(false),
        iou=float(sum(scan.sum() for scan in iou)),
        scans=len(scans),
        lesion_free=sum(free),
        lesion_free_with_false_positives=sum(f and n > 0 for f, n in zip(free, false, strict=True)),
    )


def _iou(
    of_pred: Int[np.ndarray, "D H W"],
    of_truth: Int[np.ndarray, "D H W"],
    pred_voxels: np.ndarray,
    truth_voxels: np.ndarray,
) -> Float[np.ndarray, "pred_lesion truth_lesion"]:
    shape = len(pred_voxels), len(truth_voxels)
    both = (of_pred > 0) & (of_truth > 0)
    pairs = (of_pred[both] - 1) * shape[1] + of_truth[both] - 1
    shared = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
    return shared / (pred_voxels[:, None] + truth_voxels - shared)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
