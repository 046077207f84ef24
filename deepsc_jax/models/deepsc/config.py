"""The options of DeepSC-COVID: network, losses and stages."""

import dataclasses
from typing import ClassVar, Literal

from deepsc_jax.config.data import DataConfig
from deepsc_jax.config.options import Ints3, option, require
from deepsc_jax.config.platform import PlatformConfig
from deepsc_jax.config.training import StageConfig

POOLING = 8  # the lesion subnet pools three times by 2
LOSS_WEIGHTS = (
    "segmentation_weight",
    "classification_weight",
    "task_aware_weight",
    "dice_weight",
    "focal_weight",
    "focal_gamma",
    "focal_alpha",
    "dice_epsilon",
    "lesion_free_weight",
    "scale_supervision",
    "tversky_alpha",
    "tversky_beta",
)
# What changes the loss or its gradient, and not what the network computes.
OF_LOSSES = frozenset(
    {
        *LOSS_WEIGHTS,
        "task_aware_scales",
        "task_aware_scale_weights",
        "evidence_class",
        "lesion_gradient",
        "gradient_tiles",
    }
)


@dataclasses.dataclass(frozen=True)
class PreTraining(StageConfig):
    """A stage that trains one task alone."""

    learning_rate: float = option(1e-3, "paper: initial learning rate of the pre-training (V-A.3)")


@dataclasses.dataclass(frozen=True)
class JointTraining(StageConfig):
    """The stage that trains all three subnets together."""

    batch: int = option(4, "assumed: scans in a global batch of this stage")
    learning_rate: float = option(1e-4, "paper: initial learning rate of the joint stage")


@dataclasses.dataclass(frozen=True)
class Options:
    """The network, its ablations, the terms of its objective, and its stages."""

    NAME: ClassVar[str] = "deepsc"

    inception: Literal["inception", "plain"] = option(
        "inception", "paper: inception; plain is the ablation with one 3D convolution (V-E.1)"
    )
    inception_branches: tuple[tuple[int, ...], ...] = option(
        ((1,), (1, 3), (1, 3, 3), (1, 3, 3, 3)),
        "assumed: kernel sizes of the cascaded convolutions of each branch, branches apart by /; "
        "the paper gives the table in a supplement that is not public",
    )
    inception_channels: int = option(
        32, "assumed: output channels of an inception block, all branches together"
    )
    cross_stitch: bool = option(True, "paper: on; off is the ablation (V-E.2)")
    cross_stitch_init: tuple[float, float] = option(
        (0.9, 0.1), "assumed: initial weights on and off the diagonal of the cross-stitch unit"
    )
    lesion_channels: Ints3 = option(
        (32, 64, 128), "assumed: channels of the three down-transition units"
    )
    scale_weights: tuple[float, float, float, float] = option(
        (0.05, 0.1, 0.25, 0.6), "assumed: w_1 (coarsest) to w_4 of the intermediate segmentations"
    )
    classifier_stem_channels: int = option(
        32, "assumed: channels of the convolution before the encoder units, per input"
    )
    encoder_channels: Ints3 = option(
        (64, 128, 256), "paper: 64 in the first encoder unit; assumed: 128 and 256"
    )
    norm_groups: int = option(8, "assumed: groups of every group normalisation")
    segmentation_weight: float = option(1.0, "assumed: lambda_seg")
    classification_weight: float = option(1.0, "assumed: lambda_cls")
    task_aware_weight: float = option(10.0, "paper: lambda_ta, the best of the sweep (Fig. 9)")
    task_aware_scales: Literal["multi", "single"] = option(
        "multi", "paper: multi; single is the ablation of Table III, (S_3, M_1) alone"
    )
    task_aware_scale_weights: Literal["uniform", "w"] = option(
        "uniform", "assumed: uniform; w weighs each scale by its scale_weights"
    )
    evidence_class: Literal["predicted", "label"] = option(
        "predicted", "paper: evidence masks of the predicted class; label is an option of ours"
    )
    dice_weight: float = option(1.0, "assumed: beta_1")
    focal_weight: float = option(1.0, "assumed: beta_2")
    focal_gamma: float = option(2.0, "assumed: focusing exponent of the focal loss")
    focal_alpha: float = option(0.75, "assumed: weight of lesion voxels in the focal loss")
    dice_epsilon: float = option(1e-5, "assumed: smoothing of numerator and denominator of Dice")
    lesion_free_weight: float = option(
        1.0, "assumed: weight of the cross-entropy over the lungs of a scan without lesions"
    )
    scale_supervision: float = option(
        1.0,
        "assumed: weight of the mean loss of S_1 to S_4 by themselves in the segmentation stage; "
        "0 for none, as in the paper",
    )
    tversky_alpha: float = option(
        0.5,
        "paper: 0.5, Dice; assumed: otherwise Tversky's weight of false positives (logged as dice)",
    )
    tversky_beta: float = option(
        0.5,
        "paper: 0.5, Dice; assumed: otherwise Tversky's weight of false negatives (logged as dice)",
    )
    lesion_gradient: Literal["full", "stopped"] = option(
        "full",
        "assumed: full; stopped keeps the classifier's gradient out of the lesions it is given",
    )
    gradient_tiles: int = option(
        0, "assumed: tiles of a scan that carry gradient in the joint stage; 0 for all"
    )
    segmentation: PreTraining = dataclasses.field(default_factory=PreTraining)
    classification: PreTraining = dataclasses.field(default_factory=PreTraining)
    joint: JointTraining = dataclasses.field(default_factory=JointTraining)

    def __post_init__(self) -> None:
        self._check_network()
        self._check_losses()

    def _check_network(self) -> None:
        require(self.norm_groups >= 1, f"norm_groups is {self.norm_groups}: give at least 1")
        branches = len(self.inception_branches)
        require(
            branches > 0 and all(self.inception_branches),
            "inception_branches is empty: give at least one kernel in each branch",
        )
        require(
            all(k > 0 and k % 2 == 1 for branch in self.inception_branches for k in branch),
            f"inception_branches is {self.inception_branches}: kernel sizes must be odd",
        )
        require(
            self.inception_channels % branches == 0,
            f"inception_channels is {self.inception_channels}: give a multiple of the "
            f"{branches} branches",
        )
        widths = {
            "inception_channels": (self.inception_channels,),
            "lesion_channels": self.lesion_channels,
            "classifier_stem_channels": (self.classifier_stem_channels,),
            "encoder_channels": self.encoder_channels,
        }
        for name, channels in widths.items():
            require(
                all(c > 0 and c % self.norm_groups == 0 for c in channels),
                f"{name} is {channels}: give multiples of norm_groups = {self.norm_groups}",
            )

    def _check_losses(self) -> None:
        for name in LOSS_WEIGHTS:
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value:g}: it must not be negative")
        require(self.focal_alpha <= 1, f"focal_alpha is {self.focal_alpha:g}: it must be <= 1")
        require(
            self.tversky_alpha + self.tversky_beta > 0,
            "tversky_alpha and tversky_beta are 0: give at least one above 0, or the loss is 0",
        )
        require(
            self.gradient_tiles >= 0,
            f"gradient_tiles is {self.gradient_tiles}: it must not be negative",
        )

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples."""
        return POOLING

    def widened(self, factor: int) -> "Options":
        """The same network with `factor` times its channels."""
        first, second, third = self.lesion_channels
        one, two, three = self.encoder_channels
        return dataclasses.replace(
            self,
            inception_channels=self.inception_channels * factor,
            lesion_channels=(first * factor, second * factor, third * factor),
            classifier_stem_channels=self.classifier_stem_channels * factor,
            encoder_channels=(one * factor, two * factor, three * factor),
        )

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        """Refuse tiles, slices and devices that this network cannot work with.

        Raises:
          ValueError: naming the option.
        """
        space = platform.space
        require(
            data.mask == "lungs",
            f"mask is {data.mask}: this network sees the lungs alone: give lungs",
        )
        require(
            all(t % POOLING == 0 for t in data.tile),
            f"tile is {data.tile}: each side must be a positive multiple of {POOLING}, because the "
            "lesion subnet pools three times by 2",
        )
        require(
            space == 1 or data.tile[0] % (POOLING * space) == 0,
            f"tile depth is {data.tile[0]}: with space = {space} it must be a multiple of "
            f"{POOLING * space}, or pooling by {POOLING} would gather it from other devices",
        )
        require(
            data.slices % space == 0,
            f"slices is {data.slices}: give a multiple of space = {space}, over whose devices they "
            "are split",
        )
        reach = max(k for branch in self.inception_branches for k in branch) // 2
        require(
            space == 1 or data.slices // space >= reach,
            f"slices is {data.slices}: each of space = {space} devices has "
            f"{data.slices // space} of them, and kernels reach {reach} to each side: give at "
            f"least {reach * space}",
        )
        require(
            space == 1 or platform.conv_form not in ("sliced", "folded", "direct"),
            f"conv_form is {platform.conv_form} and space is {space}: depth as the batch would "
            "gather what is split over devices: use native, banded or auto",
        )
        counts = data.tile_counts(data.depth_bucket)
        tiles = counts[0] * counts[1] * counts[2]
        require(
            self.gradient_tiles <= tiles,
            f"gradient_tiles is {self.gradient_tiles}: a depth bucket of {data.depth_bucket} "
            f"slices holds {tiles} tiles; give 0 for all of them",
        )
