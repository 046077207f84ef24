"""The measures of lesions in section III.B of the paper: count, volume, periphery, spread, size.

One implementation, used by the phantoms' lesion grower, by their tests and by the baselines.
Arrays are (D, H, W), spacings (D, H, W) in mm. Needs neither jax nor a file.
"""

import cc3d
import edt
import numpy as np
from numpy.typing import ArrayLike

MIN_COMPONENT_ML = 0.1
PERIPHERY_MM = 10.0


def voxel_ml(spacing_mm) -> float:
    """Volume of one voxel in ml."""
    return float(np.prod(spacing_mm)) / 1000.0


def label_components(
    mask: np.ndarray, spacing_mm: ArrayLike, min_ml: float = MIN_COMPONENT_ML
) -> np.ndarray:
    """Number the 26-connected components of a mask that hold at least `min_ml`.

    Args:
        mask: bool (D, H, W).
        spacing_mm: voxel size (D, H, W) in mm.
        min_ml: components below this volume become background.

    Returns:
        int32 (D, H, W): 0 for background, 1..n for the components kept.
    """
    labels = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    voxels = np.bincount(labels.ravel())
    # A hair of slack: a component of exactly min_ml counts whatever the rounding of the product.
    keep = voxels * voxel_ml(spacing_mm) >= min_ml * (1 - 1e-6)
    keep[0] = False
    renumber = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return renumber[labels]


def component_boxes(labels: np.ndarray) -> np.ndarray:
    """Bounding boxes of components 1..n in voxels.

    Returns:
        int (n, 2, 3): first voxel and one past the last, in (D, H, W) order.
    """
    statistics = cc3d.statistics(labels.astype(np.uint32))
    boxes = statistics["bounding_boxes"][1:]
    return np.array(
        [[[s.start for s in box], [s.stop for s in box]] for box in boxes], dtype=int
    ).reshape(-1, 2, 3)


def lesion_sizes(labels: np.ndarray, spacing_mm) -> np.ndarray:
    """Bounding-box sizes (n, 3) in mm, (height, length, width) = (D, H, W) order (finding 2)."""
    boxes = component_boxes(labels)
    return (boxes[:, 1] - boxes[:, 0]) * np.asarray(spacing_mm, dtype=float)


def lesion_spread(labels: np.ndarray, spacing_mm) -> float:
    """Root mean square distance of bounding-box centres from their mean, in mm (finding 4).

    0 for one lesion or none.
    """
    boxes = component_boxes(labels)
    if len(boxes) == 0:
        return 0.0
    centres = boxes.mean(axis=1) * np.asarray(spacing_mm, dtype=float)
    return float(np.sqrt(((centres - centres.mean(axis=0)) ** 2).sum(axis=1).mean()))


def depth_in_lung(lung: np.ndarray, spacing_mm) -> np.ndarray:
    """In-plane distance in mm of each voxel's centre to the nearest centre outside the lung mask.

    Taken slice by slice. Eroding a slice with a disc of radius r keeps exactly the voxels with a
    distance above r. 0 outside the lung; float32 (D, H, W).
    """
    # A slice distance far beyond any chest makes the 3D transform a stack of 2D ones.
    anisotropy = (1e5, float(spacing_mm[1]), float(spacing_mm[2]))
    return edt.edt(np.ascontiguousarray(lung), anisotropy=anisotropy, black_border=False)


def peripheral_zone(lung: np.ndarray, spacing_mm, thickness_mm: float = PERIPHERY_MM) -> np.ndarray:
    """The lung minus its slice-by-slice erosion by a disc (paper, equation 4), bool (D, H, W).

    The paper's thickness is a variable; 10 mm is assumed.
    """
    return lung & (depth_in_lung(lung, spacing_mm) <= thickness_mm)


def peripheral_ratio(lesion: np.ndarray, lung: np.ndarray, spacing_mm) -> float:
    """PLR: share of lesion voxels in the peripheral zone (equation 4); 0 without lesion."""
    total = np.count_nonzero(lesion)
    if total == 0:
        return 0.0
    return np.count_nonzero(lesion & peripheral_zone(lung, spacing_mm)) / total


def lesion_volume_ratio(lesion: np.ndarray, lung: np.ndarray) -> float:
    """LVR: lesion volume over lung volume (finding 2)."""
    return np.count_nonzero(lesion) / max(np.count_nonzero(lung), 1)
