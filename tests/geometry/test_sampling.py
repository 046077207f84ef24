"""Which slices and tiles of a scan a network sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.geometry.sampling import slice_indices, tile_corners


@pytest.mark.parametrize("depth", [1, 3, 7, 64, 200])
def test_slices_are_the_same_of_a_number_and_of_a_traced_one(depth: int):
    expected = [i * depth // 64 for i in range(64)]
    assert slice_indices(depth, 64).tolist() == expected
    traced = jax.jit(lambda d: slice_indices(d, 64))(jnp.asarray(depth))
    assert traced.dtype == jnp.int32
    assert traced.tolist() == expected


def test_corners_cover_a_scan_width_fastest():
    found = tile_corners((4, 6, 4), (2, 3, 4))
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 0, 0], [0, 3, 0], [2, 0, 0], [2, 3, 0]]
    # Where the last tile reaches beyond the scan, it begins within it.
    assert tile_corners((5, 3, 8), (4, 3, 4)).tolist() == [
        [0, 0, 0],
        [0, 0, 4],
        [4, 0, 0],
        [4, 0, 4],
    ]
