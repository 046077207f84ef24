"""What a worker process is asked to build and time, and the inputs that ours and peers share.

Nothing here touches a device or imports a framework: the parent stays small.
"""

import dataclasses
import pathlib
import typing
from typing import Any, Literal

import numpy as np

from deepsc_jax.config import Config, DataConfig, Stage
from deepsc_jax.data.pipeline import cut_tiles, slice_indices, tile_origins

Ints3 = tuple[int, int, int]
Work = Literal[
    "train_segmentation",
    "train_classification",
    "train_joint",
    "forward",
    "inference",
    "loading",
    "loop",
    "loop_without_loading",
]
WORKS: tuple[Work, ...] = typing.get_args(Work)
TRAIN_STAGES: dict[Work, Stage] = {
    "train_segmentation": "segmentation",
    "train_classification": "classification",
    "train_joint": "joint",
}
STORED: tuple[Work, ...] = ("loading", "loop", "loop_without_loading")  # read a store
PEERS: dict[str, tuple[Work, ...]] = {
    "torch": (*TRAIN_STAGES, "forward", "inference"),
    "monai": ("train_segmentation", "inference"),
    "forms": (*TRAIN_STAGES, "forward", "inference"),
}
OURS = ("ours", "forms")  # the sides that are this project's own
VARIANTS = {
    "torch": ("eager", "channels_last", "compiled"),
    "monai": ("eager", "channels_last", "compiled"),
    # Ours again, with each form of `models.convolution`.
    "forms": ("native", "banded", "sliced", "folded", "direct"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to time, in a process of its own.

    Attributes:
      work: which.
      config: the configuration.
      scan_size: depth, height and width of a scan, in voxels of the working grid.
      stage: of the training that `STORED` works belong to.
      side: `ours`, or a key of `PEERS`.
      variant: of a peer, one of its `VARIANTS`; empty for ours.
      folder: where our worker leaves the weights for its peers, and its programs for the next.
      data_dir: what `prepare` wrote, for `STORED` works.
    """

    work: Work
    config: Config
    scan_size: Ints3
    stage: Stage
    side: str
    variant: str
    folder: pathlib.Path
    data_dir: pathlib.Path | None = None

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


def stage_of(job: Job) -> Stage:
    """The stage whose batch a work takes."""
    return TRAIN_STAGES.get(job.work, job.stage if job.work in STORED else "joint")


def batch(config: Config, stage: Stage, scan_size: Ints3) -> dict[str, np.ndarray]:
    """A training batch of `stage`, as `data.pipeline` makes it, of drawn scans of `scan_size`.

    No scan is of the class without pneumonia, so that every term of the losses is there.
    """
    data, rows = config.data, []
    for index in range(config.train.batch(stage)):
        row: dict[str, Any] = {"depth": np.int32(scan_size[0]), "label": np.int32(index % 2)}
        if stage == "segmentation":
            drawn = [draw_scan(data.tile, index + k) for k in range(config.train.tiles_per_scan)]
            row["tiles"], row["lesions"] = (np.stack(x) for x in zip(*drawn, strict=True))
            row["origins"] = np.zeros((len(drawn), 3), np.int32)
        else:
            volume, lesion = draw_scan(scan_size, index)
            row["slices"] = volume[slice_indices(scan_size[0], data.slices)]
            if stage == "joint":
                volume, lesion = _filled(volume, data), _filled(lesion, data)
                row["tiles"], row["lesions"] = (cut_tiles(x, data.tile) for x in (volume, lesion))
                row["origins"] = tile_origins(volume.shape, data.tile)
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


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


def of_depth(job: Job, depth: int) -> Job:
    """The same job with scans of so many slices."""
    return dataclasses.replace(job, scan_size=(depth, *job.scan_size[1:]))


def counts(job: Job) -> tuple[int, int]:
    """Scans and tiles that one call of the work takes."""
    config = job.config
    tiles = int(np.prod(config.data.tile_counts(config.data.bucket(job.scan_size[0]))))
    if job.work == "inference":
        return 1, int(np.prod(config.data.tile_counts(job.scan_size[0])))
    stage = stage_of(job)
    per_scan = {"segmentation": config.train.tiles_per_scan, "classification": 0, "joint": tiles}
    scans = config.train.batch(stage)
    return scans, scans * per_scan[stage]
