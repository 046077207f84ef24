"""What a batch holds: the only description of it.

A batch is a dictionary of arrays whose first axis is the example's, in this order of names:

    tiles    (B, K, d, h, w) float32   masked, normalised intensities of K tiles
    lesions  (B, K, d, h, w) float32   0 or 1
    origins  (B, K, 3) int32           working-grid voxel of each tile's corner
    slices   (B, T, H, W) float32      C_i = V[floor(i D / T)]
    depth    (B,) int32                the scan's true number of slices, D
    label    (B,) int32                index into the data set's classes
    valid    (B,) bool                 evaluation: False for what only fills up the last batch
    case     (B,) int32                evaluation: index into store.cases(split)

A stage says what it reads (`Reads`); `fields` gives every array's shape, type and depth axis, from
which initialisation, shardings, plans, benchmarks, prefetching and the pipeline are made.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from deepsc_jax.config import Config, DataConfig

Batch = dict[str, np.ndarray]

# The axes of one example's array, by name; what is split over devices along depth has such an axis.
_AXES: dict[str, tuple[str, ...]] = {
    "tiles": ("tile", "depth", "height", "width"),
    "lesions": ("tile", "depth", "height", "width"),
    "origins": ("tile", "axis"),
    "slices": ("depth", "height", "width"),
    "depth": (),
    "label": (),
    "valid": (),
    "case": (),
}
# Of a batch's array, so counted with the example's axis.
DEPTH_AXES = {name: axes.index("depth") + 1 for name, axes in _AXES.items() if "depth" in axes}


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a stage reads of a scan.

    Attributes:
      tiles: none, `drawn` at random (`train.tiles_per_scan`), or `all`, with their lesions.
      slices: whether the T sampled slices.
    """

    tiles: Literal["none", "drawn", "all"] = "none"
    slices: bool = False

    @property
    def lesions(self) -> bool:
        """Whether the true lesions are read."""
        return self.tiles != "none"

    def whole(self) -> "Reads":
        """The same of whole scans, as an evaluation reads it."""
        return dataclasses.replace(self, tiles="all") if self.lesions else self


@dataclasses.dataclass(frozen=True)
class Field:
    """An array of a batch, without the example's axis."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one example."""
        return math.prod(self.shape) * self.dtype.itemsize


def fields(
    reads: Reads, data: DataConfig, tiles: int, *, evaluation: bool = False
) -> dict[str, Field]:
    """Every array of a batch, by name.

    Args:
      reads: what the stage reads.
      data: the sizes of tiles and slices.
      tiles: of an example (`count_tiles`).
      evaluation: with the facts that an evaluation needs.
    """
    named: dict[str, Field] = {}
    if reads.lesions:
        named["tiles"] = Field((tiles, *data.tile), np.dtype(np.float32))
        named["lesions"] = Field((tiles, *data.tile), np.dtype(np.float32))
        named["origins"] = Field((tiles, 3), np.dtype(np.int32))
    if reads.slices:
        named["slices"] = Field((data.slices, *data.working_size), np.dtype(np.float32))
    named["depth"] = named["label"] = Field((), np.dtype(np.int32))
    if evaluation:
        named["valid"] = Field((), np.dtype(np.bool_))
        named["case"] = Field((), np.dtype(np.int32))
    return named


def count_tiles(reads: Reads, config: Config, depth: int) -> int:
    """The tiles of an example of a split whose deepest scan has `depth` slices."""
    if not reads.lesions:
        return 0
    if reads.tiles == "drawn":
        return config.train.tiles_per_scan
    data = config.data
    return math.prod(data.tile_counts(data.bucket(depth)))


def zeros(reads: Reads, data: DataConfig, batch: int = 1) -> Batch:
    """A batch of zeros of scans one tile deep, of one tile each, for a network's shapes."""
    arrays = {
        name: np.zeros((batch, *field.shape), field.dtype)
        for name, field in fields(reads, data, 1).items()
    }
    return arrays | {"depth": np.full((batch,), data.tile[0], np.int32)}
