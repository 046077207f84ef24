"""Figures and planes that are watched, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from deepsc_jax.systems.watching import lesion_figures, plane, sampled_plane, telling_slice

NAN = np.nan
# Two tiles of a scan of two slices of 2x4: the left half, and the right.
ORIGINS = jnp.asarray([[[0, 0, 0], [0, 0, 2]]])


def tiles_of(scan: np.ndarray) -> jax.Array:
    return jnp.asarray(np.stack([scan[..., :2], scan[..., 2:]])[None])


def test_lesions_count_in_scans_with_them_and_false_ones_in_scans_known_to_have_none() -> None:
    truth = np.zeros((3, 2, 2, 2, 2), bool)
    truth[0, 0, 0, 0] = True  # two voxels, in the first scan alone
    probability = np.zeros(truth.shape)
    probability[0, 0, 0, :, 0] = 0.5  # one of them, and one other
    probability[1:, 1, :, 0, 0] = 0.9  # two voxels of both other scans
    probability[1:, 0, 0, 0, 0] = 0.49
    free = jnp.asarray([False, True, False])  # the third one's lesions are not known
    figures = lesion_figures(
        jnp.asarray(probability), jnp.asarray(truth), free, jnp.asarray([1.0, 1.5, 1.0])
    )
    np.testing.assert_array_equal(figures["lesion_dsc"], [0.5, NAN, NAN])
    np.testing.assert_array_equal(figures["lesion_free_ml"], [NAN, 3.0, NAN])


def test_the_slice_that_is_shown_is_the_one_with_most_lesion_or_the_middle_one() -> None:
    scan = np.zeros((2, 2, 4), bool)
    assert telling_slice(tiles_of(scan), ORIGINS, jnp.asarray([3])).tolist() == [1]
    assert telling_slice(tiles_of(scan), ORIGINS, jnp.asarray([1])).tolist() == [0]
    scan[0, 0, 0] = scan[1, :, 2] = True
    assert telling_slice(tiles_of(scan), ORIGINS, jnp.asarray([2])).tolist() == [1]
    deeper = ORIGINS + jnp.asarray([16, 0, 0])
    assert telling_slice(tiles_of(scan), deeper, jnp.asarray([18])).tolist() == [17]


def test_a_plane_is_put_together_from_its_tiles() -> None:
    scan = np.arange(16, dtype=np.float32).reshape(2, 2, 4)
    tiles = tiles_of(scan)
    for i in range(2):
        found = plane(tiles, ORIGINS, jnp.asarray([i]), (2, 4))
        np.testing.assert_array_equal(found[0], scan[i])
    # What no tile holds is 0; of a tile that reaches beyond the plane, what lies in it is shown.
    beyond = jnp.asarray([[[0, 0, 0], [5, 0, 2]]])
    found = plane(tiles, beyond, jnp.asarray([0]), (2, 4))
    np.testing.assert_array_equal(found[0], scan[0] * [1, 1, 0, 0])
    beyond = jnp.asarray([[[0, 1, 0], [0, 0, 2]]])
    found = plane(tiles, beyond, jnp.asarray([0]), (2, 4))
    np.testing.assert_array_equal(found[0], [[0, 0, 2, 3], [0, 1, 6, 7]])


def test_a_sampled_slice_is_the_one_below() -> None:
    maps = jnp.arange(4.0)[None, :, None, None]
    # Slices 0, 2, 5, 7 of a scan of 10.
    for index, expected in ((0, 0), (2, 0), (3, 1), (5, 2), (9, 3)):
        found = sampled_plane(maps, jnp.asarray([index]), jnp.asarray([10]))
        assert found.tolist() == [[[expected]]]
