"""Distances between the surfaces of a predicted and a true lesion mask, in mm.

Two definitions of a surface are in use here, because two kinds of measure ask for them:

- normalised surface Dice, Hausdorff and average distance are DeepMind's (`surface-distance`;
  Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", J.
  Med. Internet Res. 2021): the surface is made of the surfels that marching cubes lays between the
  eight voxels round a voxel corner, and each surfel weighs by its area in mm² (`surfels`);
- root mean square distance is over border voxels, unweighted.

MedPy and MONAI take HD95 and ASSD over border voxels, so theirs differ from ours: on 200 random
pairs of masks MedPy's by 1.2 and 0.6 mm in the mean, at most by 10 and 3 mm
(`python tests/metrics/surface_peers.py`). What empty masks give is in the package's docstring.
"""

import dataclasses
import math
from collections.abc import Sequence

import edt
import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import KDTree

from deepsc_jax.metrics.overlap import check_masks
from deepsc_jax.metrics.surfels import neighbour_codes, surfel_areas

# `edt` works in float32: without this a surfel just at the tolerance would count or not by chance.
DISTANCE_SLACK = 1e-6
# What a search in a k-d tree costs of the transform of one voxel: a transform's time is in the
# voxels of the masks' box, a tree's in the surfels, which are few at full resolution.
VOXELS_A_SEARCH = 50
# Beyond it, as from a lesion that was missed, a search visits much of the tree: minutes for a scan.
SEARCH_MM = 10.0


@dataclasses.dataclass(frozen=True)
class SurfaceDistances:
    """How far each surfel of one mask's surface is from the other's, and its area.

    A mask that is empty has no surfels; those of the other are then infinitely far away.

    Attributes:
      pred_mm: from the prediction's surfels to the truth's surface, mm.
      truth_mm: from the truth's surfels to the prediction's surface, mm.
      pred_mm2: areas of the prediction's surfels.
      truth_mm2: areas of the truth's surfels.
    """

    pred_mm: Float[np.ndarray, "pred_surfel"]
    truth_mm: Float[np.ndarray, "truth_surfel"]
    pred_mm2: Float[np.ndarray, "pred_surfel"]
    truth_mm2: Float[np.ndarray, "truth_surfel"]

    def normalized_dice(self, tolerance_mm: float) -> float:
        """The share of both surfaces' area that is within the tolerance of the other; see below."""
        reach = tolerance_mm * (1 + DISTANCE_SLACK)
        total = self.pred_mm2.sum() + self.truth_mm2.sum()
        near = self.pred_mm2[self.pred_mm <= reach].sum()
        near += self.truth_mm2[self.truth_mm <= reach].sum()
        return float(near / total) if total else math.nan

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """Within how far this percentage of either surface's area lies of the other (HD95).

        The larger of the two directions, as `compute_robust_hausdorff`; nan if a mask is empty.
        """
        if not (self.pred_mm.size and self.truth_mm.size):
            return math.nan
        return max(
            _area_percentile(self.pred_mm, self.pred_mm2, percent),
            _area_percentile(self.truth_mm, self.truth_mm2, percent),
        )

    def average_mm(self) -> float:
        """The mean distance over the area of both surfaces together (ASSD); nan if one is empty.

        `compute_average_surface_distance` has the two directions' means, which their areas pool.
        """
        if not (self.pred_mm.size and self.truth_mm.size):
            return math.nan
        both = self.pred_mm @ self.pred_mm2 + self.truth_mm @ self.truth_mm2
        return float(both / (self.pred_mm2.sum() + self.truth_mm2.sum()))


def surface_distances(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
) -> SurfaceDistances:
    """The distances that NSD at any tolerance, HD95 and ASSD are made of, found once.

    They are good to 1e-6 of themselves: `edt`, where it is quicker, is in float32. What lies beyond
    the array is outside the masks. Oracle: surface-distance, on 200 random pairs.

    Args:
        pred: the predicted mask (D, H, W).
        truth: the true mask (D, H, W).
        spacing_mm: voxel spacing in (D, H, W) order, mm.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    check_volumes(pred, truth, spacing_mm)
    pred, truth = _crop_to_union(pred, truth)
    areas = surfel_areas(spacing_mm)
    pred_codes, truth_codes = neighbour_codes(pred), neighbour_codes(truth)
    pred_surface, truth_surface = (
        (codes != 0) & (codes != 255) for codes in (pred_codes, truth_codes)
    )
    pred_mm, truth_mm = _between(pred_surface, truth_surface, spacing_mm)
    return SurfaceDistances(
        pred_mm, truth_mm, areas[pred_codes[pred_surface]], areas[truth_codes[truth_surface]]
    )


def normalized_surface_dice(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    tolerance_mm: float = 3.0,
) -> float:
    """Normalised surface Dice (NSD): the share of both surfaces within the tolerance of the other.

    The area of the surfels of either mask that lie no further than `tolerance_mm` from the other
    mask's surface, over the area of both surfaces. What lies beyond the array is outside the mask.

    A missed lesion (empty `pred`, some `truth`) scores 0, and so does a lesion predicted where
    there is none. Two empty masks have no surface: nan, as in DeepMind's package.

    Args:
        pred: the predicted mask (D, H, W).
        truth: the true mask (D, H, W).
        spacing_mm: voxel spacing in (D, H, W) order, mm.
        tolerance_mm: the distance that still counts as agreement, mm.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    return surface_distances(pred, truth, spacing_mm).normalized_dice(tolerance_mm)


def root_mean_square_surface_distance(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
) -> float:
    """Symmetric root mean square surface distance (RMSD) in mm.

    For every border voxel of either mask, the distance from its centre to the centre of the nearest
    border voxel of the other; the root of the mean of all their squares, pooled over both ways. A
    border voxel is one with a face neighbour outside its mask; beyond the array is outside.

    nan if either mask is empty: there is no distance to a surface that does not exist. Such a scan
    is counted as missed (see `summary`), not given a distance.

    Args:
        pred: the predicted mask (D, H, W).
        truth: the true mask (D, H, W).
        spacing_mm: voxel spacing in (D, H, W) order, mm.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    check_volumes(pred, truth, spacing_mm)
    if not (pred.any() and truth.any()):
        return math.nan
    pred, truth = _crop_to_union(pred, truth)
    distances = np.concatenate(_between(_border(pred), _border(truth), spacing_mm))
    return float(np.sqrt(np.mean(np.square(distances, dtype=np.float64))))


def check_volumes(pred: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Raises ValueError unless both are boolean volumes of one shape, with positive spacings."""
    check_masks(pred=pred, truth=truth)
    if pred.ndim != 3 or len(spacing_mm) != 3:
        raise ValueError(
            f"masks of shape {pred.shape} with spacing {tuple(spacing_mm)}: expected (D, H, W) "
            "masks and three spacings in mm"
        )
    if not all(math.isfinite(step) and step > 0 for step in spacing_mm):
        raise ValueError(
            f"spacing_mm is {tuple(spacing_mm)}: expected three positive numbers in mm"
        )


def _area_percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(areas[order]) / areas.sum()
    index = np.searchsorted(reached, percent / 100)
    return float(distances[order[min(index, len(order) - 1)]])


def _border(mask: Bool[np.ndarray, "D H W"]) -> Bool[np.ndarray, "D H W"]:
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for neighbours in (slice(None, -2), slice(2, None)):
            window = [slice(1, -1)] * 3
            window[axis] = neighbours
            inner &= padded[tuple(window)]
    return mask & ~inner


def _between(
    one: np.ndarray, other: np.ndarray, spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The distance in mm of every True voxel of either to the nearest of the other."""
    count = np.count_nonzero(one), np.count_nonzero(other)
    if not all(count):
        return np.full(count[0], math.inf), np.full(count[1], math.inf)
    if sum(count) * VOXELS_A_SEARCH <= one.size:
        points, others = (_positions_mm(mask, spacing_mm) for mask in (one, other))
        near = _search(points, others), _search(others, points)
        if all(np.isfinite(distances).all() for distances in near):
            return near
    return _transform(other, spacing_mm)[one], _transform(one, spacing_mm)[other]


def _search(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The distance of each point to the nearest of the others, inf beyond `SEARCH_MM`."""
    return KDTree(others).query(points, distance_upper_bound=SEARCH_MM)[0]


def _positions_mm(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    # Much faster than numpy's argwhere.
    indices = np.unravel_index(np.flatnonzero(mask), mask.shape)
    return np.stack(indices, axis=1) * np.asarray(spacing_mm)


def _transform(points: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The distance in mm of every voxel to the nearest True one."""
    anisotropy = tuple(map(float, spacing_mm))
    return edt.edt(np.ascontiguousarray(~points), anisotropy=anisotropy)


def _crop_to_union(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks within their common bounding box: all surfaces lie in it, and little else."""
    box = tuple(map(_hull, zip(_occupied(pred), _occupied(truth), strict=True)))
    return pred[box], truth[box]


def _occupied(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.asarray(mask.any(axis=2))  # along memory, and all that two of the axes need
    along = rows.any(axis=1), rows.any(axis=0), mask.any(axis=(0, 1))
    return np.asarray(along[0]), np.asarray(along[1]), np.asarray(along[2])


def _hull(occupied: tuple[np.ndarray, np.ndarray]) -> slice:
    where = np.flatnonzero(occupied[0] | occupied[1])
    return slice(where[0], where[-1] + 1) if where.size else slice(0, 0)
