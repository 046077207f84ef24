"""The configuration: frozen, validated dataclasses, of whose fields `program` makes flags.

Every hyper-parameter's help begins with its origin: `paper:` where the DeepSC-COVID text states the
value, `assumed:` where the choice is ours. A combination that cannot work is refused when the flags
are parsed.
"""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json

CLASSES = ("covid-19", "cap", "non-pneumonia")
NON_PNEUMONIA = CLASSES.index("non-pneumonia")
POOLING = 8  # the lesion subnet pools three times by 2

Ints3 = tuple[int, int, int]
Stage = Literal["segmentation", "classification", "joint"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default and the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": text})


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a scan becomes before it reaches the network."""

    intensity: Literal["hu", "unit"] = option(
        "hu", "assumed: hu for CT numbers; unit for 8-bit or [0, 1] images, which are only scaled"
    )
    hu_window: tuple[float, float] = option(
        (-1400.0, 200.0), "paper: CT numbers are clipped to this range and scaled to [0, 1] (V-A)"
    )
    working_spacing_mm: tuple[float, float, float] = option(
        (0.0, 0.0, 0.0),
        "paper: 0, slices as they come. assumed: > 0 resamples that axis (depth, height, width)",
    )
    working_size: tuple[int, int] = option(
        (512, 512), "paper: 512,512: height and width of the grid the network sees"
    )
    tile: Ints3 = option(
        (64, 128, 128), "assumed: depth, height, width of the non-overlapping tiles"
    )
    slices: int = option(64, "assumed: T, the slices sampled for classification")
    depth_bucket: int = option(64, "assumed: depths are padded to a multiple of this many slices")

    def __post_init__(self) -> None:
        low, high = self.hu_window
        _require(low < high, f"hu_window is {low:g},{high:g}: give the lower bound first")
        _require(
            all(s >= 0 for s in self.working_spacing_mm),
            f"working_spacing_mm is {self.working_spacing_mm}: give 0 (as it comes) or millimetres",
        )
        depth, height, width = self.tile
        _require(
            all(t > 0 and t % POOLING == 0 for t in self.tile),
            f"tile is {self.tile}: each side must be a positive multiple of {POOLING}, "
            "because the lesion subnet pools three times by 2",
        )
        rows, columns = self.working_size
        _require(
            rows > 0 and columns > 0, f"working_size is {self.working_size}: give positive sizes"
        )
        _require(
            rows % height == 0 and columns % width == 0,
            f"no tile of {height}x{width} fits the working grid of {rows}x{columns} a whole number "
            "of times: choose a tile that divides working_size",
        )
        _require(self.slices >= 1, f"slices is {self.slices}: at least 1 slice is needed")
        _require(
            self.depth_bucket > 0 and self.depth_bucket % depth == 0,
            f"depth_bucket is {self.depth_bucket}: give a multiple of the tile depth {depth}",
        )

    def bucket(self, depth: int) -> int:
        """The padded depth, in slices, of a scan of `depth` slices."""
        return -(-depth // self.depth_bucket) * self.depth_bucket

    def tile_counts(self, depth: int) -> Ints3:
        """Tiles along depth, height and width of a scan of `depth` slices."""
        return (
            -(-depth // self.tile[0]),
            self.working_size[0] // self.tile[1],
            self.working_size[1] // self.tile[2],
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and its ablations."""

    intensity_mean: float = option(
        0.36, "assumed: of [0, 1] values inside lungs, subtracted there; 0 for the paper's input"
    )
    intensity_sd: float = option(
        0.1, "assumed: of [0, 1] values inside lungs, divided by there; 1 for the paper's input"
    )
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

    def __post_init__(self) -> None:
        _require(self.intensity_sd > 0, f"intensity_sd is {self.intensity_sd:g}: give one above 0")
        _require(self.norm_groups >= 1, f"norm_groups is {self.norm_groups}: give at least 1")
        branches = len(self.inception_branches)
        _require(
            branches > 0 and all(self.inception_branches),
            "inception_branches is empty: give at least one kernel in each branch",
        )
        _require(
            all(k > 0 and k % 2 == 1 for branch in self.inception_branches for k in branch),
            f"inception_branches is {self.inception_branches}: kernel sizes must be odd",
        )
        _require(
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
            _require(
                all(c > 0 and c % self.norm_groups == 0 for c in channels),
                f"{name} is {channels}: give multiples of norm_groups = {self.norm_groups}",
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The terms of the objective and their weights."""

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
    tversky_alpha: float = option(
        0.5,
        "paper: 0.5, Dice; assumed: otherwise Tversky's weight of false positives (logged as dice)",
    )
    tversky_beta: float = option(
        0.5,
        "paper: 0.5, Dice; assumed: otherwise Tversky's weight of false negatives (logged as dice)",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                _require(value >= 0, f"{field.name} is {value:g}: it must not be negative")
        _require(self.focal_alpha <= 1, f"focal_alpha is {self.focal_alpha:g}: it must be <= 1")
        _require(
            self.tversky_alpha + self.tversky_beta > 0,
            "tversky_alpha and tversky_beta are 0: give at least one above 0, or the loss is 0",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The two training stages."""

    seed: int = option(0, "assumed: seed of initial weights, data order and augmentation")
    segmentation_steps: int = option(20000, "assumed: steps of the segmentation pre-training")
    classification_steps: int = option(20000, "assumed: steps of the classification pre-training")
    joint_steps: int = option(20000, "assumed: steps of the joint stage")
    segmentation_batch: int = option(8, "assumed: scans in a batch of the segmentation stage")
    classification_batch: int = option(8, "assumed: scans in a batch of the classification stage")
    joint_batch: int = option(4, "assumed: scans in a batch of the joint stage")
    learning_rate: float = option(1e-3, "paper: initial learning rate of the pre-training (V-A.3)")
    joint_learning_rate: float = option(1e-4, "paper: initial learning rate of the joint stage")
    adam_b1: float = option(0.9, "paper: first-order momentum of Adam")
    adam_b2: float = option(0.999, "paper: second-order momentum of Adam")
    adam_eps: float = option(1e-8, "assumed: epsilon of Adam, torch's default")
    tiles_per_scan: int = option(2, "assumed: tiles cut from a scan in the segmentation stage")
    foreground: float = option(
        0.5, "assumed: share of the segmentation stage's tiles that are centred on a lesion voxel"
    )
    gradient_tiles: int = option(
        0, "assumed: tiles of a scan that carry gradient in the joint stage; 0 for all"
    )
    flip_probability: float = option(0.5, "assumed: chance of a left-right flip")
    intensity_shift: float = option(0.02, "assumed: extent of a random shift of [0, 1] values")
    intensity_scale: float = option(0.05, "assumed: extent of a random scale of [0, 1] values")
    cache_mib: int = option(1024, "assumed: MiB of decoded chunks kept in memory")
    log_every: int = option(10, "assumed: steps between two lines of metrics.jsonl")
    evaluate_every: int = option(500, "assumed: steps between two evaluations on validation")
    checkpoint_every: int = option(500, "assumed: steps between two checkpoints")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("seed", "gradient_tiles", "cache_mib")
            if field.type is int and not may_be_zero:
                _require(value >= 1, f"{field.name} is {value}: it must be at least 1")
            _require(value >= 0, f"{field.name} is {value}: it must not be negative")
        for name in ("adam_b1", "adam_b2"):
            value = getattr(self, name)
            _require(value < 1, f"{name} is {value:g}: it must be below 1")
        for name in ("foreground", "flip_probability"):
            value = getattr(self, name)
            _require(value <= 1, f"{name} is {value:g}: it is a share, at most 1")

    def steps(self, stage: Stage) -> int:
        """Training steps of `stage`."""
        return getattr(self, f"{stage}_steps")

    def batch(self, stage: Stage) -> int:
        """Scans in a global batch of `stage`."""
        return getattr(self, f"{stage}_batch")


@dataclasses.dataclass(frozen=True)
class PlatformConfig:
    """How the computation is laid out; none of it changes the mathematics."""

    data: int = option(0, "assumed: devices over which the batch is split; 0 for all there are")
    space: int = option(
        1,
        "assumed: devices over which the depth of every tile is split; they reduce the kernels' "
        "gradients tile by tile: once a step where a tile is a whole scan",
    )
    shard_optimizer: bool = option(
        False, "assumed: split Adam's moments over the data axis (ZeRO-1, Rajbhandari et al. 2020)"
    )
    accumulation: int = option(
        1,
        "assumed: parts in which a device takes its scans, one after another; their gradients "
        "are summed, and reduced over devices once",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "assumed: of convolutions; auto is float32 on CPU and bfloat16 elsewhere"
    )
    conv_form: Literal["auto", "native", "banded", "sliced", "folded", "direct"] = option(
        "auto",
        "assumed: how a 3D convolution is written; auto is banded (neighbouring voxels as "
        "channels) on GPU; where depth is not split, sliced (a sum of 2D ones, of bands) on TPU "
        "and folded (2D over stacked slices) on CPU; else native. direct (CPU, JAX 0.11: oneDNN) "
        "is to be asked for: what is compiled is not kept. predict has a flag of its own",
    )
    tile_loop: Literal["auto", "fold", "scan"] = option(
        "auto", "assumed: tiles of a scan folded into the batch (CPU) or scanned (GPU, TPU)"
    )
    remat: Literal["none", "tiles", "blocks", "all"] = option(
        "tiles",
        "assumed: activations that the backward pass computes again instead of keeping: each "
        "scanned tile's, those inside blocks (inception, transition, encoder unit), both, or none",
    )

    def __post_init__(self) -> None:
        _require(self.data >= 0, f"data is {self.data}: give 0 (all devices) or a count")
        _require(self.space >= 1, f"space is {self.space}: give at least 1 device")
        _require(
            self.accumulation >= 1, f"accumulation is {self.accumulation}: give at least 1 part"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    platform: PlatformConfig = dataclasses.field(default_factory=PlatformConfig)

    def __post_init__(self) -> None:
        space = self.platform.space
        _require(
            space == 1 or self.data.tile[0] % (POOLING * space) == 0,
            f"tile depth is {self.data.tile[0]}: with space = {space} it must be a multiple of "
            f"{POOLING * space}, or pooling by {POOLING} would gather it from other devices",
        )
        _require(
            self.data.slices % space == 0,
            f"slices is {self.data.slices}: give a multiple of space = {space}, over whose devices "
            "they are split",
        )
        reach = max(k for branch in self.model.inception_branches for k in branch) // 2
        _require(
            space == 1 or self.data.slices // space >= reach,
            f"slices is {self.data.slices}: each of space = {space} devices has "
            f"{self.data.slices // space} of them, and kernels reach {reach} to each side: give at "
            f"least {reach * space}",
        )
        _require(
            space == 1 or self.platform.conv_form not in ("sliced", "folded", "direct"),
            f"conv_form is {self.platform.conv_form} and space is {space}: depth as the batch "
            "would gather what is split over devices: use native, banded or auto",
        )
        counts = self.data.tile_counts(self.data.depth_bucket)
        tiles = counts[0] * counts[1] * counts[2]
        _require(
            self.train.gradient_tiles <= tiles,
            f"gradient_tiles is {self.train.gradient_tiles}: a depth bucket of "
            f"{self.data.depth_bucket} slices holds {tiles} tiles; give 0 for all of them",
        )


SECTIONS: Mapping[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "platform": PlatformConfig,
}


def save(config: Config, path: pathlib.Path) -> None:
    """Write `config` as JSON to `path`."""
    write_json(dataclasses.asdict(config), path)


def load(path: pathlib.Path) -> Config:
    """Read what `save` wrote.

    Raises:
      InputError: it cannot be read, or a field is missing, unknown or impossible.
    """
    try:
        document = json.loads(path.read_text())
        sections = {
            name: from_document(section, document[name]) for name, section in SECTIONS.items()
        }
        return Config(**sections)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: not a configuration of this version ({error}): give the --workdir of a run "
            "of this version"
        ) from error


def from_document(section: type, document: Mapping[str, Any]) -> Any:
    """A section of the configuration from its JSON object: lists become tuples again.

    Raises:
      KeyError, TypeError, ValueError: a field is missing, unknown or impossible.
    """

    def tuples(value: Any) -> Any:
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    missing = sorted({field.name for field in dataclasses.fields(section)} - document.keys())
    if missing:
        raise KeyError(f"{', '.join(missing)} missing")
    return section(**{name: tuples(value) for name, value in document.items()})
