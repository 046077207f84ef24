"""The class of every voxel, where a network is to find the lungs as well as what is in them."""

import numpy as np
from jaxtyping import Bool, UInt8

from deepsc_jax.data.classes import IDS
from deepsc_jax.data.lungs import find_sides

Mask = Bool[np.ndarray, "depth height width"]


def class_map(
    lung: Mask, lesion: Mask | None, spacing_mm: tuple[float, float, float]
) -> UInt8[np.ndarray, "depth height width"]:
    """The ids of `classes.IDS`: background, left and right lung, and lesions before all of them.

    The sides are parted as `lungs.find_sides` does, where the mask is of both lungs at once; where
    they cannot be told apart, by the midline between the ends of the mask.

    Args:
      lung: both lungs, in canonical order: from the patient's right to the left.
      lesion: None is taken for no lesion.
      spacing_mm: of the voxels.
    """
    classes = np.zeros(lung.shape, np.uint8)
    sides = find_sides(lung, spacing_mm)
    if len(sides) == 2:
        for side, medial in sides:
            classes[side] = IDS["right_lung"] if medial > 0 else IDS["left_lung"]
    else:
        columns = np.flatnonzero(lung.any(axis=(0, 1)))
        middle = (columns[0] + columns[-1] + 1) // 2 if columns.size else 0
        classes[..., :middle][lung[..., :middle]] = IDS["right_lung"]
        classes[..., middle:][lung[..., middle:]] = IDS["left_lung"]
    if lesion is not None:
        classes[lesion] = IDS["lesion"]
    return classes
