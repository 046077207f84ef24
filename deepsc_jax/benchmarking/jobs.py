"""What a worker process is asked to build and time, and the inputs that ours and peers share.

Nothing here touches a device or imports a framework: the parent stays small.
"""

import dataclasses
import pathlib
import typing
from typing import Literal

import numpy as np

from deepsc_jax.config import Config, DataConfig, Ints3
from deepsc_jax.data import augment
from deepsc_jax.data.arrays import LEVELS
from deepsc_jax.data.batch import Batch, Field, Reads, count_tiles, fields, seen
from deepsc_jax.data.classes import IDS
from deepsc_jax.geometry.sampling import cut_tiles, slice_indices, tile_corners
from deepsc_jax.runtime.errors import InputError

Work = Literal[
    "train",
    "forward",
    "inference",
    "decoding",
    "loading",
    "loop",
    "loop_without_loading",
    "surface",
]
WORKS: tuple[Work, ...] = typing.get_args(Work)
STORED: tuple[Work, ...] = ("loading", "loop", "loop_without_loading")  # read a store
PEERS: dict[str, tuple[Work, ...]] = {
    "torch": ("train", "forward", "inference"),
    "monai": ("train", "inference", "loading"),
    "dynunet": ("train", "forward", "inference"),
    "forms": ("train", "forward", "inference"),
    "surface_distance": ("surface",),
}
INTENSITY = (0.0, 0.15, 0.2)  # of drawn scans: least value, mean and deviation, about
OURS = ("ours", "forms")  # the sides that are this project's own
PACKAGES = {"dynunet": "monai"}  # of a peer, where it has another name
COMPILED = ("compiled", "compiled_channels_last", "max_autotune")
WAYS = (
    *("eager", "layers", "one_by_one", "channels_last", *COMPILED),
    *("checkpointed", "processes"),
)
VARIANTS = {
    "torch": WAYS,
    "dynunet": WAYS,
    "monai": ("eager", "channels_last", *COMPILED),
    # Ours again, with each form of `models.convolution`.
    "forms": ("native", "banded", "sliced", "folded", "direct"),
    "surface_distance": ("numpy",),
}
TOLERANCES_MM = (1.0, 2.0, 3.0, 5.0)  # of surface Dice
MASK_SPACING_MM = (1.0, 0.7, 0.7)
MASK_LESIONS = 25


class InapplicableError(InputError):
    """A variant is none of a work, or of this device: it is left out and named."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to time, in a process of its own.

    Attributes:
      work: which.
      config: the configuration.
      scan_size: depth, height and width of a scan, in voxels of the working grid.
      stage: of the training that the work belongs to; inference is of this stage's network.
      reads: what a batch of the stage holds.
      side: `ours`, or a key of `PEERS`.
      variant: of a peer, one of its `VARIANTS`; empty for ours.
      folder: where our worker leaves the weights for its peers, and its programs for the next.
      data_dir: what `prepare` wrote, for `STORED` works.
    """

    work: Work
    config: Config
    scan_size: Ints3
    stage: str
    reads: Reads
    side: str
    variant: str
    folder: pathlib.Path
    data_dir: pathlib.Path | None = None

    @property
    def title(self) -> str:
        """What the tables call the work: `train_joint`."""
        return f"train_{self.stage}" if self.work == "train" else self.work

    @property
    def scans(self) -> int:
        """Scans in a batch of the stage."""
        return self.config.stage(self.stage).batch

    @property
    def name(self) -> str:
        """What the tables call it: `torch channels_last`."""
        return f"{self.side} {self.variant}".strip()

    @property
    def weights(self) -> pathlib.Path:
        """The file of the initial weights."""
        return self.folder / "weights.pickle"

    @property
    def programs(self) -> pathlib.Path:
        """The folder of what XLA compiled for ours."""
        return self.folder / "programs"


def batch(job: Job, *, travels: bool = False) -> Batch:
    """A training batch of the job's stage, of drawn scans of its size.

    No scan is of the class without lesions, so that every term of the losses is there. What
    travels is augmented by nothing, at the same cost: peers are given what it decodes to.

    Args:
      job: whose.
      travels: as it travels to the device; by default as the network sees it, for peers.
    """
    config, size = job.config, job.scan_size
    data, rows = config.data, []
    spacing = augment.nominal_spacing(data)
    margin = augment.margin(config.train, data.tile, [spacing])
    depth, height, width = (t + 2 * m for t, m in zip(data.tile, margin, strict=True))
    middle = tuple(slice(m, m + t) for t, m in zip(data.tile, margin, strict=True))
    classes = [i for i in range(len(data.classes)) if i != data.lesion_free_id][:2]
    of_tiles, of_scan = job.reads.truth
    lesion_id = IDS["lesion"] if job.reads.classes else 1
    for index in range(job.scans):
        row: dict[str, np.ndarray | np.int32] = {
            "depth": np.int32(size[0]),
            "label": np.int32(classes[index % len(classes)]),
            "augmentation": augment.Augmentation(spacing=spacing).vector(),
            "intensity": np.asarray(INTENSITY, np.float32),
            "teachers": np.zeros((job.reads.teachers, len(data.classes)), np.float32),
            "targets": np.arange(len(data.indicators), dtype=np.float32),
        }
        if job.reads.tiles == "drawn":
            count = config.train.tiles_per_scan
            drawn = [draw_scan((depth, height, width), index + k) for k in range(count)]
            row["tiles"], lesion = (np.stack(x) for x in zip(*drawn, strict=True))
            if not travels:
                row["tiles"], lesion = (x[:, *middle] for x in (row["tiles"], lesion))
            row[of_tiles] = lesion * lesion_id
            row["origins"] = np.zeros((count, 3), np.int32)
            row["starts"] = row["origins"] - np.asarray(margin, np.int32)
        else:
            volume, lesion = draw_scan(size, index)
            row["slices"] = volume[slice_indices(size[0], data.slices)]
            if job.reads.tiles == "all":
                volume, lesion = _filled(volume, data), _filled(lesion, data)
                slabs = (-1, data.tile[0], *size[1:])
                row["volume"], row[of_scan] = (
                    volume.reshape(slabs),
                    lesion.reshape(slabs) * lesion_id,
                )
                row["tiles"], lesion = (cut_tiles(x, data.tile) for x in (volume, lesion))
                row[of_tiles] = lesion * lesion_id
                row["origins"] = tile_corners(volume.shape, data.tile)
        rows.append(row)
    tiles = count_tiles(job.reads, config, size[0])
    if travels:
        wanted = fields(job.reads, data, tiles, data.bucket(size[0]), margin=margin)
    else:
        wanted = seen(job.reads, data, tiles)
    return {
        name: np.stack([_as(row[name], field) for row in rows]) for name, field in wanted.items()
    }


def _as(values: np.ndarray | np.int32, field: Field) -> np.ndarray:
    """Intensities of 16 bits are levels, as in a store."""
    levels = np.rint(values * np.float32(LEVELS)) if field.dtype == np.uint16 else values
    return np.asarray(levels).astype(field.dtype)


def _filled(volume: np.ndarray, data: DataConfig) -> np.ndarray:
    return np.pad(volume, [(0, data.bucket(len(volume)) - len(volume)), (0, 0), (0, 0)])


def draw_scan(size: Ints3, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Intensities in [0, 1], 0 outside of two ellipsoids, and a sphere of lesion in one of them.

    Both are float32 of shape `size`.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(-1, 1, complex(0, side)) for side in size)]
    lung = ((np.abs(x) - 0.5) / 0.4) ** 2 + (y / 0.8) ** 2 + (z / 0.95) ** 2 < 1
    lesion = lung & ((x - 0.5) ** 2 + y**2 + z**2 < 0.1)
    values = rng.normal(0.36, 0.1, size).astype(np.float32) + np.float32(0.2) * lesion
    return np.clip(values, 0.01, 1) * lung, lesion.astype(np.float32)


def draw_masks(size: Ints3) -> tuple[np.ndarray, np.ndarray]:
    """Lesions of a scan, 4 to 22 voxels of radius, and a prediction that is off by some voxels."""
    rng = np.random.default_rng(0)
    pred, truth = np.zeros((2, *size), bool)
    for _ in range(MASK_LESIONS):
        middle = rng.uniform(0.2, 0.8, 3) * size
        radii = np.minimum(rng.uniform(4, 22), np.array(size) / 8) * np.array([0.7, 1, 1])
        for mask, shift in ((truth, np.zeros(3)), (pred, rng.normal(0, 2, 3))):
            low = np.maximum(np.floor(middle + shift - radii), 0).astype(int)
            high = np.minimum(np.ceil(middle + shift + radii) + 1, size).astype(int)
            axes = np.ogrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
            centre = middle + shift
            parts = [((axis - centre[i]) / radii[i]) ** 2 for i, axis in enumerate(axes)]
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            mask[box] |= parts[0] + parts[1] + parts[2] <= 1
    return pred, truth


def variants(job: Job, side: str, asked: list[str] | None) -> tuple[str, ...]:
    """A peer's variants of a work, of those that are asked for; loading has one."""
    named = tuple(asked or VARIANTS[side])
    return named[:1] if job.work == "loading" else named


def of_depth(job: Job, depth: int) -> Job:
    """The same job with scans of so many slices."""
    return dataclasses.replace(job, scan_size=(depth, *job.scan_size[1:]))


def counts(job: Job) -> tuple[int, int]:
    """Scans and tiles that one call of the work takes."""
    if job.work == "surface":
        return 1, 0
    if job.work == "inference":
        return 1, int(np.prod(job.config.data.tile_counts(job.scan_size[0])))
    return job.scans, job.scans * count_tiles(job.reads, job.config, job.scan_size[0])
