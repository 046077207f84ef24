"""Grids of a scan and linear resampling between them (paper: zero-padding and 3D cropping).

Scan coordinates are voxels: voxel j spans [j, j + 1). A grid says, for each of the three axes,
where its voxels have their centres and where its box begins and ends. Resampling is one matrix per
axis: linear between centres, constant from the outermost centre to the edge of the box, zero
outside of the box.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Centres of the voxels along one axis, ascending, and the ends of the box."""

    centres: Tensor
    low: float
    high: float


Grid = tuple[Axis, Axis, Axis]


def regular(start: float, voxels: int, step: int) -> Axis:
    """`voxels` voxels of size `step` from `start` on."""
    centres = start + step * (torch.arange(voxels, dtype=torch.float64) + 0.5)
    return Axis(centres, start, start + voxels * step)


def tile_grid(origin: tuple[int, int, int], size: tuple[int, int, int], step: int = 1) -> Grid:
    """A tile of `size` voxels of `step` scan voxels, its corner at scan voxel `origin`."""
    depth, height, width = (regular(o, n, step) for o, n in zip(origin, size, strict=True))
    return depth, height, width


def slice_grid(depth: int, slices: int, size: tuple[int, int], step: int) -> Grid:
    """The stack C_i = V[floor(i D / T)] of T slices, at in-plane 1/step (paper, V-A.2)."""
    centres = torch.arange(slices) * depth // slices + torch.tensor(0.5, dtype=torch.float64)
    height, width = (regular(0, n // step, step) for n in size)
    return Axis(centres, 0, depth), height, width


def matrix(source: Axis, target: Axis) -> Tensor:
    """Weights (target, source) of one axis.

    Where slices repeat (T > D), a voxel at their common centre takes the last of them, one before
    it the first, one after it the last.
    """
    at, centres = target.centres, source.centres
    after = torch.searchsorted(centres, at, right=True)
    below, above = (after - 1).clamp(min=0), after.clamp(max=len(centres) - 1)
    gap = centres[above] - centres[below]
    share = torch.where(gap > 0, (at - centres[below]) / gap.where(gap > 0, torch.ones(())), 0)
    eye = torch.eye(len(centres), dtype=torch.float64)
    weights = (1 - share)[:, None] * eye[below] + share[:, None] * eye[above]
    inside = (at >= source.low) & (at < source.high)
    return weights * inside[:, None]


def resample(x: Tensor, source: Grid, target: Grid) -> Tensor:
    """`x (..., depth, height, width)` on `source` brought to `target`."""
    depth, height, width = (matrix(s, t).to(x) for s, t in zip(source, target, strict=True))
    return torch.einsum("ad,bh,cw,...dhw->...abc", depth, height, width, x)
