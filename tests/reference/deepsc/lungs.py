"""What counts of a volume: the voxels of the lungs, where the input is not 0."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LungNorm(nn.GroupNorm):
    """Group norm of the lungs' voxels of every scan; the others become 0."""

    def forward(self, x: Tensor, lungs: Tensor) -> Tensor:  # type: ignore[override]
        """`x (batch, channel, depth, height, width)`, `lungs (batch, 1, ...)`, bool."""
        out = []
        for values, inside in zip(x, lungs[:, 0], strict=True):
            whole = torch.zeros_like(values)
            if inside.any():
                whole = whole.clone()
                whole[:, inside] = super().forward(values[:, inside][None])[0]
            out.append(whole)
        return torch.stack(out)


def coarser(lungs: Tensor, factors: tuple[int, int, int] = (2, 2, 2)) -> Tensor:
    """The lungs on a grid coarser by `factors`: where any voxel of a block is in them."""
    return F.max_pool3d(lungs.double(), factors, ceil_mode=True) > 0


def mean(x: Tensor, lungs: Tensor) -> Tensor:
    """The mean of every scan and channel over the lungs, 0 without any: `(batch, channel)`."""
    count = lungs.sum((2, 3, 4)).clamp(min=1)
    return (x * lungs).sum((2, 3, 4)) / count
