"""Resampling between tiles and the slice stack, against dense weights written from the design."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.geometry import grids
from deepsc_jax.geometry.sampling import slice_indices

TILE = (8, 16, 16)
SIZE = (48, 16)  # a middle tile: dynamic slices clamp what overshoots an end
# Weights are computed in float32 from centres that are exact there.
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def axis_weights(centres, box, targets):
    """Linear between centres, held from the outermost one to the box's edge, zero outside."""
    rows = np.zeros((len(targets), len(centres)))
    for row, at in zip(rows, targets, strict=True):
        if not box[0] <= at < box[1] or len(centres) == 0:
            continue
        for n in range(len(centres)):
            row[n] = np.interp(at, centres, np.eye(len(centres))[n])
    return rows


class Oracle:
    """A grid as three lists of centres and three boxes, in scan voxels."""

    def __init__(self, centres, boxes):
        self.centres, self.boxes = centres, boxes

    @classmethod
    def tile(cls, origin, depth, scale=1, tile=TILE):
        """A tile's real slices end with the scan; a half-filled slice of its features is real."""
        real = -(-min(max(depth - origin[0], 0), tile[0]) // scale)
        counts = (real, tile[1] // scale, tile[2] // scale)
        centres = [o + (np.arange(n) + 0.5) * scale for o, n in zip(origin, counts, strict=True)]
        return cls(centres, [(o, o + n * scale) for o, n in zip(origin, counts, strict=True)])

    @classmethod
    def slices(cls, depth, slices, step, size=SIZE):
        centres = [np.array([i * depth // slices + 0.5 for i in range(slices)])]
        centres += [(np.arange(s // step) + 0.5) * step for s in size]
        return cls(centres, [(0, depth), (0, size[0]), (0, size[1])])

    def resample(self, x, target):
        """`x (depth, height, width, channel)` at the centres of `target`."""
        x = x[: len(self.centres[0])]
        for axis in range(3):
            weights = axis_weights(self.centres[axis], self.boxes[axis], target.centres[axis])
            x = np.moveaxis(np.tensordot(weights, x, axes=(1, axis)), 0, axis)
        return x


def whole_tile(origin, scale=1):
    """All slices of a tile, padded ones included: they lie outside the scan, so they are zero."""
    return Oracle.tile(origin, 10**6, scale)


@functools.partial(jax.jit, static_argnames=("step", "scale", "slices", "tile", "size"))
def to_tile(x, origin, depth, *, slices, step, scale=1, tile=TILE, size=SIZE):
    source = grids.slice_grid(depth, slices, size, step)
    return grids.to_tile(x, source, grids.tile_grid(origin, tile, depth, scale))


@functools.partial(jax.jit, static_argnames=("step", "scale", "slices", "tile", "size"))
def to_scan(x, origin, depth, *, slices, step, scale=1, tile=TILE, size=SIZE):
    source = grids.tile_grid(origin, tile, depth, scale)
    return grids.to_scan(x, source, grids.slice_grid(depth, slices, size, step))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def column(*values):
    """A volume whose values change along depth alone, in-plane as large as a tile."""
    x = np.asarray(values, np.float32)[:, None, None, None]
    return np.broadcast_to(x, (len(values), *TILE[1:], 1))


def test_ramp_of_seven_slices_sampled_at_three():
    # floor(i * 7 / 3) = 0, 2, 4: centres at 0.5, 2.5, 4.5 of a scan that spans [0, 7).
    assert slice_indices(jnp.asarray(7), 3).tolist() == [0, 2, 4]
    alike: dict[str, Any] = {"slices": 3, "step": 1, "size": TILE[1:]}
    stack = column(10, 30, 50)
    first = to_tile(stack, np.array([0, 0, 0]), 7, **alike)
    assert first[:, 3, 5, 0].tolist() == [10, 20, 30, 40, 50, 50, 50, 0]
    second = to_tile(stack, np.array([4, 0, 0]), 7, **alike)
    assert second[:, 3, 5, 0].tolist() == [50, 50, 50, 0, 0, 0, 0, 0]
    ramp = column(0, 10, 20, 30, 40, 50, 60, 70)
    assert to_scan(ramp, np.array([0, 0, 0]), 7, **alike)[:, 3, 5, 0].tolist() == [0, 20, 40]
    assert to_scan(ramp, np.array([1, 0, 0]), 7, **alike)[:, 3, 5, 0].tolist() == [0, 10, 30]
    assert to_scan(ramp, np.array([3, 0, 0]), 7, **alike)[:, 3, 5, 0].tolist() == [0, 0, 10]


def test_features_at_an_eighth_of_a_tile_are_held_and_interpolated():
    # A tile of 16 slices has two at 1/8, centred on 4 and 12; its own are at 0.5, 1.5, ...
    x = np.zeros((2, 1, 1, 1), np.float32)
    x[:, 0, 0, 0] = 8, 16

    @jax.jit
    def up(x):
        corner, tile, depth = jnp.zeros(3, jnp.int32), (16, 8, 8), jnp.asarray(16)
        source, target = (grids.tile_grid(corner, tile, depth, scale) for scale in (8, 1))
        return grids.resample(x, source, target)

    found = up(x)
    expected = [8, 8, 8, 8, *(8 + 0.5 + k for k in range(8)), 16, 16, 16, 16]
    assert found[:, 0, 7, 0].tolist() == expected


@pytest.mark.parametrize(("depth", "slices"), [(16, 16), (5, 8), (3, 7), (11, 4), (1, 3), (16, 5)])
def test_to_tile_is_the_dense_linear_map(depth, slices):
    volume = draw(depth, SIZE[0] // 2, SIZE[1] // 2, 2)
    stack = volume[[i * depth // slices for i in range(slices)]]
    source = Oracle.slices(depth, slices, 2)
    for origin in ([0, 0, 0], [0, 16, 0], [8, 16, 0], [3, 0, 0], [16, 0, 0]):
        found = to_tile(stack, np.array(origin), depth, slices=slices, step=2)
        expected = source.resample(stack, whole_tile(origin))
        close(found, expected, err_msg=f"origin {origin}")


@pytest.mark.parametrize(("depth", "slices"), [(16, 6), (5, 8), (11, 4)])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_every_scale_reaches_the_slice_grid_and_back(depth, slices, scale):
    origin, step = [8 if depth > 8 else 0, 16, 0], 4
    x = draw(*(side // scale for side in TILE), 1)
    for wider in {max(scale, 2), 8}:
        found = to_scan(x, np.array(origin), depth, slices=slices, step=wider, scale=scale)
        target = Oracle.slices(depth, slices, wider)
        close(found, Oracle.tile(origin, depth, scale).resample(x, target), err_msg=f"{wider}")

    mask = draw(depth, SIZE[0] // step, SIZE[1] // step, 1)
    stack = mask[[i * depth // slices for i in range(slices)]]
    found = to_tile(stack, np.array(origin), depth, slices=slices, step=step, scale=scale)
    expected = Oracle.slices(depth, slices, step).resample(stack, whole_tile(origin, scale))
    close(found, expected)


@pytest.mark.parametrize(("depth", "slices"), [(13, 5), (16, 16), (20, 24), (1, 2)])
def test_tiles_sum_to_the_whole(depth, slices):
    padded = -(-depth // TILE[0]) * TILE[0]
    volume = draw(padded, *SIZE, 2)
    volume[depth:] = 1e3  # must not be read
    steps = zip((padded, *SIZE), TILE, strict=True)
    corners = itertools.product(*(range(0, side, step) for side, step in steps))
    total = 0
    for d, h, w in corners:
        part = volume[d : d + TILE[0], h : h + TILE[1], w : w + TILE[2]]
        total += to_scan(part, np.array([d, h, w]), depth, slices=slices, step=2)
    one = (padded, *SIZE)
    whole = to_scan(volume, np.array([0, 0, 0]), depth, slices=slices, step=2, tile=one)
    np.testing.assert_array_equal(total, whole)
    # Slice centres coincide with voxel centres: only the in-plane 2x2 mean is left.
    chosen = volume[[i * depth // slices for i in range(slices)]]
    means = chosen.reshape(slices, SIZE[0] // 2, 2, SIZE[1] // 2, 2, 2).mean(axis=(2, 4))
    close(whole, means)


def test_more_slices_than_the_scan_has_repeat_and_lose_nothing():
    depth, slices = 3, 8
    assert slice_indices(jnp.asarray(depth), slices).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    volume = draw(depth, *TILE[1:], 1)
    stack = volume[[0, 0, 0, 1, 1, 1, 2, 2]]
    alike: dict[str, Any] = {"slices": slices, "step": 1, "size": TILE[1:]}
    back = to_tile(stack, np.array([0, 0, 0]), depth, **alike)
    np.testing.assert_array_equal(back[:depth], volume)
    assert not np.any(back[depth:])
    tile = np.concatenate([volume, np.full((5, *TILE[1:], 1), 9, np.float32)])
    np.testing.assert_array_equal(to_scan(tile, np.array([0, 0, 0]), depth, **alike), stack)


def test_in_plane_values_are_zero_outside_the_tile_and_held_at_the_scans_edge():
    x = np.ones((*TILE, 1), np.float32)
    placed = to_scan(x, np.array([0, 16, 0]), 8, slices=4, step=2)
    assert np.all(placed[:, 8:16] == 1)
    assert not np.any(placed[:, :8])
    assert not np.any(placed[:, 16:])
    row = np.zeros((1, SIZE[0] // 8, SIZE[1] // 8, 1), np.float32)
    row[0, :, 0, 0] = 8, 16, 24, 32, 40, 48
    tile = to_tile(row, np.array([0, 0, 0]), 1, slices=1, step=8)
    # Rows 0..3 lie before the first centre, 4; then one more per row: at 4.5 it is 8.5.
    assert tile[0, :, 0, 0].tolist() == [8.0] * 4 + [8.5 + k for k in range(12)]
    tile = to_tile(row, np.array([0, 16, 0]), 1, slices=1, step=8)
    assert tile[0, :, 0, 0].tolist() == [20.5 + k for k in range(16)]
    tile = to_tile(row, np.array([0, 32, 0]), 1, slices=1, step=8)
    assert tile[0, :, 0, 0].tolist() == [36.5 + k for k in range(12)] + [48.0] * 4


def test_gradients_are_the_transposed_map():
    # <A x, y> = <x, A' y>, where A' y is the gradient of <A x, y>: 1e-5 is rounding of the sums.
    depth, slices, origin = 11, 6, np.array([8, 16, 0])
    stack, tile = draw(slices, 24, 8, 2), draw(*TILE, 2, seed=1)

    def inner(x):
        return (to_tile(x, origin, depth, slices=slices, step=2) * tile).sum()

    pulled = jax.grad(inner)(jnp.asarray(stack))
    source, target, expected = Oracle.slices(depth, slices, 2), whole_tile(origin), tile
    for axis in range(3):
        weights = axis_weights(source.centres[axis], source.boxes[axis], target.centres[axis])
        expected = np.moveaxis(np.tensordot(weights.T, expected, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(pulled, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(inner(jnp.asarray(stack)), (pulled * stack).sum(), rtol=1e-5)

    def scanned(x):
        return (to_scan(x, origin, depth, slices=slices, step=2) * stack).sum()

    pulled = jax.grad(scanned)(jnp.asarray(tile))
    assert not np.any(pulled[3:]), "slices past the scan's depth were read"
    np.testing.assert_allclose(scanned(jnp.asarray(tile)), (pulled * tile).sum(), rtol=1e-5)


def test_origins_and_depths_are_traced():
    traces = []

    @jax.jit
    def crop(x, origin, depth):
        traces.append(1)
        return to_tile(x, origin, depth, slices=4, step=2)

    stack = draw(4, 24, 8, 1)
    crops = [crop(stack, jnp.array(o), jnp.array(d)) for o, d in (([0, 0, 0], 9), ([8, 16, 0], 10))]
    assert len(traces) == 1
    source = Oracle.slices(10, 4, 2)
    close(crops[1], source.resample(stack, whole_tile([8, 16, 0])))


def test_a_tile_beyond_the_scan_gives_and_gets_nothing():
    beyond = np.array([16, 0, 0])
    x = np.full((*TILE, 1), 5, np.float32)
    assert not np.any(to_scan(x, beyond, 10, slices=4, step=2))
    stack = np.full((4, 24, 8, 1), 5, np.float32)
    assert not np.any(to_tile(stack, beyond, 10, slices=4, step=2))
