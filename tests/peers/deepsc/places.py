"""Where tiles and slices lie: the regions that are computed at once, and resampling between them.

The matrices of the reference, one per axis, made once for a depth of scans. Tiles do not overlap,
so what a region adds to the slice grid are columns of them, and what it takes from there are rows.
"""

import itertools
from typing import NamedTuple

import torch
from reference.deepsc.geometry import Grid, matrix, regular, slice_grid, tile_grid
from torch import Tensor, nn

from deepsc_jax.config import Config, Ints3
from peers.parts import Parts

STEPS = (8, 4, 2)  # voxels per voxel of S_1, S_2, S_3, and in-plane of M_3, M_2, M_1
CONTRACTIONS = ("ad,ncdhw->ncahw", "bh,ncdhw->ncdbw", "vw,ncdhw->ncdhv")
Matrices = tuple[Tensor, Tensor, Tensor]


class Region(NamedTuple):
    """A box of a scan, from `low` on, of `counts` tiles along each axis, all of `tile` voxels."""

    low: Ints3
    counts: Ints3
    tile: Ints3

    def box(self, step: int = 1) -> tuple[slice, slice, slice]:
        """On a grid coarser by `step`."""
        depth, height, width = (
            slice(low // step, low // step + count * -(-side // step))
            for low, count, side in zip(*self, strict=True)
        )
        return depth, height, width


def regions(config: Config, depth: int, parts: Parts) -> list[Region]:
    """Those of a scan of so many slices, in the order of its tiles; the last layer may be thin."""
    (deep, high, wide), (height, width) = config.data.tile, config.data.working_size
    rows, columns = height // high, width // wide
    full, rest = divmod(depth, deep)
    if parts.at_once == "all":
        layers = [(0, full, deep)] if full else []
    else:
        layers = [(z * deep, 1, deep) for z in range(full)]
    layers += [(full * deep, 1, rest)] if rest else []
    if parts.at_once != "tile":
        return [Region((z, 0, 0), (n, rows, columns), (d, high, wide)) for z, n, d in layers]
    corners = list(itertools.product(range(0, height, high), range(0, width, wide)))
    return [Region((z, y, x), (1, 1, 1), (d, high, wide)) for z, _, d in layers for y, x in corners]


def unfolded(x: Tensor, region: Region, step: int = 1) -> Tensor:
    """`(N, channel, ...)` of a region as `(N * tiles, channel, ...)` of its tiles."""
    for axis, (count, side) in enumerate(zip(region.counts, region.tile, strict=True)):
        x = x.unflatten(2 + 2 * axis, (count, -(-side // step)))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(0, 3)


def folded(x: Tensor, region: Region) -> Tensor:
    """The inverse of `unfolded`."""
    x = x.unflatten(0, (-1, *region.counts)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    for axis in range(3):
        x = x.flatten(2 + axis, 3 + axis)
    return x


class Places(nn.Module):
    """The matrices between a scan's voxels and its slice grid: buffers, float64 until `to`."""

    def __init__(self, config: Config, depth: int):
        super().__init__()
        data = config.data
        size = data.working_size

        def slices(step: int) -> Grid:
            return slice_grid(depth, data.slices, size, step)

        for axis, (seen, side) in enumerate(zip(slices(2), (depth, *size), strict=True)):
            tiles = [
                regular(low, min(data.tile[axis], side - low), 1)
                for low in range(0, side, data.tile[axis])
            ]
            self._keep(f"to_slices{axis}", torch.cat([matrix(tile, seen) for tile in tiles], dim=1))
            self._keep(f"to_voxels2{axis}", matrix(seen, regular(0, side, 1)))
        for step in STEPS:
            coarse = tile_grid(
                (0, 0, 0), (-(-depth // step), size[0] // step, size[1] // step), step
            )
            voxels = tile_grid((0, 0, 0), (depth, *size))
            for axis, seen in enumerate(slices(step)):
                self._keep(f"to_coarse{step}{axis}", matrix(seen, coarse[axis]))
                if step > 2:
                    self._keep(f"to_voxels{step}{axis}", matrix(seen, voxels[axis]))

    def _keep(self, name: str, weights: Tensor) -> None:
        self.register_buffer(name, weights, persistent=False)

    def _matrices(self, name: str) -> Matrices:
        return tuple(self.get_buffer(f"{name}{axis}") for axis in range(3))  # type: ignore[return-value]

    def to_slices(self, x: Tensor, region: Region) -> Tensor:
        """What a region's voxels add to the slice grid."""
        pairs = zip(self._matrices("to_slices"), region.box(), strict=True)
        depth, height, width = (weights[:, box] for weights, box in pairs)
        return resampled(x, (depth, height, width))

    def to_region(self, x: Tensor, region: Region) -> Tensor:
        """Features of the slice grid on a region's voxels."""
        return self._rows(x, "to_voxels2", region.box())

    def to_coarse(self, x: Tensor, region: Region, step: int) -> Tensor:
        """A map at in-plane 1/`step` on a region's voxels of `step`."""
        return self._rows(x, f"to_coarse{step}", region.box(step))

    def to_voxels(self, x: Tensor, step: int) -> Tensor:
        """A map at in-plane 1/`step` on the scan's voxels."""
        return resampled(x, self._matrices(f"to_voxels{step}"))

    def _rows(self, x: Tensor, name: str, boxes: tuple[slice, slice, slice]) -> Tensor:
        pairs = zip(self._matrices(name), boxes, strict=True)
        depth, height, width = (weights[box] for weights, box in pairs)
        return resampled(x, (depth, height, width))


def resampled(x: Tensor, matrices: Matrices) -> Tensor:
    """`x (N, channel, depth, height, width)` by a matrix per axis, what shrinks it most first."""
    shrinks = [weights.shape[0] / weights.shape[1] for weights in matrices]
    for axis in sorted(range(3), key=shrinks.__getitem__):
        x = torch.einsum(CONTRACTIONS[axis], matrices[axis], x)
    return x
