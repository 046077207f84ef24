"""The 3D U-Net of MLPerf Training: a plain, strong segmentation network.

Facts from mlcommons/training, `image_segmentation/pytorch` (`model/unet3d.py`, `layers.py`,
`losses.py`, `runtime/arguments.py`): two convolutions a level, each with instance norm and ReLU,
the first of a level with stride 2; transposed convolutions up, concatenated before the skipped
features; no deep supervision. MONAI's `DynUNet` computes the same function of the same weights.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from deepsc_jax.config import DataConfig, PlatformConfig, StageConfig, VoxelClass, option
from deepsc_jax.models.layers.blocks import (
    EXACT,
    ConvNormAct,
    Deconv,
    Mask,
    masked,
    pyramid,
    real_slices,
    recomputed,
)
from deepsc_jax.models.layers.layout import Layout, Volume
from deepsc_jax.models.torch_names import CONV, DECONV, POINT, Rule

CLASSES = 2  # of a voxel: the background and lesion; MLPerf's task has 3


@dataclasses.dataclass(frozen=True)
class Training(StageConfig):
    """Its one stage."""

    batch: int = option(2, "code: MLPerf's batch of one device; assumed: of scans")


@dataclasses.dataclass(frozen=True)
class Options:
    """The network's own options."""

    NAME: ClassVar[str] = "unet3d"

    widths: tuple[int, ...] = option(
        (32, 64, 128, 256, 320, 320),
        "code: channels of each level, finest first; each has half the sides of the one before",
    )
    dice_smoothing: float = option(
        1e-6, "code: added above and below the fraction of the Dice loss"
    )
    segmentation: Training = dataclasses.field(default_factory=Training)

    overlap: ClassVar[float] = 0.0
    plateau: ClassVar[None] = None
    voxel_classes: ClassVar[tuple[VoxelClass, ...]] = ("background", "lesion")

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples."""
        return 2 ** (len(self.widths) - 1)

    def widened(self, factor: int) -> "Options":
        """The same network with `factor` times its channels."""
        return dataclasses.replace(self, widths=tuple(factor * w for w in self.widths))

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        """Refuse what cannot work.

        Raises:
          ValueError: too few levels, or sides that the levels do not halve.
        """
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths is {self.widths}: give at least two levels' channels")
        if self.dice_smoothing <= 0:
            raise ValueError(f"dice_smoothing is {self.dice_smoothing:g}: it must be above 0")
        factor = self.tile_step
        if any(side % factor for side in data.tile) or data.tile[0] % (factor * platform.space):
            raise ValueError(
                f"tile is {data.tile}: {len(self.widths)} levels need multiples of {factor}, and "
                f"a depth of {factor * platform.space} with space = {platform.space}: give such "
                "sides, or fewer widths"
            )


class Level(nn.Module):
    """Two convolutions, each with instance norm and ReLU; the first may halve the sides."""

    features: int
    stride: int
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume, mask: Mask) -> Volume:
        for i, stride in enumerate((self.stride, 1)):
            unit = ConvNormAct(  # a group for every channel
                self.features, self.features, 3, (stride, stride), self.layout, name=f"conv{i + 1}"
            )
            x = unit(x, mask)
        return x


class UNet3D(nn.Module):
    """The network; `build` makes it."""

    options: Options
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch depth height width 1"],
        valid: Int[Array, "batch"] | None = None,
        *,
        train: bool = False,
    ) -> dict:
        """Logits of every voxel.

        Args:
          x: patches whose sides are multiples of 2 ** (levels - 1).
          valid: how many slices of each patch are real, by default all; what lies behind them
            changes nothing.
          train: makes no difference here.

        Returns:
          `logits (batch, depth, height, width, class)`, float32 or wider, and `maps`: each
          level's last features by name, `level1` the finest.
        """
        del train
        widths, maps = self.options.widths, {}
        level = recomputed(Level, self.layout.remat_blocks)
        skips = []
        mask = None if valid is None else real_slices(valid, x.shape[1])
        masks = pyramid(mask, len(widths))
        x = masked(x, mask)
        for i, features in enumerate(widths):
            name = _down_name(i, len(widths))
            x = level(features, 1 if i == 0 else 2, self.layout, name=name)(x, masks[i])
            skips.append(x)
        maps[f"level{len(widths)}"] = x = self.perturb(f"level{len(widths)}", x)
        for i in reversed(range(len(widths) - 1)):
            step = len(widths) - 2 - i
            x = Deconv(widths[i], self.layout, bias=True, name=f"upsample{step}_conv")(x)
            x = jnp.concatenate([masked(x, masks[i]), skips[i]], axis=-1)
            x = level(widths[i], 1, self.layout, name=f"upsample{step}")(x, masks[i])
            maps[f"level{i + 1}"] = x = self.perturb(f"level{i + 1}", x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        head = nn.Dense(CLASSES, dtype=wide, precision=EXACT, name="output")
        return {"logits": head(x.astype(wide)), "maps": maps}


def _down_name(index: int, levels: int) -> str:
    if index == 0:
        return "input"
    return "bottleneck" if index == levels - 1 else f"downsample{index - 1}"


def build(options: Options, data: DataConfig, layout: Layout) -> nn.Module:
    """The network of `options`."""
    del data
    return UNet3D(options, layout)


def losses(
    options: Options,
    logits: Float[Array, "batch depth height width class"],
    truth: Int[Array, "batch depth height width"],
    valid: Int[Array, "batch"] | None,
) -> dict[str, Float[Array, "batch"]]:
    """Each patch's `dice`, `cross_entropy` and `loss`, their mean (MLPerf's `DiceCELoss`).

    Dice is 1 less the mean over all classes but the background, and counts patches without a voxel
    of a class; cross-entropy is the mean over the patch's real voxels.

    Args:
      options: its `dice_smoothing`.
      logits: of every class.
      truth: class ids.
      valid: how many slices of each patch are real, by default all; no other enters.
    """
    batch, depth, height, width, classes = logits.shape
    slices = jnp.full(batch, depth) if valid is None else valid
    real = real_slices(slices, depth).astype(logits.dtype)
    space = (1, 2, 3)
    probability = jax.nn.softmax(logits)[..., 1:] * real
    target = jax.nn.one_hot(truth, classes, dtype=logits.dtype)[..., 1:] * real
    overlap = (probability * target).sum(space)
    total = probability.sum(space) + target.sum(space)
    smoothing = options.dice_smoothing
    dice = 1 - ((2 * overlap + smoothing) / (total + smoothing)).mean(axis=-1)
    voxels = optax.softmax_cross_entropy_with_integer_labels(logits, truth) * real[..., 0]
    cross_entropy = voxels.sum(space) / (jnp.maximum(slices, 1) * height * width)
    return {"dice": dice, "cross_entropy": cross_entropy, "loss": (dice + cross_entropy) / 2}


def _level_names(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/conv{{k}}/conv/kernel", f"{theirs}.conv{{k}}.0.weight", CONV),
        Rule(f"{ours}/conv{{k}}/norm/scale", f"{theirs}.conv{{k}}.1.weight"),
        Rule(f"{ours}/conv{{k}}/norm/bias", f"{theirs}.conv{{k}}.1.bias"),
    )


TORCH_NAMES = (
    *_level_names("input", "input_block"),
    *_level_names("downsample{i}", "downsample.{i}"),
    *_level_names("bottleneck", "bottleneck"),
    *_level_names("upsample{i}", "upsample.{i}"),
    Rule("upsample{i}_conv/kernel", "upsample.{i}.upsample_conv.0.weight", DECONV),
    Rule("upsample{i}_conv/bias", "upsample.{i}.upsample_conv.0.bias"),
    Rule("output/kernel", "output.conv.0.weight", POINT),
    Rule("output/bias", "output.conv.0.bias"),
)
