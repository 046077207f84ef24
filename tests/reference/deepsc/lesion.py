"""The 3D lesion subnet and its segmentation generator (paper, IV-C)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.deepsc.inception import ConvNorm


class Transition(nn.Sequential):
    """A transition unit at one resolution: two convolutions."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__(ConvNorm(inputs, outputs, groups), ConvNorm(outputs, outputs, groups))


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

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        full = self.down1(x)
        half = self.down2(pool(full))
        quarter = self.down3(pool(half))
        bottom = pool(quarter)
        x1 = self.up1(join(quarter, self.deconv1(bottom)))
        x2 = self.up2(join(half, self.deconv2(x1)))
        x3 = self.up3(join(full, self.deconv3(x2)))
        logits = [
            self.segmentation1(bottom),
            self.segmentation2(x1),
            self.segmentation3(x2),
            self.segmentation4(x3),
        ]
        scales = [torch.sigmoid(s) for s in logits]
        return combine(scales, self.scale_weights), scales


def deconvolution(inputs: int, outputs: int) -> nn.ConvTranspose3d:
    """Twice the resolution along all three axes."""
    return nn.ConvTranspose3d(inputs, outputs, kernel_size=2, stride=2, bias=False)


def join(skip: Tensor, x: Tensor) -> Tensor:
    """The skip connection, and `x` cut to its depth."""
    return torch.cat([skip, x[:, :, : skip.shape[2]]], dim=1)


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
