"""The lesions of a mask, one by one, for a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax.metrics.findings import label_components, voxel_ml


@dataclass(frozen=True)
class Lesion:
    """A connected component (26 neighbours) of a lesion mask.

    Attributes:
      ml: its volume.
      extent_mm: of its box, in (D, H, W) order.
      mean: of the scan's values in it.
      at: its voxel nearest to its centroid, in (D, H, W) order.
    """

    ml: float
    extent_mm: tuple[float, float, float]
    mean: float
    at: tuple[int, int, int]


def lesions(
    mask: Bool[np.ndarray, "D H W"],
    values: Float[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    most: int,
) -> tuple[list[Lesion], int]:
    """The `most` largest lesions, largest first, and how many there are.

    Args:
      mask: the lesions.
      values: the scan.
      spacing_mm: of both.
      most: lesions that are measured.
    """
    labels = label_components(mask, spacing_mm, 0.0).astype(np.uint32)
    statistics = cc3d.statistics(labels)
    voxels, boxes = statistics["voxel_counts"][1:], statistics["bounding_boxes"][1:]
    largest = np.argsort(-voxels.astype(np.int64), kind="stable")[:most]
    spacing = np.asarray(spacing_mm)
    measured = []
    for index in largest.tolist():
        box = boxes[index]
        inside = labels[box] == index + 1
        corner = np.array([side.start for side in box])
        places = np.argwhere(inside)
        offsets = (places - places.mean(axis=0)) * spacing
        depth, height, width = (places[(offsets**2).sum(axis=1).argmin()] + corner).tolist()
        depth_mm, height_mm, width_mm = (np.array(inside.shape) * spacing).tolist()
        measured.append(
            Lesion(
                float(voxels[index]) * voxel_ml(spacing_mm),
                (depth_mm, height_mm, width_mm),
                float(values[box][inside].mean()),
                (depth, height, width),
            )
        )
    return measured, len(voxels)
