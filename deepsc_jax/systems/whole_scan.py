"""A whole scan through a network that sees tiles: cut, dispatched in chunks, put together.

Tiles are at a stride of their own size, so that every voxel has one, or of less: then a voxel has
the mean of all that cover it. Chunks are of one size, so that a second scan never compiles again,
and only two of them are on the device, so that memory does not grow with the scan.
"""

from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from deepsc_jax.config import DataConfig, Ints3
from deepsc_jax.geometry.sampling import tile_corners

Beside = TypeVar("Beside")

CHUNK_VOXELS = 2**21  # of tiles that pass through the network at once
CPU_TILES = 4


def chunk_tiles(tile: Ints3, platform: str) -> int:
    """How many tiles pass through the network at once."""
    size = max(1, CHUNK_VOXELS // int(np.prod(tile)))
    return min(size, CPU_TILES) if platform == "cpu" else size


def corners(shape: Ints3, tile: Ints3, stride: Ints3) -> Int32[np.ndarray, "tile 3"]:
    """The corners of the tiles that cover `shape`, width fastest.

    Tiles that do not overlap reach beyond the end. Of those that do the last one ends where the
    volume does; along an axis on which the volume is smaller than a tile, it lies in its middle.
    These are the windows of MONAI's `sliding_window_inference`.
    """
    if stride == tile:
        return tile_corners(shape, tile)
    axes = [
        [*range(0, side - width, step), side - width] if side > width else [-((width - side) // 2)]
        for side, width, step in zip(shape, tile, stride, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int32)


def covering_tile(data: DataConfig, depth: int, step: int) -> Ints3:
    """The tile that holds a whole scan, for a network whose training tile held every training scan.

    The training tile, or where the scan is deeper one of the scan's depth, rounded up to `step`.
    """
    deep, height, width = data.tile
    return max(deep, -(-depth // step) * step), height, width


def chunks(
    data: DataConfig,
    depth: int,
    stride: Ints3 | None = None,
    covering: Ints3 | None = None,
    masked: Float[np.ndarray, "depth height width"] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Corners of the tiles of a scan, in chunks filled up beyond its end; and the real ones.

    Args:
      data: the sizes of tiles and of the working grid.
      depth: of the scan.
      stride: of the tiles; by default they do not overlap.
      covering: the one tile that holds the scan, in place of tiles of `data`'s size.
      masked: a scan that is 0 outside the lungs: tiles without lung are left out, but one if there
        are no others.
    """
    tile = covering or data.tile
    deep = -(-depth // tile[0]) * tile[0]
    places = corners((depth, *data.working_size), tile, stride or tile)
    if masked is not None:
        lung = [masked[_overlap(masked.shape, place, tile)[0]].any() for place in places]
        places = places[lung] if any(lung) else places[:1]
    size = 1 if covering else chunk_tiles(tile, jax.default_backend())
    for start in range(0, len(places), size):
        real = places[start : start + size]
        beyond = np.full((size - len(real), 3), (deep, 0, 0), np.int32)
        yield np.concatenate([real, beyond]), real


def one_behind(dispatched: Iterator[tuple[Array, Beside]]) -> Iterator[tuple[np.ndarray, Beside]]:
    """Each item once the next is dispatched: the device computes while the host reads."""
    last, beside = next(dispatched)
    for item, next_beside in dispatched:
        yield np.asarray(last), beside
        last, beside = item, next_beside
    yield np.asarray(last), beside


def cut(
    volume: Float[np.ndarray, "depth height width"],
    corners: np.ndarray,
    tile: Ints3,
    fill: float = 0.0,
) -> Float[np.ndarray, "tile d h w"]:
    """The tiles at `corners`; what lies beyond the volume is `fill`."""
    tiles = np.full((len(corners), *tile), fill, volume.dtype)
    for part, corner in zip(tiles, corners, strict=True):
        box, inside = _overlap(volume.shape, corner, tile)
        part[inside] = volume[box]
    return tiles


def averaged(
    shape: Ints3, dispatched: Iterator[tuple[Array, np.ndarray]]
) -> Float[np.ndarray, "*map depth height width"]:
    """The mean, of equal weights, of the tiles that cover a voxel: one tile's value as it is.

    Args:
      shape: of the volume.
      dispatched: tiles `(tile, *map, d, h, w)`, at least one, and the corners of the first of them.
    """
    total, count = np.zeros(0), np.zeros(shape, np.uint8)
    for tiles, places in one_behind(dispatched):
        if not total.size:
            wide = np.result_type(tiles.dtype, np.float32)
            total = np.zeros((*tiles.shape[1:-3], *shape), wide)
        for tile, corner in zip(tiles, places, strict=False):
            box, inside = _overlap(shape, corner, tile.shape[-3:])
            total[..., *box] += tile[..., *inside]
            count[box] += 1
    return np.divide(total, count, out=total, where=count > 1)


def _overlap(
    shape: tuple[int, ...], corner: np.ndarray, tile: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a tile and a volume meet, in the volume and in the tile."""
    low = [min(max(int(o), 0), side) for o, side in zip(corner, shape, strict=True)]
    high = [
        max(a, min(int(o) + t, side))
        for a, o, t, side in zip(low, corner, tile, shape, strict=True)
    ]
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = tuple(slice(a - int(o), b - int(o)) for a, b, o in zip(low, high, corner, strict=True))
    return box, inside
