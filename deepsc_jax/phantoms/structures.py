"""What dense and thin things normal lungs hold: hila, fissures, calcifications, emphysema.

Drawn alike for every class, so that dense tissue inside a lung mask does not mean a lesion. Of the
lung voxels of real scans without lesions 0.7 to 1.5 % are above -150 HU; most of it is hilar.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from deepsc_jax.phantoms.thorax import Frame, Thorax, smooth_field


@dataclass(frozen=True)
class Structures:
    """Arrays are (D, H, W), float32.

    Attributes:
      tissue: share in [0, 1] of hilar tissue in a lung voxel.
      added_hu: what fissures add and emphysema takes away.
      calcium_hu: what calcifications add.
    """

    tissue: np.ndarray
    added_hu: np.ndarray
    calcium_hu: np.ndarray


def draw_details(rng: np.random.Generator) -> dict[str, float]:
    """What varies from scan to scan whatever the class."""
    return {
        "hilum_mm": rng.uniform(7, 13),
        "fissure_hu": rng.uniform(60, 220),
        "calcifications": float(rng.integers(0, 9)),
        "emphysema_hu": float(rng.uniform() < 0.35) * rng.uniform(30, 90),
    }


def build_structures(
    rng: np.random.Generator, frame: Frame, thorax: Thorax, drawn: dict[str, float]
) -> Structures:
    """The structures with the drawn properties; `rng` gives the details that have no name."""
    added = _fissures(rng, frame, thorax, drawn["fissure_hu"])
    if drawn["emphysema_hu"]:
        added -= drawn["emphysema_hu"] * _emphysema(rng, frame)
    tissue = _hila(rng, frame, thorax, drawn["hilum_mm"])
    calcium = _calcifications(rng, frame, thorax, int(drawn["calcifications"]))
    return Structures(tissue, added, calcium)


def _hila(rng: np.random.Generator, frame: Frame, thorax: Thorax, size_mm: float) -> np.ndarray:
    """Trunks, bronchial walls and nodes around each hilum: balls that run together."""
    share = np.zeros(frame.shape, np.float32)
    for hilum, outward in zip(thorax.hila_mm, (-1, 1), strict=True):
        for _ in range(rng.integers(5, 9)):
            offset = rng.normal(0, [16.0, 8.0, 7.0])
            offset[2] = outward * (abs(offset[2]) - 3)
            radius = size_mm * rng.uniform(0.55, 1.0)
            box, offsets = frame.around(hilum + offset, radius + 6)
            stretched = np.array([1.5, 1.0, 1.0]) ** rng.choice([-1, 1])  # along the body, or not
            away = np.sqrt(sum((o / s) ** 2 for o, s in zip(offsets, stretched, strict=True)))
            share[box] = np.maximum(share[box], expit((radius - away) / 0.8))
    return share


def _fissures(
    rng: np.random.Generator, frame: Frame, thorax: Thorax, height_hu: float
) -> np.ndarray:
    """An oblique plate in each lung and a horizontal one in the right, slightly bent."""
    top = frame.z.max()
    bend = 6 * smooth_field(rng, frame, 50.0)
    right = np.broadcast_to(thorax.right, frame.shape)
    total = np.zeros(frame.shape, np.float32)
    for side in (right, ~right):
        # From behind and above to in front and below.
        slope, level = rng.uniform(0.8, 1.2), rng.uniform(0.40, 0.50) * top
        across = (frame.z - level + slope * -frame.y) / np.hypot(1, slope) + bend
        total += np.exp(-((across / 1.8) ** 2)) * side
    across = frame.z - rng.uniform(0.50, 0.58) * top + bend
    total += np.exp(-((across / 1.8) ** 2)) * right * (frame.y < 5)
    return (height_hu * total).astype(np.float32)


def _emphysema(rng: np.random.Generator, frame: Frame) -> np.ndarray:
    """Holes a few millimetres wide, more of them towards the apices."""
    holes = np.clip(smooth_field(rng, frame, 5.0, band_pass=True), 0, 2)
    patchy = np.clip(0.6 + 0.8 * smooth_field(rng, frame, 40.0), 0, 1.5)
    return (holes * patchy * (0.3 + 0.7 * frame.z / frame.z.max())).astype(np.float32)


def _calcifications(
    rng: np.random.Generator, frame: Frame, thorax: Thorax, count: int
) -> np.ndarray:
    """Grains on vessels, and here and there a granuloma."""
    added = np.zeros(frame.shape, np.float32)
    voxels = np.argwhere(thorax.lung & (thorax.vessels > 0.15))
    if not len(voxels):
        return added
    for centre in frame.points(voxels[rng.integers(len(voxels), size=count)]):
        radius = rng.uniform(1.5, 3.0)
        box, offsets = frame.around(centre, radius + 4)
        away = np.sqrt(sum(o**2 for o in offsets))
        added[box] += rng.uniform(200, 700) * np.clip(0.5 + (radius - away) / 3, 0, 1)
    return added
