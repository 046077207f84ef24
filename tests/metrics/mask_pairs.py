"""Random pairs of masks of random spacing, and a pair as large as a scan."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

PAIRS = 200


class Pair(NamedTuple):
    pred: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, float, float]


def random_pairs(count: int = PAIRS, seed: int = 0) -> Iterator[Pair]:
    """Blobs, alike or not, some noise, some single voxels; none empty, many at the border."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        shape = tuple(rng.integers(5, 22, 3).tolist())
        spacing = tuple(rng.uniform(0.4, 5.0, 3).tolist())
        smooth = rng.uniform(0, 2.5)
        fields = [ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(2)]
        fields[1] += rng.uniform(0, 2) * fields[0]
        share = rng.uniform(0.02, 0.6)
        pred, truth = (field >= np.quantile(field, 1 - share) for field in fields)
        if number % 20 == 0:
            pred = np.zeros(shape, bool)
            pred[tuple(rng.integers(0, shape))] = True
        yield Pair(pred, truth, spacing)


def scan_pair(shape: tuple[int, int, int] = (150, 512, 512), lesions: int = 25) -> Pair:
    """Lesions in both halves of a chest at full resolution; the prediction is off by some mm."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, *shape), bool)
    grid = np.ogrid[tuple(slice(0, extent) for extent in shape)]
    for _ in range(lesions):
        centre = rng.uniform(0.2, 0.8, 3) * shape
        radii = rng.uniform(4, 22) * np.array([0.7, 1.0, 1.0])
        for mask, shift in zip(masks, (0.0, rng.normal(0, 2, 3)), strict=True):
            middle = centre + shift
            low = np.maximum(np.floor(middle - radii), 0).astype(int)
            box = tuple(
                slice(a, int(b) + 2) for a, b in zip(low, np.ceil(middle + radii), strict=True)
            )
            offsets = [
                (axis[tuple(box[i] if i == n else slice(None) for i in range(3))] - middle[n])
                / radii[n]
                for n, axis in enumerate(grid)
            ]
            mask[box] |= offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2 <= 1
    return Pair(masks[0], masks[1], (1.0, 0.7, 0.7))
