"""The classification subnet and its evidence masks (paper, IV-D)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.deepsc.inception import ConvNorm, convolution


class Encoder(nn.Module):
    """Residual unit of two convolutions; the first has the in-plane stride (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int):
        super().__init__()
        self.first = ConvNorm(inputs, outputs, groups, stride)
        self.conv = convolution(outputs, outputs, 3)
        self.norm = nn.GroupNorm(groups, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                convolution(inputs, outputs, 1, stride), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.norm(self.conv(self.first(x))))


class Classifier(nn.Module):
    """Logits and the maps f_1, f_2, f_3 from C-features and lesions on the slice grid."""

    def __init__(
        self, inputs: int, stem: int, channels: tuple[int, int, int], groups: int, classes: int
    ):
        super().__init__()
        self.stem = ConvNorm(inputs, stem, groups)
        self.lesion_stem = convolution(1, stem, 3)
        c1, c2, c3 = channels
        self.encoder1 = Encoder(2 * stem, c1, groups, stride=1)
        self.encoder2 = Encoder(c1, c2, groups, stride=2)
        self.encoder3 = Encoder(c2, c3, groups, stride=2)
        self.linear = nn.Linear(sum(channels), classes, bias=False)

    def forward(self, features: Tensor, lesions: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([self.stem(features), self.lesion_stem(lesions)], dim=1)
        f1 = self.encoder1(x)
        f2 = self.encoder2(f1)
        f3 = self.encoder3(f2)
        maps = [f1, f2, f3]
        pooled = torch.cat([m.mean(dim=(2, 3, 4)) for m in maps], dim=1)
        return self.linear(pooled), maps

    def activation_maps(self, maps: list[Tensor], classes: Tensor) -> list[Tensor]:
        """sum_k w_k^c F_k of the class of each scan: `(batch, slices, height, width)` per unit."""
        weights = self.linear.weight[classes].split([m.shape[1] for m in maps], dim=1)
        return [torch.einsum("bk,bkthw->bthw", w, m) for w, m in zip(weights, maps, strict=True)]

    def evidence(self, maps: list[Tensor], classes: Tensor) -> list[Tensor]:
        """M_1, M_2, M_3: the map about its mean, from its minimum to its maximum.

        The extremes carry no gradient, the mean does.
        """
        masks = []
        for activation in self.activation_maps(maps, classes):
            raw = activation - activation.mean((1, 2, 3), keepdim=True)
            low = raw.detach().amin((1, 2, 3), keepdim=True)
            high = raw.detach().amax((1, 2, 3), keepdim=True)
            masks.append((raw - low) / (high - low).clamp(min=1e-6))
        return masks
