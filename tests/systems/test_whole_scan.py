"""A whole scan in chunks of tiles: nothing of what lies beyond, and a mean where they overlap."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from deepsc_jax.config import DataConfig
from deepsc_jax.systems.whole_scan import (
    CPU_TILES,
    averaged,
    chunk_tiles,
    chunks,
    corners,
    covering_tile,
    cut,
    one_behind,
)

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
    for origins, real in chunks(DATA, depth):
        assert origins.shape == (CPU_TILES, 3)
        assert origins.dtype == np.int32
        np.testing.assert_array_equal(origins[: len(real)], real)
        assert (real < (deep, *DATA.working_size)).all()
        assert (origins[len(real) :, 0] >= depth).all()  # what fills it up is no voxel's
        for d, h, w in real:
            covered[d : d + 8, h : h + 16, w : w + 8] += 1
    assert (covered == 1).all()


def test_tiles_without_lung_are_left_out_but_one():
    volume = np.zeros((20, *DATA.working_size), np.float32)
    for held in ([(9, 3, 8)], [(0, 0, 0), (19, 15, 23), (8, 2, 16)], []):
        volume[:] = 0
        for voxel in held:
            volume[voxel] = 0.5
        real = np.concatenate([real for _, real in chunks(DATA, 20, masked=volume)])
        wanted = sorted((d // 8 * 8, 0, w // 8 * 8) for d, _, w in held) or [(0, 0, 0)]
        assert [tuple(corner) for corner in real.tolist()] == wanted


def test_one_tile_covers_a_scan_of_whatever_depth():
    data = DataConfig(working_size=(16, 24), tile=(16, 16, 24), slices=8, depth_bucket=16)
    deep = {depth: covering_tile(data, depth, step=8) for depth in (3, 16, 17, 24, 45)}
    assert [tile[0] for tile in deep.values()] == [16, 16, 24, 24, 48]
    for depth, tile in deep.items():
        assert tile[1:] == data.working_size
        ((origins, real),) = chunks(data, depth, covering=tile)
        assert origins.tolist() == real.tolist() == [[0, 0, 0]]


@depths
def test_what_was_cut_is_put_together_by_the_same_bits(depth: int):
    volume = np.random.default_rng(depth).uniform(1, 2, (depth, *DATA.working_size))
    volume = volume.astype(np.float32)

    def tiles() -> Iterator[tuple[Array, np.ndarray]]:
        for origins, places in chunks(DATA, depth):
            parts = cut(volume, origins, DATA.tile)
            assert parts.shape == (CPU_TILES, *DATA.tile)
            assert parts.dtype == np.float32
            for part, (d, h, w) in zip(parts, origins, strict=True):
                inside = volume[d : d + 8, h : h + 16, w : w + 8]
                np.testing.assert_array_equal(part[: len(inside)], inside)
                assert not part[len(inside) :].any()
            yield jnp.where(parts == 0, 9, parts), places  # no 9 may get into the scan

    np.testing.assert_array_equal(averaged(volume.shape, tiles()), volume)


def test_overlapping_tiles_end_where_the_volume_does_and_their_mean_is_taken():
    # By hand: along depth at 0, 2, 4 and 5 of 9 slices, and the lone tile in the middle of 2 rows.
    places = corners((9, 2, 4), (4, 4, 4), (2, 2, 2))
    assert places.tolist() == [[0, -1, 0], [2, -1, 0], [4, -1, 0], [5, -1, 0]]
    values = np.broadcast_to(np.array([1, 2, 3, 4], np.float32)[:, None, None, None], (4, 4, 4, 4))
    mean = averaged((9, 2, 4), iter([(jnp.asarray(values), places)]))
    expected = [1, 1, 1.5, 1.5, 2.5, 3, 3.5, 3.5, 4]
    np.testing.assert_array_equal(mean, np.broadcast_to(np.reshape(expected, (9, 1, 1)), (9, 2, 4)))
    assert cut(np.ones((9, 2, 4), np.float32), places, (4, 4, 4), 7.0)[0, 0, :, 0].tolist() == [
        7, 1, 1, 7,
    ]  # fmt: skip


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
