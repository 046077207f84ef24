"""The classification subnet and its evidence masks (paper, IV-D)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.deepsc.inception import ConvNorm, convolution
from reference.deepsc.lungs import LungNorm, coarser, mean


class Encoder(nn.Module):
    """Residual unit of two convolutions; the first has the in-plane stride (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int):
        super().__init__()
        self.first = ConvNorm(inputs, outputs, groups, stride)
        self.conv = convolution(outputs, outputs, 3)
        self.norm = LungNorm(groups, outputs)
        self.shortcut: nn.ModuleList | None = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.ModuleList(
                [convolution(inputs, outputs, 1, stride), LungNorm(groups, outputs)]
            )

    def forward(self, x: Tensor, lungs: Tensor) -> Tensor:
        """`lungs` on the result's grid."""
        y = self.norm(self.conv(self.first(x, lungs)), lungs)
        if self.shortcut is not None:
            conv, norm = self.shortcut
            x = norm(conv(x), lungs)
        return F.relu(x + y)


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

    def forward(
        self, features: Tensor, lesions: Tensor, lungs: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, maps, and the lungs on the grid of each map."""
        lungs2 = coarser(lungs, (1, 2, 2))
        lungs4 = coarser(lungs2, (1, 2, 2))
        x = torch.cat([self.stem(features, lungs), self.lesion_stem(lesions) * lungs], dim=1)
        f1 = self.encoder1(x, lungs)
        f2 = self.encoder2(f1, lungs2)
        f3 = self.encoder3(f2, lungs4)
        maps, inside = [f1, f2, f3], [lungs, lungs2, lungs4]
        pooled = torch.cat([mean(m, i) for m, i in zip(maps, inside, strict=True)], dim=1)
        return self.linear(pooled), maps, inside

    def activation_maps(self, maps: list[Tensor], classes: Tensor) -> list[Tensor]:
        """sum_k w_k^c F_k of the class of each scan: `(batch, slices, height, width)` per unit."""
        weights = self.linear.weight[classes].split([m.shape[1] for m in maps], dim=1)
        return [torch.einsum("bk,bkthw->bthw", w, m) for w, m in zip(weights, maps, strict=True)]

    def evidence(self, maps: list[Tensor], lungs: list[Tensor], classes: Tensor) -> list[Tensor]:
        """M_1, M_2, M_3: what of the map is above its mean over the lungs, over its maximum.

        The maximum carries no gradient, the mean does.
        """
        masks = []
        for activation, inside in zip(self.activation_maps(maps, classes), lungs, strict=True):
            average = mean(activation[:, None], inside)[..., None, None]
            above = F.relu(activation - average) * inside[:, 0]
            highest = above.detach().amax((1, 2, 3), keepdim=True)
            masks.append(above / highest.clamp(min=1e-6))
        return masks
