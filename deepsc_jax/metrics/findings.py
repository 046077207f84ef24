"""The measures of lesions in section III.B of the paper: count, volume, periphery, spread, size.

One implementation, used by the phantoms' lesion grower, by their tests, by the baselines and by
`analyze`. Arrays are (D, H, W), spacings (D, H, W) in mm. Needs neither jax nor a file.
"""

import dataclasses

import cc3d
import edt
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

MIN_COMPONENT_ML = 0.1
PERIPHERY_MM = 10.0
THICKNESSES_MM = tuple(range(36))  # Fig. 1(i)
HU_EDGES = np.arange(-1040, 421, 20)  # of the distribution; what is beyond counts in the last bins


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


def depth_in_lung(lung: np.ndarray, spacing_mm, *, volumetric: bool = False) -> np.ndarray:
    """Distance in mm of each voxel's centre to the nearest centre outside the lung mask.

    Taken slice by slice. Eroding a slice with a disc of radius r keeps exactly the voxels with a
    distance above r; `volumetric`, a ball erodes the volume, so that domes and bases are near the
    border too. 0 outside the lung; float32 (D, H, W).
    """
    # A slice distance far beyond any chest makes the 3D transform a stack of 2D ones.
    depth_mm = float(spacing_mm[0]) if volumetric else 1e5
    anisotropy = (depth_mm, float(spacing_mm[1]), float(spacing_mm[2]))
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


@dataclasses.dataclass(frozen=True)
class ScanFindings:
    """The findings of one scan; without a lesion, ratios but the LVR are nan.

    Attributes:
      lesion_ml, lung_ml: volumes of the masks; of lesions, of those that count.
      lvr: their ratio.
      outside_lung: share of the lesions' voxels that are not in the lung mask.
      sizes_mm: of each lesion's bounding box along (D, H, W): height, length, width.
      spread_mm: `lesion_spread`.
      plr: the peripheral ratio at each of `THICKNESSES_MM`.
      hu_ml: lesion volume between `HU_EDGES`; None of images that are not in HU.
    """

    lesion_ml: float
    lung_ml: float
    lvr: float
    outside_lung: float
    sizes_mm: Float[np.ndarray, "lesion 3"]
    spread_mm: float
    plr: Float[np.ndarray, "thickness"]
    hu_ml: Float[np.ndarray, "bin"] | None

    @property
    def count(self) -> int:
        """The number of lesions."""
        return len(self.sizes_mm)


def scan_findings(
    lesion: Bool[np.ndarray, "D H W"],
    lung: Bool[np.ndarray, "D H W"],
    hu: Float[np.ndarray, "D H W"] | None,
    spacing_mm: tuple[float, float, float],
    *,
    min_ml: float = MIN_COMPONENT_ML,
    volumetric: bool = False,
) -> ScanFindings:
    """The findings of one scan.

    Args:
      lesion: its lesion mask.
      lung: its lung mask.
      hu: its values; None where they are not in HU.
      spacing_mm: voxel size (D, H, W) in mm.
      min_ml: connected lesions below it are left out of every figure.
      volumetric: erode the lung by a ball, and not slice by slice by a disc as the paper does.
    """
    labels = label_components(lesion, spacing_mm, min_ml)
    kept, ml = labels > 0, voxel_ml(spacing_mm)
    total = np.count_nonzero(kept)
    inside = kept & lung
    depths = np.sort(depth_in_lung(lung, spacing_mm, volumetric=volumetric)[inside])
    # As float32, which depths are in: at exactly a thickness a voxel is within it.
    reached = np.searchsorted(depths, np.asarray(THICKNESSES_MM, np.float32), side="right")
    hu_ml = None
    if hu is not None:
        values = np.clip(hu[kept], HU_EDGES[0], HU_EDGES[-1])
        hu_ml = np.histogram(values, HU_EDGES)[0] * ml
    return ScanFindings(
        lesion_ml=total * ml,
        lung_ml=np.count_nonzero(lung) * ml,
        lvr=lesion_volume_ratio(kept, lung),
        outside_lung=1 - np.count_nonzero(inside) / total if total else np.nan,
        sizes_mm=lesion_sizes(labels, spacing_mm),
        spread_mm=lesion_spread(labels, spacing_mm) if total else np.nan,
        plr=reached / total if total else np.full(len(THICKNESSES_MM), np.nan),
        hu_ml=hu_ml,
    )
