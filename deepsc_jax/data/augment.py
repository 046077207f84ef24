"""Random changes of a training scan, drawn once per scan: its tiles and slices get the same.

They are drawn here, on the host, by counter, travel as a short vector, and happen on the device
(`decoding`).
"""

import dataclasses

import numpy as np

from deepsc_jax.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to one scan [assumed; the paper names no augmentation].

    Attributes:
      flip: mirror left and right: 0 or 1.
      scale, shift: intensities become `value * scale + shift`.
    """

    flip: float = 0.0
    scale: float = 1.0
    shift: float = 0.0

    def vector(self) -> np.ndarray:
        """As it travels, (len(NAMES),) float32."""
        return np.asarray(dataclasses.astuple(self), np.float32)


NAMES = tuple(field.name for field in dataclasses.fields(Augmentation))


def draw(rng: np.random.Generator, train: TrainConfig) -> Augmentation:
    """Draw an augmentation of the extents that `train` gives."""
    flip, scale, shift = rng.random(3)
    return Augmentation(
        flip=float(flip < train.flip_probability),
        scale=1 + train.intensity_scale * (2 * scale - 1),
        shift=train.intensity_shift * (2 * shift - 1),
    )


def mirrored_starts(starts: np.ndarray, box_width: int, width: int) -> np.ndarray:
    """Where boxes of a mirrored scan start in the scan itself; `starts` is (N, 3)."""
    starts = starts.copy()
    starts[:, 2] = width - box_width - starts[:, 2]
    return starts
