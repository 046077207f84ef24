"""A whole scan through a network that sees tiles: cut, dispatched in chunks, pasted.

Chunks are of one size, so that a second scan never compiles again, and only two of them are on the
device, so that memory does not grow with the scan.
"""

from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.config import DataConfig, Ints3
from deepsc_jax.geometry.sampling import tile_corners

Beside = TypeVar("Beside")

CHUNK_VOXELS = 2**21  # of tiles that pass through the network at once
CPU_TILES = 4


def chunk_tiles(tile: Ints3, platform: str) -> int:
    """How many tiles pass through the network at once."""
    size = max(1, CHUNK_VOXELS // int(np.prod(tile)))
    return min(size, CPU_TILES) if platform == "cpu" else size


def chunks(data: DataConfig, depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Corners of the tiles of a scan, in chunks filled up beyond its end; and the real ones."""
    deep = data.tile_counts(depth)[0] * data.tile[0]
    corners = tile_corners((deep, *data.working_size), data.tile)
    size = chunk_tiles(data.tile, jax.default_backend())
    for start in range(0, len(corners), size):
        real = corners[start : start + size]
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
    volume: Float[np.ndarray, "depth height width"], corners: np.ndarray, tile: Ints3
) -> Float[np.ndarray, "tile d h w"]:
    """The tiles at `corners`; what lies beyond the volume is 0."""
    parts = []
    for corner in corners:
        part = volume[tuple(slice(o, o + t) for o, t in zip(corner, tile, strict=True))]
        parts.append(np.pad(part, [(0, t - n) for t, n in zip(tile, part.shape, strict=True)]))
    return np.stack(parts)


def paste(volume: np.ndarray, tiles: np.ndarray, corners: np.ndarray) -> None:
    """Write tiles into `volume` at their corners, without what lies beyond it."""
    for tile, corner in zip(tiles, corners, strict=False):
        depth, height, width = (int(o) for o in corner)
        room = volume[depth : depth + tile.shape[0], height:, width:]
        room[:, : tile.shape[1], : tile.shape[2]] = tile[: len(room)]
