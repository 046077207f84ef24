"""Which slices and which tiles of a scan a network sees; arithmetic, on numbers of either kind."""

from typing import Any

import numpy as np

from deepsc_jax.config import Ints3


def slice_indices(depth: Any, slices: int) -> Any:
    """The T slices that a classifier sees: floor(i * D / T) (DeepSC-COVID, V-A.2).

    Args:
      depth: the scan's true number of slices D: an int, or a traced JAX scalar.
      slices: T.

    Returns:
      An integer array `(slices,)` of the kind of `depth`; slices repeat where T > D.
    """
    return np.arange(slices) * depth // slices


def tile_corners(shape: Ints3, tile: Ints3) -> np.ndarray:
    """The corners of the non-overlapping tiles that cover `shape`, (K, 3) int32, width fastest."""
    axes = [
        np.arange(0, side, step, dtype=np.int32) for side, step in zip(shape, tile, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def cut_tiles(volume: np.ndarray, tile: Ints3) -> np.ndarray:
    """(D, H, W) into the tiles (K, d, h, w) at its `tile_corners`; sides must divide."""
    (depth, height, width), (d, h, w) = volume.shape, tile
    blocks = volume.reshape(depth // d, d, height // h, h, width // w, w)
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, d, h, w)
