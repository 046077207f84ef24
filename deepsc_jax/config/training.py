"""How a network is trained, whichever it is, and the options of a stage."""

import dataclasses
import re
from typing import Literal

from deepsc_jax.config.options import option, require

# Options of `TrainConfig` that change no number of a step: what is kept in memory, and how often
# something is written or validated. A run may go on with others.
CHANGES_NO_STEP = ("cache_mib", "log_every", "watch_every", "evaluate_every", "checkpoint_every")
MAY_BE_ZERO = ("seed", "cache_mib", "warmup_steps", "rate_batch", "watch_every")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The options of one training stage; models change the defaults and say where they are from."""

    steps: int = option(20000, "assumed: optimizer steps of this stage")
    batch: int = option(8, "assumed: scans in a global batch of this stage")
    learning_rate: float = option(1e-3, "assumed: initial learning rate of this stage")

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}: it must be at least 1")
        rate = self.learning_rate
        require(rate >= 0, f"learning_rate is {rate:g}: it must not be negative")


@dataclasses.dataclass(frozen=True)
class SgdConfig(StageConfig):
    """The options of a stage that is trained by SGD with momentum, a warm-up and steps."""

    learning_rate: float = option(1e-2, "paper: initial learning rate of this stage")
    momentum: float = option(0.9, "code: momentum of SGD")
    weight_decay: float = option(
        1e-4, "code: times every parameter, biases and norms too, added to its gradient"
    )
    warmup_steps: int = option(
        0, "assumed: steps in which the rate rises linearly from a tenth to all of it"
    )
    decay_every: int = option(10000, "assumed: steps after which the rate is multiplied by `decay`")
    decay: float = option(0.1, "paper: what the rate is multiplied by, again and again")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decay_every >= 1, f"decay_every is {self.decay_every}: it must be at least 1")
        require(self.momentum < 1, f"momentum is {self.momentum:g}: it must be below 1")
        for name in ("momentum", "weight_decay", "warmup_steps", "decay"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value:g}: it must not be negative")


@dataclasses.dataclass(frozen=True)
class Plateau:
    """When a learning rate is reduced: where the training loss no longer falls.

    Attributes:
      factor: of a reduction.
      window: steps over which the loss is averaged, such as an epoch.
      patience: windows without improvement, after which the rate is reduced.
      min_delta: by less than this a loss is not improved.
      cooldown: windows after a reduction that do not count against patience.
      floor: the lowest rate.
    """

    factor: float
    window: int
    patience: int
    min_delta: float
    cooldown: int
    floor: float

    def __post_init__(self) -> None:
        require(0 < self.factor < 1, f"plateau_factor is {self.factor:g}: give one between 0 and 1")
        for name, least in (("window", 1), ("patience", 1), ("cooldown", 0), ("floor", 0)):
            value = getattr(self, name)
            require(value >= least, f"plateau_{name} is {value:g}: give at least {least}")
        require(self.min_delta > 0, f"plateau_min_delta is {self.min_delta:g}: it must be above 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What all stages of all models share."""

    seed: int = option(0, "assumed: seed of initial weights, data order and augmentation")
    fold: str = option(
        "",
        "paper: I/K of cross-validation inside the training set (V-A.1, K = 10): patients of "
        "training and validation are split anew, fold I, from 0, being validation; assumed: by a "
        "hash of the patient, class by class; empty for the splits as they are",
    )
    optimizer: Literal["adam", "sgd"] = option(
        "adam",
        "paper: adam (V-A.3); assumed: or sgd, with Nesterov's momentum; a model whose stages have "
        "an SGD of their own takes no notice",
    )
    momentum: float = option(0.9, "assumed: momentum of sgd")
    adam_b1: float = option(0.9, "paper: first-order momentum of Adam")
    adam_b2: float = option(0.999, "paper: second-order momentum of Adam")
    adam_eps: float = option(1e-8, "assumed: epsilon of Adam, torch's default")
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "paper: linear decay of the learning rate (V-A.3); assumed: to 0"
    )
    warmup_steps: int = option(
        0, "assumed: steps in which the learning rate rises from 0; the paper has none"
    )
    rate_batch: int = option(
        0,
        "assumed: global batch for which learning rates are given, scaled with the actual one; 0, "
        "as in the paper, leaves them",
    )
    weight_decay: float = option(
        0.0, "assumed: decoupled decay of kernels (AdamW) a step and rate; 0, Adam, as in the paper"
    )
    clip_norm: float = option(
        0.0, "assumed: longest gradient that is not shortened; 0 for any, as in the paper"
    )
    average_decay: float = option(
        0.0,
        "assumed: decay of the moving average of the parameters that is validated and predicts; 0, "
        "as in the paper, for the parameters themselves",
    )
    tiles_per_scan: int = option(2, "assumed: tiles cut at random from a scan")
    foreground: float = option(
        0.5, "assumed: share of random tiles that are centred on a lesion voxel"
    )
    flip_probability: float = option(0.5, "assumed: chance of a left-right flip")
    intensity_shift: float = option(0.02, "assumed: extent of a random shift of [0, 1] values")
    intensity_scale: float = option(0.05, "assumed: extent of a random scale of [0, 1] values")
    mirror_axes: tuple[Literal["depth", "height", "width"], ...] = option(
        ("width",), "assumed: axes along which a scan is mirrored, each with flip_probability"
    )
    brightness: tuple[float, float] = option(
        (1.0, 1.0),
        "assumed: least and largest factor of z-scores (--mask=none), evenly between; 1,1 for none",
    )
    contrast: tuple[float, float] = option(
        (1.0, 1.0),
        "assumed: least and largest contrast, as often below 1 as above, about intensity_mean, or "
        "with --mask=none about a tile's mean and within its extremes; 1,1 for none",
    )
    gamma: tuple[float, float] = option(
        (1.0, 1.0),
        "assumed: least and largest exponent of [0, 1] values, as often below 1 as above; with "
        "--mask=none of a tile's, scaled by its extremes, whose mean and deviation stay; 1,1 for "
        "none",
    )
    noise: float = option(
        0.0,
        "assumed: largest standard deviation of noise of [0, 1] values, or with --mask=none of "
        "z-scores; variances are drawn evenly",
    )
    blur_mm: float = option(
        0.0, "assumed: largest standard deviation of a random blur; beyond 4 voxels it is cut off"
    )
    coarse_mm: float = option(
        0.0, "assumed: largest voxel, on each axis, of a random lower resolution"
    )
    rotation_degrees: float = option(
        0.0, "assumed: largest random turn about the body's axis, at most 45"
    )
    tilt_degrees: float = option(
        0.0,
        "assumed: largest random turn about each of the other axes, at most 45; none in a stage "
        "that reads sampled slices alone",
    )
    zoom: tuple[float, float] = option(
        (1.0, 1.0),
        "assumed: least and largest change of size, as often below 1 as above; 1,1 for none",
    )
    elastic_mm: float = option(
        0.0, "assumed: standard deviation of the random displacement of each control point"
    )
    elastic_distance_mm: float = option(60.0, "assumed: distance of these control points")
    lung_rim_mm: float = option(
        0.0,
        "assumed: largest random growth, with soft tissue in it, or loss of the lung mask, at most "
        "4 voxels",
    )
    change_probability: float = option(
        0.5,
        "assumed: chance of each of these changes, from brightness on, but lung_rim_mm, which "
        "begins at 0",
    )
    batch_norm: Literal["global", "local"] = option(
        "global",
        "assumed: whose statistics normalise in training, of networks with batch norm: the whole "
        "batch's, or local, each device's own scans'; local saves an all-reduce a norm, and then "
        "the result depends on the number of devices, which must stay as it was",
    )
    cache_mib: int = option(1024, "assumed: MiB of decoded chunks kept in memory")
    log_every: int = option(10, "assumed: steps between two lines of metrics.jsonl")
    watch_every: int = option(
        0,
        "assumed: steps between two looks at each loss term's gradient, which take as many more "
        "backward passes; above 0, more is said of validation as well. It changes no number",
    )
    evaluate_every: int = option(500, "assumed: steps between two evaluations on validation")
    checkpoint_every: int = option(500, "assumed: steps between two checkpoints")
    keep: Literal["best", "last"] = option(
        "best",
        "assumed: which checkpoint of a stage predicts, and starts the next stage: the best on "
        "validation, or the last",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            if field.type is int and field.name not in MAY_BE_ZERO:
                require(value >= 1, f"{field.name} is {value}: it must be at least 1")
            if not isinstance(value, str | tuple):
                require(value >= 0, f"{field.name} is {value}: it must not be negative")
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.fold or "0/2")
        require(
            match is not None and int(match[1]) < int(match[2]) > 1,
            f"fold is {self.fold}: give I/K with I from 0 to K - 1 and K of 2 or more, such as 0/5",
        )
        for name in ("adam_b1", "adam_b2", "average_decay"):
            value = getattr(self, name)
            require(value < 1, f"{name} is {value:g}: it must be below 1")
        for name in ("rotation_degrees", "tilt_degrees"):
            value = getattr(self, name)
            require(value <= 45, f"{name} is {value:g}: give at most 45")
        for name in ("brightness", "contrast", "gamma", "zoom"):
            low, high = getattr(self, name)
            require(
                0 < low <= 1 <= high,
                f"{name} is {low:g},{high:g}: give a factor above 0 of at most 1, and one of at "
                "least 1",
            )
        axes = self.mirror_axes
        require(len(set(axes)) == len(axes), f"mirror_axes is {','.join(axes)}: give each once")
        distance = self.elastic_distance_mm
        require(distance > 0, f"elastic_distance_mm is {distance:g}: give one above 0")
        for name in ("foreground", "flip_probability", "change_probability"):
            value = getattr(self, name)
            require(value <= 1, f"{name} is {value:g}: it is a share, at most 1")

    @property
    def folds(self) -> tuple[int, int] | None:
        """The number of the fold that is validation, and how many there are; None without folds."""
        index, _, count = self.fold.partition("/")
        return (int(index), int(count)) if count else None
