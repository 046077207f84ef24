"""The lungs on a grid, and group norm of what lies in them, without a loop over scans."""

from typing import NamedTuple

import torch
from reference.deepsc.lungs import LungNorm
from torch import Tensor
from torch.nn import functional as F


class Lungs(NamedTuple):
    """1 inside, 0 outside: `(N, 1, depth, height, width)`; their voxels, at least 1: `(N, 1)`."""

    mask: Tensor
    count: Tensor


def lungs_of(mask: Tensor) -> Lungs:
    """With the count."""
    return Lungs(mask, mask.sum((2, 3, 4)).clamp(min=1))


def coarser(lungs: Lungs, factors: tuple[int, int, int] = (2, 2, 2)) -> Lungs:
    """Where any voxel of a block is in the lungs."""
    return lungs_of(F.max_pool3d(lungs.mask, factors, ceil_mode=True))


class Norm(LungNorm):
    """The reference's norm in four passes over the volume, its statistics in float32 at least."""

    def forward(self, x: Tensor, lungs: Lungs) -> Tensor:  # type: ignore[override]
        """`x (N, channel, depth, height, width)`."""
        mask, per_group = lungs.mask, self.num_channels // self.num_groups
        dtype, number = x.dtype, lungs.count * per_group
        x = x.to(torch.promote_types(dtype, torch.float32)) * mask

        def mean(sums: Tensor) -> Tensor:
            of_group = sums.unflatten(1, (self.num_groups, per_group)).sum(2) / number
            return of_group.repeat_interleave(per_group, 1)[..., None, None, None]

        x = torch.addcmul(x, mean(x.sum((2, 3, 4))), mask, value=-1)
        variance = mean(x.square().sum((2, 3, 4)))
        scale, shift = (p[:, None, None, None] for p in (self.weight, self.bias))
        x = x * (scale * torch.rsqrt(variance + self.eps))
        return torch.addcmul(x, shift, mask).to(dtype)
