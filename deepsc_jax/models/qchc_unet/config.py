"""The options of QC-HC U-Net: network, ablations, loss and stage."""

import dataclasses
import itertools
from typing import ClassVar

from deepsc_jax.config.data import DataConfig, VoxelClass
from deepsc_jax.config.options import option, require
from deepsc_jax.config.platform import PlatformConfig
from deepsc_jax.config.training import Plateau, StageConfig


@dataclasses.dataclass(frozen=True)
class Training(StageConfig):
    """Its one stage."""

    steps: int = option(45000, "paper: 300 epochs of 150 iterations")
    batch: int = option(2, "paper: 2 patches; assumed: of as many scans")
    learning_rate: float = option(1e-4, "paper: initial learning rate; MIScnn's script has 1e-3")


@dataclasses.dataclass(frozen=True)
class Options:
    """The network, its ablations, its loss and when its learning rate falls."""

    NAME: ClassVar[str] = "qchc_unet"

    widths: tuple[int, ...] = option(
        (32, 64, 128, 256, 512),
        "paper: feature maps of each level, finest first; each has half the sides of the last",
    )
    voxel_classes: tuple[VoxelClass, ...] = option(
        ("background", "left_lung", "right_lung", "lesion"),
        "paper: background,left_lung,right_lung,lesion, what a voxel may be; background,lesion "
        "where the lungs are given (--mask=lungs)",
    )
    shortcut: bool = option(
        True, "paper: on, quick connection from a block's first Conv-BN to its last; off: ablation"
    )
    cascade: bool = option(
        True,
        "paper: on, an encoder block's input is concatenated to its output; off: ablation, whose "
        "first convolutions widen instead",
    )
    projection: bool = option(
        True,
        "paper: on, a decoder block's input joins through a 1x1x1 Conv-BN; off: ablation. With the "
        "three others off this is a plain 3D U-Net",
    )
    hypercolumns: bool = option(
        True,
        "paper: on, scores of every decoder level, brought to full resolution and summed; off: "
        "ablation, those of the finest alone",
    )
    hypercolumn_bottleneck: bool = option(
        False, "assumed: off; on, the lowest level has scores as well"
    )
    identity: bool = option(
        False,
        "assumed: off; on, as in DRU-net's code, an encoder block's input joins its sum as well",
    )
    bias: bool = option(
        False,
        "assumed: off, since batch norm follows every convolution; on, as in MIScnn's code, it is "
        "the same function",
    )
    upsampling_norm: bool = option(
        True,
        "code: on (DRU-net's), batch norm and ReLU follow a transposed convolution; off, as in "
        "MIScnn, which has neither but a bias",
    )
    overlap: float = option(
        0.5, "paper: share of a tile that its neighbours cover as well, in prediction"
    )
    tversky_alpha: float = option(0.5, "paper: weight of false negatives in the Tversky index")
    tversky_beta: float = option(0.5, "paper: weight of false positives in the Tversky index")
    tversky_epsilon: float = option(
        1e-6, "code: MIScnn's, added above and below the fraction of the Tversky index"
    )
    plateau_factor: float = option(0.1, "paper: of a reduction of the learning rate")
    plateau_window: int = option(
        150, "paper: steps of an epoch, over which the training loss is averaged"
    )
    plateau_patience: int = option(
        15, "code: MIScnn's, epochs without improvement after which the learning rate is reduced"
    )
    plateau_min_delta: float = option(
        1e-4, "code: MIScnn's, by less than this a loss is not improved"
    )
    plateau_cooldown: int = option(
        1, "code: MIScnn's, epochs after a reduction that do not count against patience"
    )
    plateau_floor: float = option(1e-5, "code: MIScnn's, the lowest learning rate")
    segmentation: Training = dataclasses.field(default_factory=Training)

    def __post_init__(self) -> None:
        require(
            len(self.widths) > 1 and min(self.widths) > 0,
            f"widths is {self.widths}: give at least two levels' feature maps",
        )
        require(
            not self.cascade or all(b == 2 * a for a, b in itertools.pairwise(self.widths)),
            f"widths is {self.widths}: with cascade each level works on what the one before "
            "concatenated: give each twice the one before",
        )
        require(
            not self.identity or self.cascade,
            "identity is on and cascade off: a block's input and output have other numbers of "
            "feature maps: give cascade",
        )
        require(
            not self.hypercolumn_bottleneck or self.hypercolumns,
            "hypercolumn_bottleneck is on and hypercolumns off: give both",
        )
        names = self.voxel_classes
        require(
            names[:1] == ("background",) and "lesion" in names and len(set(names)) == len(names),
            f"voxel_classes is {','.join(names)}: give background first, lesion among the others, "
            "and each once",
        )
        require(0 <= self.overlap < 1, f"overlap is {self.overlap:g}: give a share below 1")
        require(
            self.tversky_alpha >= 0 and self.tversky_beta >= 0,
            f"tversky_alpha is {self.tversky_alpha:g} and tversky_beta {self.tversky_beta:g}: "
            "neither may be negative",
        )
        require(
            self.tversky_epsilon > 0,
            f"tversky_epsilon is {self.tversky_epsilon:g}: it must be above 0",
        )
        _ = self.plateau  # which refuses what cannot be

    @property
    def plateau(self) -> Plateau:
        """When the learning rate is reduced."""
        return Plateau(
            factor=self.plateau_factor,
            window=self.plateau_window,
            patience=self.plateau_patience,
            min_delta=self.plateau_min_delta,
            cooldown=self.plateau_cooldown,
            floor=self.plateau_floor,
        )

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples."""
        return 2 ** (len(self.widths) - 1)

    def widened(self, factor: int) -> "Options":
        """The same network with `factor` times its feature maps."""
        return dataclasses.replace(self, widths=tuple(factor * w for w in self.widths))

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        """Refuse what cannot work together.

        Raises:
          ValueError: naming the option.
        """
        factor = self.tile_step
        require(
            data.mask == "none" or not {"left_lung", "right_lung"} & set(self.voxel_classes),
            f"mask is {data.mask} and voxel_classes has a lung: what is given needs not be found: "
            "give --mask=none, or voxel_classes background,lesion",
        )
        require(
            all(side % factor == 0 for side in data.tile)
            and data.tile[0] % (factor * platform.space) == 0,
            f"tile is {data.tile}: {len(self.widths)} levels need multiples of {factor}, and a "
            f"depth of {factor * platform.space} with space = {platform.space}: give such sides, "
            "or fewer widths",
        )
        require(
            platform.accumulation == 1,
            f"accumulation is {platform.accumulation}: each part would have statistics of its own "
            "in batch norms, which is another function: give 1",
        )
