"""How well an evidence map points at lesions, inside the lungs of one scan."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from deepsc_jax.metrics.overlap import check_masks


class Pointing(NamedTuple):
    """Figures of one map.

    Attributes:
      auc: the chance that a lesion voxel has more evidence than another lung voxel, ties half
        (area under the voxels' ROC curve).
      energy: share of the map's sum that lies in lesions (Wang et al. 2020, Score-CAM).
      hit: whether the highest voxel is a lesion's (pointing game, Zhang et al. 2018); of several
        highest, the share that is.
    """

    auc: float
    energy: float
    hit: float


def pointing(
    evidence: Float[np.ndarray, "*shape"],
    lesion: Bool[np.ndarray, "*shape"],
    lung: Bool[np.ndarray, "*shape"],
) -> Pointing:
    """The figures of `evidence` over the voxels of `lung`.

    All are nan where no lung voxel is a lesion's, or none is another's; a map without any evidence
    has the AUC 0.5 and neither energy nor a hit.

    Args:
      evidence: at least 0.
      lesion: where the lesions are.
      lung: what counts.

    Raises:
      ValueError: masks that are not boolean, or of different shapes.
    """
    check_masks(lesion=lesion, lung=lung)
    values, truth = np.asarray(evidence, np.float64)[lung], lesion[lung]
    inside = int(truth.sum())
    outside = len(truth) - inside
    if not inside or not outside:
        return Pointing(math.nan, math.nan, math.nan)
    ranks = rankdata(values)
    auc = (ranks[truth].sum() - inside * (inside + 1) / 2) / (inside * outside)
    total, highest = values.sum(), values.max()
    if highest <= 0:
        return Pointing(float(auc), 0.0, 0.0)
    return Pointing(
        float(auc), float(values[truth].sum() / total), float(truth[values == highest].mean())
    )
