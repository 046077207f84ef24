"""Lesion masks at many thresholds at once: the curve of DSC against falsely marked volume."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from deepsc_jax.runtime.types import JsonObject

CURVE_THRESHOLDS = tuple(i / 50 for i in range(1, 50))


def marked_voxels(
    probability: Float[np.ndarray, "depth height width"],
    inside: Bool[np.ndarray, "depth height width"],
    lesion: Bool[np.ndarray, "depth height width"],
    thresholds: Sequence[float],
) -> tuple[Int[np.ndarray, "threshold"], Int[np.ndarray, "threshold"]]:
    """Voxels `inside` of at least each threshold's probability, and those of them in lesions.

    Args:
      probability: of lesion.
      inside: what counts, such as the lungs.
      lesion: the truth.
      thresholds: ascending.
    """
    edges = np.asarray(thresholds, probability.dtype)
    # The number of thresholds that a voxel reaches, and from it of voxels that reach each.
    reached = np.searchsorted(edges, probability[inside], side="right")
    counts = [
        np.bincount(voxels, minlength=len(edges) + 1)[::-1].cumsum()[::-1][1:]
        for voxels in (reached, reached[lesion[inside]])
    ]
    return counts[0], counts[1]


@dataclass(frozen=True)
class ScanCurve:
    """A scan at every one of `CURVE_THRESHOLDS`.

    Attributes:
      dsc: of a scan with lesions, else None.
      marked_ml: the volume that is marked.
    """

    dsc: Float[np.ndarray, "threshold"] | None
    marked_ml: Float[np.ndarray, "threshold"]


def of_scan(
    probability: Float[np.ndarray, "depth height width"],
    inside: Bool[np.ndarray, "depth height width"],
    lesion: Bool[np.ndarray, "depth height width"],
    voxel_ml: float,
) -> ScanCurve:
    """The curve of one scan; arguments as of `marked_voxels`."""
    marked, hits = marked_voxels(probability, inside, lesion, CURVE_THRESHOLDS)
    volume = int(lesion.sum())
    return ScanCurve(2 * hits / (marked + volume) if volume else None, marked * voxel_ml)


def curve(scans: Sequence[ScanCurve]) -> JsonObject:
    """What metrics.json says: the mean DSC of scans with lesions and the mean ml marked in others.

    Either is None, at every threshold, without such a scan. `n` counts them.
    """
    with_lesions = [scan.dsc for scan in scans if scan.dsc is not None]
    free = [scan.marked_ml for scan in scans if scan.dsc is None]
    return {
        "thresholds": list(CURVE_THRESHOLDS),
        "dsc": _mean(with_lesions),
        "false_ml": _mean(free),
        "n": {"with_lesions": len(with_lesions), "lesion_free": len(free)},
    }


def _mean(rows: Sequence[Float[np.ndarray, "threshold"]]) -> list[float | None]:
    return np.mean(rows, axis=0).tolist() if rows else [None] * len(CURVE_THRESHOLDS)
