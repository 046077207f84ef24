"""What a chest CT can be: doubts that are refused unless they are allowed, and notes."""

from collections.abc import Collection, Iterable

import numpy as np

from deepsc_jax.data.lungs import find_sides
from deepsc_jax.data.scans import Mask, Scan
from deepsc_jax.data.source import Doubt, settled

LUNG_LITRES = (0.3, 12.0)
"""Both lungs: from a child's, or what disease leaves, to the largest at full inspiration."""
LUNG_MEAN_HU = (-970.0, -150.0)
"""Mean of a lung mask: above room air (-1000), emphysema included; below lungs that are mostly
whitened. Stored values without their offset of -1024 lie above it."""
SMALLER_SIDE = 0.6
"""Least volume of the smaller lung as a share of the larger; healthy: 0.8 to 0.9."""

_SAMPLES_MM = 5.0


def check_lungs(scan: Scan, lung_mask: Mask, allow: Collection[str]) -> tuple[str, ...]:
    """Notes on the lungs of a scan in HU, whose voxels have a size in mm.

    Args:
        scan: in HU.
        lung_mask: of the scan; not empty.
        allow: 'lungs' and 'intensity' make notes of what is refused else.

    Raises:
        InputError: lungs of a volume outside LUNG_LITRES or a mean outside LUNG_MEAN_HU.
    """
    return settled(scan.path or scan.name, _doubts(scan, lung_mask), allow) + _asymmetry(
        scan, lung_mask
    )


def _doubts(scan: Scan, lung_mask: Mask) -> Iterable[Doubt]:
    litres = float(np.count_nonzero(lung_mask)) * float(np.prod(scan.spacing_mm)) / 1e6
    least, most = LUNG_LITRES
    if not least <= litres <= most:
        yield Doubt(
            "lungs",
            f"its lungs have {litres:.3g} l, expected {least:g} to {most:g}",
            "check its voxel size, or give another lung mask",
        )
    lungs = _sampled(lung_mask, scan.spacing_mm)
    mean = float(_sampled(scan.values, scan.spacing_mm)[lungs].mean(dtype=np.float64))
    lowest, highest = LUNG_MEAN_HU
    if not lowest <= mean <= highest:
        yield Doubt(
            "intensity",
            f"its lungs have a mean of {mean:.0f} HU, expected {lowest:g} to {highest:g}",
            "check that its values are HU (stored values often lack an offset of -1024) and that "
            "its lung mask is its own",
        )


def _asymmetry(scan: Scan, lung_mask: Mask) -> tuple[str, ...]:
    """A note where one lung is missing or much smaller: whitened, perhaps, and not found."""
    coarse = _sampled(lung_mask, scan.spacing_mm)
    places = np.argwhere(coarse)
    low, high = places.min(axis=0), places.max(axis=0) + 1
    coarse = coarse[tuple(map(slice, low, high))]
    d, h, w = scan.spacing_mm
    mm = (d * _step(d), h * _step(h), w * _step(w))
    litres = float(np.prod(mm)) / 1e6
    volumes = [np.count_nonzero(side) * litres for side, _ in find_sides(coarse, mm)]
    if len(volumes) < 2:
        return (
            "one lung is found, or two that cannot be told apart: where the other is whitened, "
            "its lesions are not seen; check the lung mask",
        )
    if min(volumes) >= SMALLER_SIDE * max(volumes):
        return ()
    return (
        f"its right lung has {volumes[0]:.2f} l, its left {volumes[1]:.2f} l: where the smaller is "
        "whitened, it may be found in part, and lesions in the rest are not seen; check the lung "
        "mask",
    )


def _sampled(array: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Every n-th voxel along each axis, about _SAMPLES_MM apart."""
    return array[tuple(slice(None, None, _step(size)) for size in spacing_mm)]


def _step(size_mm: float) -> int:
    return max(1, round(_SAMPLES_MM / size_mm))
