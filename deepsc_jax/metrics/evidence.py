"""How well an evidence map points at lesions, inside the lungs of one scan, and explains an answer.

Deletion and insertion are Petsiuk, Das and Saenko's (RISE, BMVC 2018), the random head is of
Adebayo et al. (Sanity checks for saliency maps, NeurIPS 2018).
"""

import math
from collections.abc import Callable
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


def likeness(one: Float[np.ndarray, "voxel"], other: Float[np.ndarray, "voxel"]) -> float:
    """Spearman's rank correlation of two maps of the same voxels; nan where one is constant."""
    ranks = [rankdata(values) for values in (one, other)]
    if any(np.ptp(each) == 0 for each in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


class Perturbed(NamedTuple):
    """The area under the probability of the given class, by the share of the lungs' voxels.

    Attributes:
      deletion: taken away, those of most evidence first: the lower, the better the map.
      insertion: put back, those of most evidence first: the higher, the better.
      random: taken away in random order: what a map must beat.
    """

    deletion: float
    insertion: float
    random: float


SHARES = np.linspace(0, 1, 11)  # assumed: of voxels, at which a network is asked


def perturbation(
    probability: Callable[[Float[np.ndarray, "*shape"]], float],
    volume: Float[np.ndarray, "*shape"],
    evidence: Float[np.ndarray, "*shape"],
    lung: Bool[np.ndarray, "*shape"],
    *,
    seed: int = 0,
) -> Perturbed:
    """How a network's answer hangs on the voxels that its evidence names; it is asked 29 times.

    A voxel that is taken away gets the lungs' median value: still lung, and no lesion.

    Args:
      probability: of the class that the whole scan is given, of a scan.
      volume: the scan.
      evidence: for that class; voxels of equal evidence are in random order.
      lung: the voxels that are taken away.
      seed: of what is random.
    """
    rng = np.random.default_rng(seed)
    inside = np.flatnonzero(lung)
    shuffled = rng.permutation(inside)
    ordered = shuffled[np.argsort(-evidence.ravel()[shuffled], kind="stable")]
    at_random = rng.permutation(inside)
    plain = volume.copy()
    plain[lung] = np.median(volume[lung])
    ends = probability(volume), probability(plain)

    def area(start: np.ndarray, end: np.ndarray, order: np.ndarray, outer: list[float]) -> float:
        said = [outer[0]]
        for share in SHARES[1:-1]:
            mixed = start.copy()
            taken = order[: round(share * len(order))]
            mixed.ravel()[taken] = end.ravel()[taken]
            said.append(probability(mixed))
        return float(np.trapezoid([*said, outer[1]], SHARES))

    return Perturbed(
        area(volume, plain, ordered, list(ends)),
        area(plain, volume, ordered, list(ends[::-1])),
        area(volume, plain, at_random, list(ends)),
    )
