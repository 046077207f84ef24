"""MLPerf's 3D U-Net and its loss in plain PyTorch, with the names of MLPerf's weights."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from deepsc_jax.config import Config
from deepsc_jax.models.comparators.unet3d import Options
from reference.training import Batch, means_of, standardise, take_steps


def unit(channels: int, features: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv3d(channels, features, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.InstanceNorm3d(features, affine=True), nn.ReLU())


class Level(nn.Module):
    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1, self.conv2 = unit(channels, features, stride), unit(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Up(Level):
    def __init__(self, channels: int, features: int):
        super().__init__(2 * features, features, 1)
        self.upsample_conv = nn.Sequential(nn.ConvTranspose3d(channels, features, 2, stride=2))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        assert skip is not None
        return super().forward(torch.cat([self.upsample_conv(x), skip], dim=1))


class Head(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv3d(channels, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNet3D(nn.Module):
    """`(batch, 1, depth, height, width)` to logits of as many classes."""

    def __init__(self, widths: tuple[int, ...], classes: int):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.input_block = Level(1, widths[0], 1)
        self.downsample = nn.ModuleList(Level(a, b, 2) for a, b in pairs[:-1])
        self.bottleneck = Level(*pairs[-1], 2)
        self.upsample = nn.ModuleList(Up(b, a) for a, b in reversed(pairs))
        self.output = Head(widths[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.input_block(x)]
        for level in self.downsample:
            skips.append(level(skips[-1]))
        x = self.bottleneck(skips[-1])
        for level, skip in zip(self.upsample, reversed(skips), strict=True):
            x = level(x, skip)
        return self.output(x)


def loss(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Of one patch: `(1, class, depth, height, width)` and `(1, depth, height, width)`."""
    probability = logits.softmax(dim=1)[0, 1:]
    target = nn.functional.one_hot(truth[0], logits.shape[1]).movedim(-1, 0)[1:].to(logits.dtype)
    scores = []
    for p, t in zip(probability, target, strict=True):
        scores.append((2 * (p * t).sum() + 1e-6) / (p.sum() + t.sum() + 1e-6))
    dice = (1 - torch.stack(scores)).mean()
    entropy = nn.functional.cross_entropy(logits, truth)
    return {"dice": dice, "cross_entropy": entropy, "loss": (dice + entropy) / 2}


def network(config: Config) -> UNet3D:
    """The network of a configuration."""
    options = config.model
    assert isinstance(options, Options)
    return UNet3D(options.widths, options.classes)


timed = network


def train(
    network: nn.Module,
    config: Config,
    stage: str,
    batches: Iterable[Batch],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """One step a batch, all its tiles at once; yields the means of the losses before the step."""

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        tiles = standardise(batch["tiles"], config).flatten(0, 1)[:, None]
        truths = batch["lesions"].flatten(0, 1).long()
        logits = network(tiles)
        return means_of([loss(z[None], t[None]) for z, t in zip(logits, truths, strict=True)])

    return take_steps(network, config, stage, batches, losses_of)


def forward(
    network: nn.Module, config: Config, batch: dict[str, Tensor], stage: str
) -> dict[str, Tensor]:
    """`lesion` of all tiles."""
    tiles = standardise(batch["tiles"], config).flatten(0, 1)[:, None]
    return {"lesion": network(tiles).softmax(dim=1)[:, 1].reshape(batch["tiles"].shape)}


def predict(
    network: nn.Module, config: Config, volume: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The lesion probability of a whole preprocessed scan, tile by tile."""
    tile = config.data.tile
    sides = [-(-side // t) * t for side, t in zip(volume.shape, tile, strict=True)]
    padded = volume.new_zeros(sides)
    depth, height, width = volume.shape
    padded[:depth, :height, :width] = volume
    corners = itertools.product(*(range(0, s, t) for s, t in zip(sides, tile, strict=True)))
    lesion = torch.zeros_like(padded)
    with torch.no_grad():
        for z, y, x in corners:
            box = (slice(z, z + tile[0]), slice(y, y + tile[1]), slice(x, x + tile[2]))
            logits = network(standardise(padded[box], config)[None, None])
            lesion[box] = logits.softmax(dim=1)[0, 1]
    return {"lesion": lesion[:depth, :height, :width]}, None
