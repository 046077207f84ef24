"""The 3D lesion subnet and its segmentation generator (paper, IV-C)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.deepsc.inception import ConvNorm
from reference.deepsc.lungs import coarser


class Transition(nn.Sequential):
    """A transition unit at one resolution: two convolutions."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__(ConvNorm(inputs, outputs, groups), ConvNorm(outputs, outputs, groups))

    def forward(self, x: Tensor, lungs: Tensor) -> Tensor:
        for unit in self:
            x = unit(x, lungs)
        return x


class Lesion(nn.Module):
    """Three down- and three up-transition units; returns S and (S_1, ..., S_4), coarsest first.

    Height and width are multiples of 8. Depth is any: a last slice alone pools alone, and a
    deconvolution's result is cut to the depth of the skip that it joins.
    """

    def __init__(
        self,
        inputs: int,
        channels: tuple[int, int, int],
        groups: int,
        scale_weights: tuple[float, ...],
    ):
        super().__init__()
        c1, c2, c3 = channels
        self.down1 = Transition(inputs, c1, groups)
        self.down2 = Transition(c1, c2, groups)
        self.down3 = Transition(c2, c3, groups)
        self.deconv1 = deconvolution(c3, c3)
        self.deconv2 = deconvolution(c3, c2)
        self.deconv3 = deconvolution(c2, c1)
        self.up1 = Transition(2 * c3, c3, groups)
        self.up2 = Transition(2 * c2, c2, groups)
        self.up3 = Transition(2 * c1, c1, groups)
        self.segmentation1 = nn.Conv3d(c3, 1, 1)
        self.segmentation2 = nn.Conv3d(c3, 1, 1)
        self.segmentation3 = nn.Conv3d(c2, 1, 1)
        self.segmentation4 = nn.Conv3d(c1, 1, 1)
        self.scale_weights = scale_weights

    def forward(self, x: Tensor, lungs: Tensor) -> tuple[Tensor, list[Tensor]]:
        lungs2 = coarser(lungs)
        lungs4 = coarser(lungs2)
        lungs8 = coarser(lungs4)
        full = self.down1(x, lungs)
        half = self.down2(pool(full), lungs2)
        quarter = self.down3(pool(half), lungs4)
        bottom = pool(quarter)
        x1 = self.up1(join(quarter, self.deconv1(bottom), lungs4), lungs4)
        x2 = self.up2(join(half, self.deconv2(x1), lungs2), lungs2)
        x3 = self.up3(join(full, self.deconv3(x2), lungs), lungs)
        logits = [
            self.segmentation1(bottom),
            self.segmentation2(x1),
            self.segmentation3(x2),
            self.segmentation4(x3),
        ]
        inside = (lungs8, lungs4, lungs2, lungs)
        scales = [torch.sigmoid(s) * m for s, m in zip(logits, inside, strict=True)]
        return combine(scales, self.scale_weights) * lungs, scales


def deconvolution(inputs: int, outputs: int) -> nn.ConvTranspose3d:
    """Twice the resolution along all three axes."""
    return nn.ConvTranspose3d(inputs, outputs, kernel_size=2, stride=2, bias=False)


def join(skip: Tensor, x: Tensor, lungs: Tensor) -> Tensor:
    """The skip connection, and `x` inside the lungs, cut to its depth."""
    return torch.cat([skip, x[:, :, : skip.shape[2]] * lungs], dim=1)


def pool(x: Tensor) -> Tensor:
    """Maximum over 2x2x2, ties sharing the gradient; activations are >= 0, so 0 pads odd depth."""
    x = F.pad(x, (0, 0, 0, 0, 0, x.shape[2] % 2))
    batch, channels, depth, height, width = x.shape
    blocks = x.reshape(batch, channels, depth // 2, 2, height // 2, 2, width // 2, 2)
    return blocks.amax(dim=(3, 5, 7))


def combine(scales: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """S = sum_i w_i Up(S_i) (paper, equation 3), at the depth of S_4."""
    whole = torch.zeros_like(scales[-1])
    for factor, weight, part in zip((8, 4, 2, 1), weights, scales, strict=True):
        up = F.interpolate(part, scale_factor=factor, mode="trilinear", align_corners=False)
        whole = whole + weight * up[:, :, : whole.shape[2]]
    return whole
