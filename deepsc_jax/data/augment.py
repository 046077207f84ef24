"""Random changes of a training scan, drawn once per scan: its tiles and slices get the same."""

import dataclasses

import numpy as np

from deepsc_jax.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to one scan [assumed; the paper names no augmentation].

    Attributes:
      flip: mirror left and right.
      scale, shift: intensities become `value * scale + shift`.
    """

    flip: bool = False
    scale: float = 1.0
    shift: float = 0.0


NONE = Augmentation()


def draw(rng: np.random.Generator, train: TrainConfig) -> Augmentation:
    """Draw an augmentation of the extents that `train` gives."""
    flip, scale, shift = rng.random(3)
    return Augmentation(
        flip=bool(flip < train.flip_probability),
        scale=1 + train.intensity_scale * (2 * scale - 1),
        shift=train.intensity_shift * (2 * shift - 1),
    )


def change_intensity(volume: np.ndarray, augmentation: Augmentation) -> None:
    """Scale and shift a float32 volume in [0, 1], of any shape, in place.

    Voxels that are 0 are outside the lungs or padding and stay 0; the others stay within [0, 1].
    """
    if augmentation.scale == 1 and augmentation.shift == 0:
        return
    inside = volume > 0
    volume *= np.float32(augmentation.scale)
    volume += np.float32(augmentation.shift)
    np.clip(volume, 0, 1, out=volume)
    volume *= inside


def mirrored_starts(starts: np.ndarray, box_width: int, width: int) -> np.ndarray:
    """Where boxes of a mirrored scan start in the scan itself; `starts` is (N, 3)."""
    starts = starts.copy()
    starts[:, 2] = width - box_width - starts[:, 2]
    return starts
