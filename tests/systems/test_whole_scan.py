"""A whole scan in chunks of tiles: every voxel once, and nothing of what lies beyond."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from deepsc_jax.config import DataConfig
from deepsc_jax.systems.whole_scan import CPU_TILES, chunk_tiles, chunks, cut, one_behind, paste

DATA = DataConfig(working_size=(16, 24), tile=(8, 16, 8), slices=8, depth_bucket=8)
# Tiles of three to a slab of eight slices: below, at and above a chunk of four tiles.
depths = pytest.mark.parametrize("depth", [1, 7, 8, 9, 32, 45])


def test_a_chunk_is_as_many_tiles_as_a_device_takes_at_once():
    assert chunk_tiles((64, 128, 128), "gpu") == 2
    assert chunk_tiles((8, 16, 16), "gpu") == 1024
    assert chunk_tiles((256, 256, 256), "gpu") == 1  # larger than a chunk
    assert chunk_tiles((64, 128, 128), "cpu") == 2
    assert chunk_tiles((8, 16, 16), "cpu") == CPU_TILES == 4


@depths
def test_chunks_are_of_one_size_and_their_real_tiles_cover_the_scan_once(depth: int):
    covered = np.zeros((depth, *DATA.working_size), int)
    deep = -(-depth // 8) * 8
    for origins, corners in chunks(DATA, depth):
        assert origins.shape == (CPU_TILES, 3)
        assert origins.dtype == np.int32
        np.testing.assert_array_equal(origins[: len(corners)], corners)
        assert (corners < (deep, *DATA.working_size)).all()
        assert (origins[len(corners) :, 0] >= depth).all()  # what fills it up is no voxel's
        for d, h, w in corners:
            covered[d : d + 8, h : h + 16, w : w + 8] += 1
    assert (covered == 1).all()


@depths
def test_what_was_cut_is_pasted_back(depth: int):
    volume = np.random.default_rng(depth).uniform(1, 2, (depth, *DATA.working_size))
    volume = volume.astype(np.float32)
    rebuilt = np.zeros_like(volume)
    for origins, corners in chunks(DATA, depth):
        tiles = cut(volume, origins, DATA.tile)
        assert tiles.shape == (CPU_TILES, *DATA.tile)
        assert tiles.dtype == np.float32
        for tile, (d, h, w) in zip(tiles, origins, strict=True):
            inside = volume[d : d + 8, h : h + 16, w : w + 8]
            np.testing.assert_array_equal(tile[: len(inside)], inside)
            assert not tile[len(inside) :].any()
        paste(rebuilt, np.where(tiles == 0, 9, tiles), corners)  # no 9 may get into the scan
    np.testing.assert_array_equal(rebuilt, volume)


def test_each_item_is_read_once_the_next_is_dispatched():
    events = []

    def dispatched() -> Iterator[tuple[Array, str]]:
        for name in "abc":
            events.append(f"dispatch {name}")
            yield jnp.full(2, ord(name)), name

    for values, name in one_behind(dispatched()):
        assert isinstance(values, np.ndarray)
        assert values.tolist() == [ord(name)] * 2
        events.append(f"read {name}")
    assert events == ["dispatch a", "dispatch b", "read a", "dispatch c", "read b", "read c"]
