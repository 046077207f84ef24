"""The options of CNNCF."""

import dataclasses
from typing import ClassVar, Literal

from deepsc_jax.config.data import CLASSES, DataConfig
from deepsc_jax.config.options import option, require
from deepsc_jax.config.platform import PlatformConfig
from deepsc_jax.config.training import SgdConfig

PATCH_STEP = 16  # of which the sides of a patch are multiples
GROUPS = 3  # of slices, and channels of an image
TEACHERS = 4  # TS1 to TS4
GROUPS_OF_BLOCKS = 4  # of each of them


@dataclasses.dataclass(frozen=True)
class Training(SgdConfig):
    """The stage that trains it; an epoch is 286 steps, of the paper's 9,143 X-rays."""

    steps: int = option(11440, "paper: 40 epochs")
    batch: int = option(32, "code: images in a global batch")
    warmup_steps: int = option(286, "paper: a warm-up. assumed: of one epoch, from a tenth")
    decay_every: int = option(2860, "paper: the rate is divided by ten every 10 epochs")


@dataclasses.dataclass(frozen=True)
class TeacherTraining(Training):
    """The stages that train its teachers, one a teacher and fold."""

    steps: int = option(11440, "assumed: as the student's, 40 epochs")
    batch: int = option(32, "assumed: images in a global batch, as the student's")
    learning_rate: float = option(1e-2, "assumed: initial learning rate, as the student's")
    warmup_steps: int = option(286, "assumed: as the student's")
    decay_every: int = option(2860, "assumed: as the student's")
    decay: float = option(0.1, "assumed: as the student's")


@dataclasses.dataclass(frozen=True)
class Options:
    """The network, its gate, and its stage."""

    NAME: ClassVar[str] = "cnncf"

    variant: Literal["paper", "published"] = option(
        "paper", "paper: blocks A and B and a control gate. code: published, a plain residual net"
    )
    stem: int = option(64, "paper: channels of the first convolution")
    stage1_widths: tuple[int, int, int] = option(
        (64, 128, 256), "paper: stage I ends with 256 channels. assumed: those of its first blocks"
    )
    stage2_widths: tuple[int, int, int] = option(
        (256, 256, 512), "paper: stage II ends with 512 channels. assumed: of its first blocks"
    )
    published_widths: tuple[int, ...] = option(
        (64, 128, 256, 512), "code: channels of each group of blocks of the published variant"
    )
    published_blocks: tuple[int, ...] = option(
        (2, 1, 2, 1), "code: blocks of each group of the published variant"
    )
    published_kernels: Literal["basic", "bottleneck"] = option(
        "basic", "code: two convolutions a block of the published variant, or three, as TS3 and TS4"
    )
    mix: Literal["grouped", "full"] = option(
        "grouped",
        "paper: CT becomes three channels by trainable 1x1 kernels. assumed: one for each third of "
        "the slices; code: full, where each sees all slices",
    )
    pseudo_colour: Literal["none", "jet"] = option(
        "none", "code: none, an X-ray's grey three times. paper: pseudo-colour; assumed: jet"
    )
    positive: str = option(CLASSES[0], "paper: COVID-19, whose sensitivity opens the gate")
    gate_window: int = option(286, "assumed: training steps between two judgements, an epoch")
    gate_sensitivity: float = option(0.9, "assumed: that a judgement needs, at least")
    gate_specificity: float = option(0.0, "paper: none is asked for. assumed: likewise")
    gate_count: int = option(3, "assumed: good judgements in a row that open the gate")
    gate_latch: bool = option(
        True, "assumed: an open gate stays open. paper: off, the literal counter, which may shut it"
    )
    gate_pool: Literal["flatten", "gap"] = option(
        "flatten", "paper: its classifier sees all features of stage I. assumed: gap, their means"
    )
    gate_weight: float = option(
        0.3, "assumed: of its classifier's loss while the gate is open; 1 while it is shut"
    )
    teachers: int = option(
        0, "paper: 4 teachers, TS1 to TS4; here the first so many of them. assumed: 0, none"
    )
    teacher_folds: int = option(
        5, "paper: 5 folds of the training split's patients, a training of each teacher in each"
    )
    distillation_weight: float = option(
        0.5,
        "assumed: share of the soft labels' loss, on the grid of code; the rest is the hard ones'",
    )
    distillation_temperature: float = option(
        3.0, "assumed: by which logits of teachers and student are divided, on the grid of code"
    )
    teacher: TeacherTraining = dataclasses.field(default_factory=TeacherTraining)
    classification: Training = dataclasses.field(default_factory=Training)

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples: it reads no tiles."""
        return 1

    def widened(self, factor: int) -> "Options":
        """The same network with `factor` times its channels."""
        names = ("stage1_widths", "stage2_widths", "published_widths")
        wider = {name: tuple(factor * w for w in getattr(self, name)) for name in names}
        return dataclasses.replace(self, stem=factor * self.stem, **wider)

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        """Refuse what cannot work.

        Raises:
          ValueError: naming the option.
        """
        check_widths(self, ("stage1_widths", "stage2_widths"))
        require(self.stem >= 1, f"stem is {self.stem}: it must be at least 1")
        check_groups(self.published_widths, self.published_blocks)
        self._check_teachers()
        require(
            data.slices == 1 or self.mix == "full" or data.slices % GROUPS == 0,
            f"slices is {data.slices}: give 1 (an X-ray), a multiple of {GROUPS} (CT), or "
            "--cnncf.mix=full",
        )
        require(
            data.slices == 1 or self.pseudo_colour == "none",
            f"pseudo_colour is {self.pseudo_colour} and slices is {data.slices}: it is for X-rays, "
            "of 1 slice: give none",
        )
        require(
            self.positive in data.classes,
            f"positive is {self.positive}: give one of {','.join(data.classes)}",
        )
        for name in ("gate_window", "gate_count"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}: it must be at least 1")
        for name in ("gate_sensitivity", "gate_specificity", "gate_weight"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value:g}: it must not be negative")
        check_platform(platform)

    def _check_teachers(self) -> None:
        require(
            0 <= self.teachers <= TEACHERS,
            f"teachers is {self.teachers}: give 0 to {TEACHERS}, the first so many of TS1 to "
            f"TS{TEACHERS}",
        )
        require(self.teacher_folds >= 2, f"teacher_folds is {self.teacher_folds}: give 2 or more")
        require(
            0 <= self.distillation_weight <= 1,
            f"distillation_weight is {self.distillation_weight:g}: it is a share, of 0 to 1",
        )
        require(
            self.distillation_temperature > 0,
            f"distillation_temperature is {self.distillation_temperature:g}: it must be above 0",
        )
        widths = self.published_widths
        require(
            not self.teachers or len(widths) == GROUPS_OF_BLOCKS,
            f"published_widths is {widths} and teachers is {self.teachers}: their networks have "
            f"{GROUPS_OF_BLOCKS} groups of blocks: give as many",
        )


@dataclasses.dataclass(frozen=True)
class RegressorTraining(SgdConfig):
    """CNNRF's stage; an epoch is 19 steps, of the paper's 75 cases."""

    steps: int = option(3800, "paper: 200 epochs")
    batch: int = option(4, "code: 20 patches in a global batch; of cases, with up to 5 of each")
    warmup_steps: int = option(19, "paper: a warm-up. assumed: of one epoch, from a tenth")
    decay_every: int = option(950, "paper: the rate is divided by ten every 50 epochs")


@dataclasses.dataclass(frozen=True)
class RegressorOptions:
    """CNNRF, the regressor of indicators, and its stage."""

    NAME: ClassVar[str] = "cnnrf"

    stem: int = option(64, "paper: channels of the first convolution")
    widths: tuple[int, int, int] = option(
        (256, 256, 512), "paper: stage II but for some parameters. assumed: channels of its blocks"
    )
    hidden: tuple[int, int] = option(
        (128, 32), "assumed: outputs of the regressor's first two of three linear layers"
    )
    regression: RegressorTraining = dataclasses.field(default_factory=RegressorTraining)

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples: it reads no tiles."""
        return 1

    def widened(self, factor: int) -> "RegressorOptions":
        """The same network with `factor` times its channels."""
        widths = tuple(factor * w for w in self.widths)
        return dataclasses.replace(self, stem=factor * self.stem, widths=widths)

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        """Refuse what cannot work.

        Raises:
          ValueError: naming the option.
        """
        check_widths(self, ("widths", "hidden"))
        require(self.stem >= 1, f"stem is {self.stem}: it must be at least 1")
        require(
            data.patches != "none",
            "patches is none: it reads patches of lesions: give window or resize",
        )
        require(
            len(data.indicators) > 0,
            "indicators is empty: give the columns of the case list that are to be predicted",
        )
        require(
            data.working_size[0] % PATCH_STEP == 0,
            f"working_size is {data.working_size}: the sides of a patch must be multiples of "
            f"{PATCH_STEP}",
        )
        check_platform(platform)


def check_widths(options: object, names: tuple[str, ...]) -> None:
    """Refuse channels below 1 in the options of these names.

    Raises:
      ValueError: naming the option.
    """
    for name in names:
        widths = getattr(options, name)
        require(min(widths) >= 1, f"{name} is {widths}: each must be at least 1")


def check_groups(widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    """Refuse widths and blocks of the published variant that do not pair.

    Raises:
      ValueError: naming the options.
    """
    require(
        0 < len(widths) == len(blocks),
        f"published_widths is {widths} and published_blocks is {blocks}: give each group one of "
        "both",
    )
    for name, values in (("published_widths", widths), ("published_blocks", blocks)):
        require(min(values) >= 1, f"{name} is {values}: each must be at least 1")


def check_platform(platform: PlatformConfig) -> None:
    """Refuse what would make another function of a network with batch norms.

    Raises:
      ValueError: naming the option.
    """
    require(
        platform.accumulation == 1,
        f"accumulation is {platform.accumulation}: each part would have statistics of its own in "
        "batch norms, which is another function: give 1",
    )
    require(
        platform.space == 1,
        f"space is {platform.space}: this network's images are not split: give 1",
    )
