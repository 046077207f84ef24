"""QC-HC U-Net and its loss in plain PyTorch, from the paper's text."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepsc_jax.config import Config
from deepsc_jax.models.qchc_unet.config import Options


def pool(x: Tensor) -> Tensor:
    """2x2x2 maximum; tied values share the gradient, as `amax` has it."""
    for axis in (2, 3, 4):
        x = x.unflatten(axis, (-1, 2)).amax(axis + 1)
    return x


class ConvNorm(nn.Module):
    def __init__(self, channels: int, features: int, kernel: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv3d(channels, features, kernel, padding=kernel // 2, bias=bias)
        self.norm = nn.BatchNorm3d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Encoder(nn.Module):
    def __init__(self, channels: int, features: int, concatenates: bool, options: Options):
        super().__init__()
        self.first = ConvNorm(channels, features, 3, options.bias)
        self.last = ConvNorm(features, features, 3, options.bias)
        self.concatenates, self.options = concatenates, options

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        y = self.last(F.relu(first))
        if self.options.shortcut:
            y = first + y
        if self.options.identity:
            y = y + x
        y = F.relu(y)
        return torch.cat([y, x], dim=1) if self.concatenates else y


class Decoder(nn.Module):
    def __init__(self, below: int, skip: int, features: int, options: Options):
        super().__init__()
        joined, normed = skip + features, options.upsampling_norm
        self.up = nn.ConvTranspose3d(below, features, 2, stride=2, bias=not normed)
        self.up_norm = nn.BatchNorm3d(features) if normed else None
        self.first = ConvNorm(joined, features, 3, options.bias)
        self.last = ConvNorm(features, features, 3, options.bias)
        self.projection = None
        if options.projection:
            self.projection = ConvNorm(joined, features, 1, options.bias)
        self.shortcut = options.shortcut

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        up = self.up(below)
        if self.up_norm is not None:
            up = F.relu(self.up_norm(up))
        z = torch.cat([skip, up], dim=1)
        first = self.first(z)
        y = self.last(F.relu(first))
        if self.shortcut:
            y = first + y
        if self.projection is not None:
            y = y + self.projection(z)
        return F.relu(y)


class QCHCUNet(nn.Module):
    """`(batch, 1, depth, height, width)` to logits of as many classes."""

    def __init__(self, options: Options):
        super().__init__()
        widths, lowest = options.widths, len(options.widths) - 1
        self.stem = ConvNorm(1, widths[0], 3, options.bias) if options.cascade else None
        self.encoder, self.decoder, self.scores = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        given = []  # the channels that each encoder block gives
        for i, features in enumerate(widths):
            channels = features if options.cascade else ([1, *widths])[i]
            concatenates = options.cascade and i < lowest
            self.encoder.append(Encoder(channels, features, concatenates, options))
            given.append(2 * features if concatenates else features)
        for i in range(lowest):
            self.decoder.append(Decoder(widths[i + 1], given[i], widths[i], options))
        levels = range(lowest) if options.hypercolumns else range(1)
        if options.hypercolumn_bottleneck:
            levels = range(lowest + 1)
        for i in levels:
            self.scores[str(i)] = nn.Conv3d(widths[i], len(options.voxel_classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if self.stem is not None:
            x = F.relu(self.stem(x))
        skips = []
        for i, block in enumerate(self.encoder):
            x = block(pool(x) if i else x)
            skips.append(x)
        features = {len(self.decoder): x}
        for i in reversed(range(len(self.decoder))):
            features[i] = x = self.decoder[i](x, skips[i])
        scores = [
            F.interpolate(score(features[int(i)]), size, mode="trilinear", align_corners=False)
            for i, score in self.scores.items()
        ]
        return torch.stack(scores).sum(dim=0)


def loss(logits: Tensor, truth: Tensor, options: Options) -> dict[str, Tensor]:
    """Of one patch: `(1, class, depth, height, width)` and `(1, depth, height, width)`."""
    alpha, beta, epsilon = options.tversky_alpha, options.tversky_beta, options.tversky_epsilon
    probability = logits.softmax(dim=1)[0]
    tversky = logits.new_zeros(())
    for c, p in enumerate(probability):
        t = (truth[0] == c).to(p.dtype)
        tp, fn, fp = (p * t).sum(), ((1 - p) * t).sum(), (p * (1 - t)).sum()
        tversky = tversky + 1 - (tp + epsilon) / (tp + alpha * fn + beta * fp + epsilon)
    entropy = F.cross_entropy(logits, truth)
    return {"tversky": tversky, "cross_entropy": entropy, "loss": tversky + entropy}


def options_of(config: Config) -> Options:
    """The network's options."""
    assert isinstance(config.model, Options)
    return config.model


def network(config: Config) -> QCHCUNet:
    """The network of a configuration."""
    return QCHCUNet(options_of(config))


timed = network


def starts(length: int, window: int) -> list[int]:
    """Where the windows of half overlap begin; the last one ends where the volume does."""
    regular = list(range(0, length - window, window // 2))
    return [*regular, length - window]


def sliding_windows(
    network: Callable[[Tensor], Tensor], volume: Tensor, window: tuple[int, int, int], fill: float
) -> Tensor:
    """The mean, over all windows that cover a voxel, of its probabilities `(class, d, h, w)`."""
    before, padding = [], []
    for side, length in zip(volume.shape, window, strict=True):
        short = max(length - side, 0)
        before.append(short // 2)
        padding.append((short // 2, short - short // 2))
    padded = F.pad(volume, [n for pair in reversed(padding) for n in pair], value=fill)
    total, count = torch.zeros(()), torch.zeros(padded.shape, dtype=volume.dtype)
    axes = [starts(side, length) for side, length in zip(padded.shape, window, strict=True)]
    for corner in itertools.product(*axes):
        box = tuple(slice(o, o + n) for o, n in zip(corner, window, strict=True))
        probability = network(padded[box][None, None]).softmax(dim=1)[0]
        if total.ndim == 0:
            total = torch.zeros((len(probability), *padded.shape), dtype=volume.dtype)
        total[:, *box] += probability
        count[box] += 1
    inside = tuple(slice(b, b + s) for b, s in zip(before, volume.shape, strict=True))
    return (total / count)[:, *inside]


def z_scores(batch: dict[str, Tensor]) -> Tensor:
    """All tiles in a row, `(N, 1, d, h, w)`; what lies beyond a scan is its minimum."""
    rows = []
    for tiles, (least, mean, deviation) in zip(batch["tiles"], batch["intensity"], strict=True):
        tiles = torch.where(tiles == 0, least, tiles)  # 0 is beyond the scan
        rows.append((tiles - mean) / (deviation + 1e-6))
    return torch.cat(rows)[:, None]


def train(
    network: nn.Module,
    config: Config,
    stage: str,
    batches: Iterable[dict[str, Tensor]],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """One step a batch; yields the means of the losses before the step, and the rate of it."""
    del class_weights
    network.train()
    model, options, of_stage = options_of(config), config.train, config.stage(stage)
    optimizer = torch.optim.Adam(
        network.parameters(),
        of_stage.learning_rate,
        (options.adam_b1, options.adam_b2),
        options.adam_eps,
    )
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=model.plateau_factor,
        patience=model.plateau_patience - 1,  # torch reduces after one more
        threshold=model.plateau_min_delta,
        threshold_mode="abs",
        cooldown=model.plateau_cooldown,
        min_lr=model.plateau_floor,
    )
    window: list[float] = []
    for batch in batches:
        logits, truths = network(z_scores(batch)), batch["classes"].flatten(0, 1)
        rows = [loss(z[None], t[None], model) for z, t in zip(logits, truths, strict=True)]
        means = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        optimizer.zero_grad()
        means["loss"].backward()
        window.append(means["loss"].item())
        if len(window) == model.plateau_window:
            schedule.step(sum(window) / len(window))
            window.clear()
        optimizer.step()
        rate = optimizer.param_groups[0]["lr"]
        yield {name: value.item() for name, value in means.items()} | {"learning_rate": rate}


def forward(
    network: nn.Module, config: Config, batch: dict[str, Tensor], stage: str
) -> dict[str, Tensor]:
    """`lesion` of all tiles, by running statistics."""
    network.eval()
    names = options_of(config).voxel_classes
    probability = network(z_scores(batch)).softmax(dim=1)[:, names.index("lesion")]
    return {"lesion": probability.reshape(batch["tiles"].shape)}


def predict(
    network: nn.Module, config: Config, volume: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The probabilities of a whole scan, but for the background's."""
    network.eval()
    shown = (volume - volume.mean()) / (volume.std(correction=0) + 1e-6)
    with torch.no_grad():
        found = sliding_windows(network, shown, config.data.tile, shown.min().item())
    names = options_of(config).voxel_classes
    return {name: found[i] for i, name in enumerate(names) if name != "background"}, None
