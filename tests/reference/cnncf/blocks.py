"""ResBlock-A and -B (Liang et al. 2021, Fig. 6a and 6b)."""

from torch import Tensor, nn


class Stem(nn.Module):
    """The first convolution block."""

    def __init__(self, features: int):
        super().__init__()
        self.conv = nn.Conv2d(3, features, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Upper(nn.Module):
    """The branch with the pooling."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride, padding=1)
        self.conv = nn.Conv2d(channels, features, 1, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class Lower(nn.Module):
    """The branch with two convolutions."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


class Block(nn.Module):
    """Either of both: `kind` is "A" or "B"."""

    def __init__(self, kind: str, channels: int, features: int, stride: int = 2):
        super().__init__()
        self.kind = kind
        self.upper = Upper(channels, features, stride)
        self.lower = Lower(channels, features, stride)

    def forward(self, i1: Tensor, i2: Tensor) -> tuple[Tensor, Tensor]:
        total = self.upper(i1) + self.lower(i2)
        rectified = total.relu()
        return (total if self.kind == "A" else rectified), rectified


class Stage(nn.ModuleList):
    """A, A and B; each halves the sides."""

    def __init__(self, channels: int, widths: tuple[int, ...]):
        pairs = zip("AAB", (channels, *widths), widths, strict=False)
        super().__init__([Block(kind, before, after) for kind, before, after in pairs])

    def forward(self, x: Tensor) -> Tensor:
        first = second = x
        for block in self:
            first, second = block(first, second)
        return second
