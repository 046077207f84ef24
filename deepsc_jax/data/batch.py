"""What a batch holds: the only description of it, as it travels and as a system sees it.

A batch is a dictionary of arrays whose first axis is the example's. It travels from the store to
the device as it is stored, and `decoding` makes of it, within the jitted step, what a system sees:

    name          axes            travels as  is seen as
    volume        (S, d, H, W)    uint16                   the scan, in slabs of a tile's depth
    lesion        (S, d, H, W)    uint8                    its lesion mask
    class_map     (S, d, H, W)    uint8                    the class of every voxel, in its place
    tiles         (K, d, h, w)    uint16      float32      masked, normalised intensities of K tiles
    lesions       (K, d, h, w)    uint8       float32      0 or 1
    classes       (K, d, h, w)    uint8       int32        ids of `classes.IDS`, in their place
    origins       (K, 3)          int32       int32        working-grid voxel of each tile's corner
    slices        (T, H, W)       uint16      float32      C_i = V[floor(i D / T)]
    starts        (K, 3)          int32                    corners of what drawn tiles are cut from
    intensity     (3,)            float32     float32      without mask: `preprocess.intensity_of`
    augmentation  (A,)            float32                  training: `augment.Augmentation`
    depth         ()              int32       int32        the scan's true number of slices, D
    label         ()              int32       int32        index into the data set's classes
    targets       (I,)            float32     float32      the case's indicators, as they are
    teachers      (N, C)          float32     float32      training: logits of N teachers
    valid         ()              bool        bool         False for what only fills up a batch
    case          ()              int32       int32        index into store.cases(split)

`tiles` and `lesions` travel with a margin on each side where augmentation moves voxels.
Where all tiles are read the scan travels once, and its tiles and slices are cut on the device; else
tiles and slices travel as such. `valid` and `case` are an evaluation's.

A stage says what it reads (`Reads`); `fields` gives the shape and type of every array that
travels, from which shardings, plans, prefetching and the pipeline are made, and `seen` of every
array that a system sees, from which networks are initialised and benchmarks drawn.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from deepsc_jax.config import Config, DataConfig, Ints3
from deepsc_jax.data import augment

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Array:
    """A row of the table: one example's axes, and the types; None where it is not there."""

    axes: tuple[str, ...]
    travels: str | None
    seen: str | None


_TILE = ("tile", "depth", "height", "width")
_ARRAYS: dict[str, _Array] = {
    "volume": _Array(("slab", "depth", "height", "width"), "uint16", None),
    "lesion": _Array(("slab", "depth", "height", "width"), "uint8", None),
    "class_map": _Array(("slab", "depth", "height", "width"), "uint8", None),
    "tiles": _Array(_TILE, "uint16", "float32"),
    "lesions": _Array(_TILE, "uint8", "float32"),
    "classes": _Array(_TILE, "uint8", "int32"),
    "origins": _Array(("tile", "axis"), "int32", "int32"),
    "starts": _Array(("tile", "axis"), "int32", None),
    "slices": _Array(("depth", "height", "width"), "uint16", "float32"),
    "intensity": _Array(("axis",), "float32", "float32"),
    "augmentation": _Array(("column",), "float32", None),
    "depth": _Array((), "int32", "int32"),
    "label": _Array((), "int32", "int32"),
    "targets": _Array(("indicator",), "float32", "float32"),
    "teachers": _Array(("teacher", "class"), "float32", "float32"),
    "valid": _Array((), "bool", "bool"),
    "case": _Array((), "int32", "int32"),
}
# The axis that is split over devices where depth is, of those arrays of a batch that have it; so
# counted with the example's axis. A slab is as deep as a tile, so that cutting moves nothing.
DEPTH_AXES = {
    name: array.axes.index("depth") + 1 for name, array in _ARRAYS.items() if "depth" in array.axes
}


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a stage reads of a scan.

    Attributes:
      tiles: none, `drawn` at random (`train.tiles_per_scan`), or `all`, with their lesions.
      slices: whether the T sampled slices.
      classes: the class of every voxel of the tiles, in place of their lesions.
      targets: whether the case's indicators.
      teachers: how many teachers' logits of the case, which an evaluation has not.
      origin_step: of which the in-plane origins of random tiles are multiples.
    """

    tiles: Literal["none", "drawn", "all"] = "none"
    slices: bool = False
    classes: bool = False
    targets: bool = False
    teachers: int = 0
    origin_step: int = 8  # the pooled grids of tile and scan then align

    @property
    def truth(self) -> tuple[Literal["lesions", "classes"], Literal["lesion", "class_map"]]:
        """The names of what is true of the tiles, and of a scan in slabs."""
        return ("classes", "class_map") if self.classes else ("lesions", "lesion")

    @property
    def lesions(self) -> bool:
        """Whether the true lesions are read."""
        return self.tiles != "none"

    def whole(self) -> "Reads":
        """The same of whole scans, as an evaluation reads it."""
        tiles = "all" if self.lesions else self.tiles
        return dataclasses.replace(self, tiles=tiles, teachers=0)


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
    reads: Reads,
    data: DataConfig,
    tiles: int,
    depth: int,
    *,
    margin: Ints3 = (0, 0, 0),
    evaluation: bool = False,
) -> dict[str, Field]:
    """Every array of a batch that travels, by name.

    Args:
      reads: what the stage reads.
      data: the sizes of tiles and slices.
      tiles: of an example (`count_tiles`).
      depth: to which scans are padded, a multiple of a tile's; of no effect unless all tiles are
        read.
      margin: of drawn tiles (`augment.margin`).
      evaluation: with the facts that an evaluation needs, and nothing of augmentation.
    """
    names: list[str] = []
    if reads.tiles == "all":
        names += ["volume", reads.truth[1], "origins"]
    if reads.tiles == "drawn":
        names += ["tiles", reads.truth[0], "origins"] + (["starts"] if any(margin) else [])
    if reads.slices and reads.tiles != "all":
        names += ["slices"]
    names += ["intensity"] if data.mask == "none" else []
    names += _facts(reads)
    names += ["valid", "case"] if evaluation else ["augmentation"]
    named = {name: (_ARRAYS[name].axes, _ARRAYS[name].travels) for name in names}
    return _shaped(named, reads, data, tiles, depth, margin)


def seen(reads: Reads, data: DataConfig, tiles: int) -> dict[str, Field]:
    """Every array of a batch that a system's losses see, by name; arguments as `fields`."""
    names = ["tiles", reads.truth[0], "origins"] if reads.lesions else []
    names += ["slices"] if reads.slices else []
    names += ["intensity"] if data.mask == "none" else []
    names += _facts(reads)
    named = {name: (_ARRAYS[name].axes, _ARRAYS[name].seen) for name in names}
    return _shaped(named, reads, data, tiles, data.tile[0])


def _facts(reads: Reads) -> list[str]:
    """The names of what is known of a case besides its scan."""
    asked = {"targets": reads.targets, "teachers": reads.teachers > 0}
    return ["depth", "label", *(name for name, is_read in asked.items() if is_read)]


def _shaped(
    named: dict[str, tuple[tuple[str, ...], str | None]],
    reads: Reads,
    data: DataConfig,
    tiles: int,
    depth: int,
    margin: Ints3 = (0, 0, 0),
) -> dict[str, Field]:
    def shape(axes: tuple[str, ...]) -> tuple[int, ...]:
        volume = dict(zip(("height", "width"), data.working_size, strict=True))
        sizes = {"tile": tiles, "axis": 3, "column": augment.SIZE, "depth": data.slices}
        sizes |= {"indicator": len(data.indicators), "class": len(data.classes)}
        sizes["teacher"] = reads.teachers
        if axes[:1] == ("tile",):
            sides = [side + 2 * more for side, more in zip(data.tile, margin, strict=True)]
            volume = dict(zip(_TILE[1:], sides, strict=True))
        elif axes[:1] == ("slab",):
            volume |= {"slab": depth // data.tile[0], "depth": data.tile[0]}
        return tuple((sizes | volume)[axis] for axis in axes)

    return {name: Field(shape(axes), np.dtype(kind)) for name, (axes, kind) in named.items()}


def count_tiles(reads: Reads, config: Config, depth: int) -> int:
    """The tiles of an example of a split whose deepest scan has `depth` slices."""
    if not reads.lesions:
        return 0
    if reads.tiles == "drawn":
        return config.train.tiles_per_scan
    data = config.data
    return math.prod(data.tile_counts(data.bucket(depth)))


def zeros(reads: Reads, data: DataConfig, batch: int = 1) -> Batch:
    """A batch as seen, of zeros, of scans one tile deep, of one tile each: a network's shapes."""
    arrays = {
        name: np.zeros((batch, *field.shape), field.dtype)
        for name, field in seen(reads, data, 1).items()
    }
    return arrays | {"depth": np.full((batch,), data.tile[0], np.int32)}
