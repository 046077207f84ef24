"""Resampling between tiles and slices: against the reference, and by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import masked_volume
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import GRADIENTS, VALUES, compare
from reference.deepsc import geometry as reference

from deepsc_jax.geometry import grids

SIZE = (16, 32)
TILE = (8, 16, 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A scan of `depth` slices, `slices` sampled, and a tile's corner in it."""

    depth: int
    slices: int
    origin: tuple[int, int, int]


CASES = [
    Case(depth=16, slices=16, origin=(8, 0, 16)),
    Case(depth=13, slices=5, origin=(8, 0, 0)),
    Case(depth=7, slices=12, origin=(0, 0, 16)),  # slices repeat
    Case(depth=9, slices=4, origin=(8, 0, 16)),  # one slice is real
    Case(depth=21, slices=6, origin=(3, 0, 8)),  # where a segmentation tile may lie
    Case(depth=3, slices=1, origin=(0, 0, 0)),
]


def channel_last_resample(
    x: torch.Tensor, source: reference.Grid, target: reference.Grid
) -> torch.Tensor:
    return reference.resample(x.movedim(-1, 0), source, target).movedim(0, -1)


EVERY = [
    *(pytest.param(case, "float64", id=f"{case}-float64") for case in CASES),
    pytest.param(CASES[1], "float32", id="float32"),
]


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_slices_to_a_tile(case: Case, dtype: str, within: Any):
    # As F_c, and as an evidence mask, go to a tile: to full resolution, and to that of S_i.
    steps = (2, 4, 8)
    stacks = [
        masked_volume((case.slices, 1, SIZE[0] // step, SIZE[1] // step, 2))[:, 0] for step in steps
    ]
    real = min(case.depth - case.origin[0], TILE[0])

    def ours(_: Any, *stacks: Any) -> list:
        depth, origin = jnp.asarray(case.depth), jnp.asarray(case.origin)
        rows = []
        for x, step in zip(stacks, steps, strict=True):
            source = grids.slice_grid(depth, case.slices, SIZE, step)
            for scale in (1, step):
                target = grids.tile_grid(origin, TILE, depth, scale)
                rows.append(grids.to_tile(x, source, target)[: -(-real // scale)])
        return rows

    def theirs(*stacks: torch.Tensor) -> list[torch.Tensor]:
        rows = []
        for x, step in zip(stacks, steps, strict=True):
            source = reference.slice_grid(case.depth, case.slices, SIZE, step)
            for scale in (1, step):
                size = (-(-real // scale), TILE[1] // scale, TILE[2] // scale)
                target = reference.tile_grid(case.origin, size, scale)
                rows.append(channel_last_resample(x, source, target))
        return rows

    errors = compare(ours, theirs, stacks, dtype)
    within("to_tile", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_a_tile_to_slices(case: Case, dtype: str, within: Any):
    tile = masked_volume((*TILE, 2))
    real = min(case.depth - case.origin[0], TILE[0])

    def ours(_: Any, x: Any) -> list:
        depth = jnp.asarray(case.depth)
        source = grids.tile_grid(jnp.asarray(case.origin), TILE, depth)
        return [grids.to_scan(x, source, grids.slice_grid(depth, case.slices, SIZE, 2))]

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        source = reference.tile_grid(case.origin, (real, TILE[1], TILE[2]))
        target = reference.slice_grid(case.depth, case.slices, SIZE, 2)
        return [channel_last_resample(x[:real], source, target)]

    errors = compare(ours, theirs, [tile], dtype)
    within("to_scan", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@jax.jit
def to_a_tile_and_back(stack: Any, depth: Any, first: Any) -> Any:
    slices = grids.slice_grid(depth, len(stack), SIZE, 2)
    tile = grids.tile_grid(jnp.stack([first, 0, 16]), TILE, depth)
    there = grids.to_tile(stack, slices, tile)
    return there, grids.to_scan(there, tile, slices)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(depth=st.integers(1, 40), place=st.floats(0, 0.999), slices=st.sampled_from([1, 5, 12]))
def test_any_depth_any_tile(depth: int, place: float, slices: int):
    first = int(place * depth)
    stack = np.random.default_rng(depth).uniform(size=(slices, SIZE[0] // 2, SIZE[1] // 2, 1))
    source = reference.slice_grid(depth, slices, SIZE, 2)
    real = min(depth - first, TILE[0])
    target = reference.tile_grid((first, 0, 16), (real, TILE[1], TILE[2]))
    there = channel_last_resample(torch.from_numpy(stack), source, target)
    back = channel_last_resample(there, target, source)
    with jax.enable_x64(True):
        found, again = to_a_tile_and_back(jnp.asarray(stack), depth, first)
    np.testing.assert_allclose(found[:real], there.numpy(), atol=1e-11)
    assert not found[real:].any()
    np.testing.assert_allclose(again, back.numpy(), atol=1e-11)


def test_a_ramp_by_hand():
    """D = 7, T = 3: slices 0, 2 and 4, centres 0.5, 2.5, 4.5."""
    depth, tile = jnp.asarray(7), (8, 2, 2)
    slices = grids.slice_grid(depth, 3, (2, 2))
    whole = grids.tile_grid(jnp.zeros(3, int), tile, depth)
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], (*tile, 1))
    np.testing.assert_array_equal(grids.to_scan(ramp, whole, slices)[:, 0, 0, 0], [0, 2, 4])
    stack = jnp.broadcast_to(jnp.asarray([0.0, 2, 4])[:, None, None, None], (3, 2, 2, 1))
    found = grids.to_tile(stack, slices, whole)[:, 1, 1, 0]
    np.testing.assert_array_equal(found, [0, 1, 2, 3, 4, 4, 4, 0])
    there = torch.tensor([0.0, 2, 4])[:, None, None].expand(3, 2, 2)
    theirs = reference.slice_grid(7, 3, (2, 2), 1), reference.tile_grid((0, 0, 0), (7, 2, 2))
    assert reference.resample(there, *theirs)[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 4, 4]
