"""From a scan to the working grid (paper, V-A) and back: every axis is one dense matrix.

Coordinates are edges of source voxels: voxel j spans [j, j + 1). An axis of the working grid begins
at `start` and has voxels of `step`.
"""

import torch
from torch import Tensor

Axes = tuple[Tensor, Tensor, Tensor]


def normalise(values: Tensor, low: float, high: float) -> Tensor:
    """HU clipped to [low, high] and scaled to [0, 1]."""
    return (values.clamp(low, high) - low) / (high - low)


def forward(source: int, voxels: int, start: float, step: float) -> Tensor:
    """(working, source) weights: triangles as wide as the larger of both voxels, summing to 1.

    A working voxel whose centre lies outside of the source is 0.
    """
    width = max(step, 1.0)
    at = start + step * (torch.arange(voxels, dtype=torch.float64) + 0.5)
    centres = torch.arange(source, dtype=torch.float64) + 0.5
    weights = (1 - (at[:, None] - centres).abs() / width).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
    return weights * ((at >= 0) & (at <= source))[:, None]


def backward(source: int, voxels: int, start: float, step: float) -> Tensor:
    """(source, working) weights: linear between centres, held to the window's edge, 0 beyond."""
    at = (torch.arange(source, dtype=torch.float64) + 0.5 - start) / step
    inside = (at >= 0) & (at <= voxels)
    centres = torch.arange(voxels, dtype=torch.float64) + 0.5
    held = at.clamp(0.5, voxels - 0.5)
    weights = (1 - (held[:, None] - centres).abs()).clamp(min=0)
    return weights * inside[:, None]


def apply(axes: Axes, x: Tensor) -> Tensor:
    """`x (depth, height, width)` times each axis' matrix."""
    depth, height, width = axes
    return torch.einsum("ad,bh,cw,dhw->abc", depth, height, width, x.double())


def prepare(scan: Tensor, lung: Tensor, axes: Axes, window: tuple[float, float]) -> Tensor:
    """What the network sees: the mean over each voxel's part in the lungs, where that is half."""
    share = apply(axes, lung)
    inside = apply(axes, normalise(scan.double(), *window) * lung) / share.clamp(min=1e-30)
    return inside * (share >= 0.5)
