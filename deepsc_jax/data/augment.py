"""Random changes of a training scan, drawn once per scan: its tiles and slices get the same.

They are drawn here, on the host, by counter, travel as a short vector, and happen on the device
(`systems.decoding`, `systems.changes`). Extents in mm become voxels of the scan at hand here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepsc_jax.config import DataConfig, Ints3, TrainConfig

Triple = tuple[float, float, float]

SOFT_TISSUE_HU = (20.0, 60.0)
ELASTIC_LIMIT = 2.0  # control points are displaced by at most so many standard deviations
NONE = (1.0, 1.0)  # a range of factors
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to one scan [assumed; the paper names no augmentation].

    Attributes:
      flip: mirror left and right: 0 or 1; mirrors of other axes are in `matrix` alone.
      scale, shift: intensities become `value * scale + shift`.
      matrix: from offsets of voxels from the scan's centre to the offsets where they were before,
        (depth, height, width) each, row by row; the mirror included.
      displacement: the elastic one's standard deviation, in voxels, by axis.
      distance: of its control points, in voxels, by axis.
      blur: standard deviation of a Gaussian, in voxels, by axis.
      coarse: side of the voxels of a scan of lower resolution, in voxels, by axis.
      brightness: a factor of z-scores.
      contrast: of z-scores; of [0, 1] values it is in `scale` and `shift`.
      gamma: an exponent of intensities.
      noise: standard deviation of noise.
      rim: mm by which the lung mask grows, or shrinks where below 0.
      tissue: intensity of what a mask that grew takes in.
      spacing: mm of a voxel, by axis.
      seed: of noise and displacement, a whole number below 2**24, which float32 holds.
    """

    flip: float = 0.0
    scale: float = 1.0
    shift: float = 0.0
    matrix: tuple[float, ...] = _IDENTITY
    displacement: Triple = (0.0, 0.0, 0.0)
    distance: Triple = (1.0, 1.0, 1.0)
    blur: Triple = (0.0, 0.0, 0.0)
    coarse: Triple = (1.0, 1.0, 1.0)
    brightness: float = 1.0
    contrast: float = 1.0
    gamma: float = 1.0
    noise: float = 0.0
    rim: float = 0.0
    tissue: float = 1.0
    spacing: Triple = (1.0, 1.0, 1.0)
    seed: float = 0.0

    def vector(self) -> np.ndarray:
        """As it travels, (SIZE,) float32."""
        parts = [np.ravel(getattr(self, name)) for name in _WIDTHS]
        return np.concatenate(parts).astype(np.float32)


_WIDTHS = {
    f.name: np.size(getattr(Augmentation(), f.name)) for f in dataclasses.fields(Augmentation)
}
SIZE = sum(_WIDTHS.values())


def columns(vectors: Any) -> Mapping[str, Any]:
    """Vectors (scan, SIZE) of either kind by name: (scan,), or (scan, n) of what has n numbers."""
    named, first = {}, 0
    for name, width in _WIDTHS.items():
        part = vectors[:, first : first + width]
        named[name] = part[:, 0] if width == 1 else part
        first += width
    return named


def moves(train: TrainConfig) -> bool:
    """Whether voxels go elsewhere, but for a mirror of left and right."""
    turned = any((train.rotation_degrees, train.tilt_degrees, train.elastic_mm))
    return turned or train.zoom != NONE or bool({"depth", "height"} & set(train.mirror_axes))


def moves_lungs(train: TrainConfig) -> bool:
    """Whether lungs may be where the scan as stored has none, but for `flip`."""
    return moves(train) or train.lung_rim_mm > 0


def recolours(train: TrainConfig) -> bool:
    """Whether z-scores change, of scans that are not masked."""
    ranges = (train.brightness, train.contrast, train.gamma)
    return any(between != NONE for between in ranges) or train.noise > 0


def textures(train: TrainConfig) -> bool:
    """Whether intensities change, but for a scale and a shift."""
    smoothed = any((train.noise, train.blur_mm, train.coarse_mm, train.lung_rim_mm))
    return smoothed or train.gamma != NONE


def draw(
    rng: np.random.Generator,
    train: TrainConfig,
    data: DataConfig,
    spacing: Triple,
    *,
    flat: bool = False,
) -> Augmentation:
    """Draw an augmentation of the extents that `train` gives.

    Args:
      rng: of the element.
      train: the extents; as many numbers are drawn whatever they are.
      data: its intensities.
      spacing: mm of the scan's voxels.
      flat: slices stay in their planes, for a stage that reads no other.
    """
    flip, scale, shift, contrast, gamma, noise, blur, coarse, rim, tissue = rng.random(10)
    turn, tilt_y, tilt_x, zoom = 2 * rng.random(4) - 1
    happens = rng.random(8) < train.change_probability
    seed = float(rng.integers(2**24))
    brightness, high, deep = rng.random(3)
    brightens, noisy = rng.random(2) < train.change_probability
    mm = np.asarray(spacing)
    tilts = 0.0 if flat else train.tilt_degrees * happens[1]
    angles = (turn * train.rotation_degrees * happens[0], tilt_y * tilts, tilt_x * tilts)
    mirrored = [
        axis in train.mirror_axes and drawn < train.flip_probability
        for axis, drawn in (("depth", deep), ("height", high), ("width", flip))
    ]
    matrix = _rotation(angles) / _factor(zoom * happens[2], train.zoom)
    matrix = matrix * mm / mm[:, None] @ np.diag(np.where(mirrored, -1, 1))
    if flat:
        matrix[0], matrix[:, 0] = (1, 0, 0), (1, 0, 0)
    elastic = train.elastic_mm * happens[3] / mm * (np.array([0, 1, 1]) if flat else 1)
    change = _factor((2 * contrast - 1) * happens[4], train.contrast)
    scale = 1 + train.intensity_scale * (2 * scale - 1)
    shift = train.intensity_shift * (2 * shift - 1)
    if data.mask == "lungs":
        scale, shift = scale * change, shift + data.intensity_mean * (1 - change)
    least, largest = train.brightness
    brightness = least + (largest - least) * brightness if brightens else 1.0
    return Augmentation(
        flip=float(mirrored[-1]),
        scale=scale,
        shift=shift,
        matrix=tuple(matrix.ravel().tolist()),
        displacement=_three(elastic),
        distance=_three(train.elastic_distance_mm / mm),
        blur=_three(blur * train.blur_mm * happens[5] / mm),
        coarse=_three(np.maximum(coarse * train.coarse_mm * happens[6] / mm, 1)),
        brightness=brightness,
        contrast=change,
        gamma=_factor((2 * gamma - 1) * happens[7], train.gamma),
        noise=math.sqrt(noise) * train.noise * noisy,
        rim=(2 * rim - 1) * train.lung_rim_mm,
        tissue=_tissue(data, tissue),
        spacing=_three(mm),
        seed=seed,
    )


def _factor(drawn: float, between: tuple[float, float]) -> float:
    """A factor from a number of [-1, 1): 1 at 0, and evenly below and above it."""
    low, high = between
    return 1 + drawn * (1 - low if drawn < 0 else high - 1)


def nominal_spacing(data: DataConfig) -> Triple:
    """Of the working grid's voxels where no scan is at hand: 1 mm where they are as they come."""
    return _three(np.asarray([side or 1.0 for side in data.working_spacing_mm]))


def margin(train: TrainConfig, tile: Ints3, spacings: Sequence[Triple]) -> Ints3:
    """Voxels by which a box that holds all that a tile may show is wider on each side.

    Args:
      train: the extents.
      tile: its sides.
      spacings: mm of the voxels of every scan.
    """
    if not moves(train):
        return (0, 0, 0)
    turn, tilt = (math.sin(math.radians(x)) for x in (train.rotation_degrees, train.tilt_degrees))
    # Elementwise bounds of rotations by at most so much: no cosine is above 1.
    bound = np.ones((3, 3))
    bound[1, 2] = bound[2, 1] = turn + tilt * tilt
    bound[0, 1] = bound[1, 0] = bound[0, 2] = bound[2, 0] = tilt * (1 + turn)
    half, widest = np.asarray(tile) / 2, np.zeros(3)
    for spacing in spacings:
        mm = np.asarray(spacing)
        reach = (bound * mm / mm[:, None]) @ half / train.zoom[0]
        widest = np.maximum(widest, reach - half + ELASTIC_LIMIT * train.elastic_mm / mm)
    depth, height, width = (int(x) for x in np.ceil(widest) + 1)
    return (depth, height, width)


def moved_starts(
    origins: np.ndarray, augmentation: Augmentation, shape: Ints3, tile: Ints3, box: Ints3
) -> np.ndarray:
    """Corners, in the scan itself, of the boxes that tiles of the changed scan are made of.

    Args:
      origins: corners of the tiles, (K, 3).
      augmentation: of the scan.
      shape: of the scan.
      tile: sides of a tile.
      box: sides of a box, which has the tile's middle in its middle.
    """
    middle = (np.asarray(shape) - 1) / 2
    centres = origins + (np.asarray(tile) - 1) / 2 - middle
    centres = centres @ np.reshape(augmentation.matrix, (3, 3)).T + middle
    return np.rint(centres - (np.asarray(box) - 1) / 2).astype(np.int32)


def moved_voxels(voxels: np.ndarray, augmentation: Augmentation, shape: Ints3) -> np.ndarray:
    """Where voxels (N, 3) of a scan are once it is changed, but for the elastic displacement."""
    middle = (np.asarray(shape) - 1) / 2
    inverse = np.linalg.inv(np.reshape(augmentation.matrix, (3, 3)))
    return np.rint((voxels - middle) @ inverse.T + middle).astype(np.int32)


def _rotation(degrees: Triple) -> np.ndarray:
    """By angles about the axes of depth, height and width, in this order of the product."""
    product = np.eye(3)
    for axis, angle in enumerate(degrees):
        one, other = (i for i in range(3) if i != axis)
        turned = np.eye(3)
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turned[one, one] = turned[other, other] = cosine
        turned[one, other], turned[other, one] = -sine, sine
        product = product @ turned
    return product


def _tissue(data: DataConfig, share: float) -> float:
    """Soft tissue as an intensity; of images that are no HU, the brightest."""
    if data.intensity != "hu":
        return 1.0
    low, high = data.hu_window
    dark, bright = SOFT_TISSUE_HU
    return float(np.clip((dark + share * (bright - dark) - low) / (high - low), 0, 1))


def _three(values: np.ndarray) -> Triple:
    depth, height, width = (float(x) for x in values)
    return (depth, height, width)
