"""The 3D inception block (paper, IV-B.1) and its ablation (V-E.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.deepsc.lungs import LungNorm, coarser


class Inception(nn.Module):
    """Branches of cascaded convolutions side by side, then group norm and ReLU.

    The last convolution of a branch has the in-plane `stride`. One of kernel 1 would read every
    `stride`-th pixel only: there, blocks of pixels are averaged before it instead.
    """

    def __init__(
        self,
        inputs: int,
        branches: tuple[tuple[int, ...], ...],
        channels: int,
        groups: int,
        stride: int,
    ):
        super().__init__()
        width = channels // len(branches)
        self.branches = nn.ModuleList()
        self.blocks = []
        for kernels in branches:
            last = len(kernels) - 1
            self.branches.append(
                nn.ModuleList(
                    convolution(
                        inputs if i == 0 else width,
                        width,
                        kernel,
                        stride if i == last and kernel > 1 else 1,
                    )
                    for i, kernel in enumerate(kernels)
                )
            )
            self.blocks.append(stride if kernels[-1] == 1 else 1)
        self.stride = stride
        self.norm = LungNorm(groups, channels)

    def forward(self, x: Tensor, lungs: Tensor) -> Tensor:
        coarse = coarser(lungs, (1, self.stride, self.stride))
        outputs = []
        for branch, block in zip(self.branches, self.blocks, strict=True):
            *first, last = branch.children()
            y = x
            for conv in first:
                y = conv(y) * lungs
            outputs.append(last(F.avg_pool3d(y, (1, block, block))) * coarse)
        return F.relu(self.norm(torch.cat(outputs, dim=1), coarse))


class Plain(nn.Module):
    """The ablation: one convolution, group norm, ReLU."""

    def __init__(self, inputs: int, kernel: int, channels: int, groups: int, stride: int):
        super().__init__()
        self.plain = ConvNorm(inputs, channels, groups, stride, kernel)
        self.stride = stride

    def forward(self, x: Tensor, lungs: Tensor) -> Tensor:
        return self.plain(x, coarser(lungs, (1, self.stride, self.stride)))


class ConvNorm(nn.Module):
    """Convolution, group norm, ReLU; `lungs` on the result's grid."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int = 1, kernel: int = 3):
        super().__init__()
        self.conv = convolution(inputs, outputs, kernel, stride)
        self.norm = LungNorm(groups, outputs)

    def forward(self, x: Tensor, lungs: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x), lungs))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv3d:
    """A convolution without bias that keeps the depth and divides height and width by `stride`."""
    return nn.Conv3d(
        inputs, outputs, kernel, stride=(1, stride, stride), padding=kernel // 2, bias=False
    )
