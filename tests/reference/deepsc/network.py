"""The joint network (paper, Figure 2), one scan at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepsc_jax.config import Config
from deepsc_jax.models.deepsc.config import Options
from reference.deepsc.classifier import Classifier
from reference.deepsc.cross_stitch import CrossStitch
from reference.deepsc.geometry import Grid, resample, slice_grid, tile_grid
from reference.deepsc.inception import Inception, Plain
from reference.deepsc.lesion import Lesion
from reference.training import standardise


def options_of(config: Config) -> Options:
    """DeepSC's own options."""
    assert isinstance(config.model, Options)
    return config.model


@dataclass
class Tile:
    """What is found in a tile of `n` real slices."""

    index: int
    origin: tuple[int, int, int]
    lesion: Tensor
    """S (n, height, width)."""
    scales: list[Tensor]
    """S_1 (1/8) to S_4 (full)."""


@dataclass
class Output:
    """What is found in a scan; `logits (1, class)` and `maps` where the stage has them."""

    tiles: list[Tile]
    logits: Tensor | None = None
    maps: list[Tensor] | None = None


class DeepSC(nn.Module):
    """`stage` chooses one task alone, with zeros for the classifier's lesions, or both joined."""

    def __init__(self, config: Config):
        super().__init__()
        model, self.config = options_of(config), config
        features, groups = model.inception_channels, model.norm_groups
        self.inception_seg = self.block(1)
        self.inception_cls = self.block(2)
        self.cross_stitch = CrossStitch(model.cross_stitch, *model.cross_stitch_init)
        self.lesion = Lesion(features, model.lesion_channels, groups, model.scale_weights)
        self.classifier = Classifier(
            features,
            model.classifier_stem_channels,
            model.encoder_channels,
            groups,
            len(config.data.classes),
        )

    def block(self, stride: int) -> nn.Module:
        model = options_of(self.config)
        branches = model.inception_branches
        channels, groups = model.inception_channels, model.norm_groups
        if model.inception == "plain":
            return Plain(1, max(map(max, branches)), channels, groups, stride)
        return Inception(1, branches, channels, groups, stride)

    def forward(
        self, scan: dict[str, Tensor], stage: str, gradient_tiles: int | None = None
    ) -> Output:
        """Run a scan through `stage`.

        Args:
          scan: `tiles (K, d, h, w)`, their `origins (K, 3)`, `slices (T, H, W)`, `depth ()`; what
            of a tile lies past the depth is not read.
          stage: `segmentation`, `classification` or `joint`.
          gradient_tiles: only the first so many tiles carry gradient.
        """
        depth = int(scan["depth"])
        if stage == "segmentation":
            return Output([self.tile(k, *t)[0] for k, t in enumerate(real_tiles(scan)) if t])
        features = self.inception_cls(standardise(scan["slices"], self.config)[None, None])
        lesions = torch.zeros_like(features[:, :1])
        if stage == "classification":
            return Output([], *self.classifier(features, lesions))

        (_, _), (cl, cc) = self.cross_stitch.weights
        grid = slice_grid(depth, self.config.data.slices, self.config.data.working_size, 2)
        shared, tiles = torch.zeros_like(features), []
        for k, values_and_origin in enumerate(real_tiles(scan)):
            if values_and_origin is None:
                continue
            carries = gradient_tiles is None or k < gradient_tiles
            with torch.set_grad_enabled(carries and torch.is_grad_enabled()):
                tile, tile_features, where = self.tile(k, *values_and_origin, features, grid)
                tiles.append(tile)
                seen = resample(tile_features, where, grid)
                found = resample(tile.lesion[None, None], where, grid)
            shared, lesions = shared + seen, lesions + found
        return Output(tiles, *self.classifier(cl * shared + cc * features, lesions))

    def tile(
        self,
        index: int,
        values: Tensor,
        origin: tuple[int, int, int],
        features: Tensor | None = None,
        grid: Grid | None = None,
    ) -> tuple[Tile, Tensor, Grid]:
        """Segment a tile; joined by F_c (`features`, on `grid`), if given. Also F_s, and where."""
        where = tile_grid(origin, (len(values), values.shape[1], values.shape[2]))
        tile_features = mixed = self.inception_seg(standardise(values, self.config)[None, None])
        if features is not None and grid is not None:
            (ll, lc), _ = self.cross_stitch.weights
            mixed = ll * tile_features + lc * resample(features, grid, where)
        lesion, scales = self.lesion(mixed)
        return Tile(index, origin, lesion[0, 0], [s[0, 0] for s in scales]), tile_features, where


def real_tiles(scan: dict[str, Tensor]) -> list[tuple[Tensor, tuple[int, int, int]] | None]:
    """Each tile cut to the slices its scan has, with its origin; None if it has none."""
    depth, tiles = int(scan["depth"]), []
    for tile, corner in zip(scan["tiles"], scan["origins"].tolist(), strict=True):
        slices = depth - corner[0]
        tiles.append((tile[:slices], tuple(corner)) if slices > 0 else None)
    return tiles
