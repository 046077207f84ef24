"""CNNRF (Liang et al. 2021, Fig. 3b and 6d)."""

from torch import Tensor, nn

from deepsc_jax.models.cnncf.config import RegressorOptions
from reference.cnncf.blocks import Stage, Stem


class Regressor(nn.Module):
    """Three linear layers; a convolution joins after the second."""

    def __init__(self, features: int, options: RegressorOptions, indicators: int):
        super().__init__()
        first, second = options.hidden
        self.linear1 = nn.Linear(features, first)
        self.linear2 = nn.Linear(first, second)
        self.skip = nn.Conv2d(features, second, 1, bias=False)
        self.skip_norm = nn.BatchNorm2d(second)
        self.linear3 = nn.Linear(second, indicators)

    def forward(self, pixel: Tensor) -> Tensor:
        vector = pixel.flatten(1)
        skip = self.skip_norm(self.skip(pixel)).relu().flatten(1)
        return self.linear3(self.linear2(self.linear1(vector)) + skip)


class CNNRF(nn.Module):
    """Patches (batch, 3, height, width) to indicators."""

    def __init__(self, options: RegressorOptions, indicators: int):
        super().__init__()
        self.stem = Stem(options.stem)
        self.stage2 = Stage(options.stem, options.widths)
        self.regressor = Regressor(options.widths[-1], options, indicators)

    def forward(self, x: Tensor) -> Tensor:
        return self.regressor(nn.functional.adaptive_avg_pool2d(self.stage2(self.stem(x)), 1))
