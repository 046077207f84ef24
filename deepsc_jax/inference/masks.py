"""From a lesion probability to a lesion mask, for results and evaluations alike."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax.metrics.findings import label_components


def lesion_mask(
    probability: Float[np.ndarray, "depth height width"],
    inside: Bool[np.ndarray, "depth height width"] | None,
    threshold: float,
    spacing_mm: Sequence[float],
    smallest_ml: float = 0.0,
) -> Bool[np.ndarray, "depth height width"]:
    """The voxels that are lesion.

    Args:
      probability: of lesion.
      inside: outside of which there is none; None for everywhere.
      threshold: probability from which a voxel is lesion.
      spacing_mm: voxel size (D, H, W) in mm.
      smallest_ml: connected lesions (26 neighbours) below it are removed; 0 for none.
    """
    mask = probability >= threshold
    if inside is not None:
        mask &= inside
    return label_components(mask, spacing_mm, smallest_ml) > 0 if smallest_ml > 0 else mask
