"""3D ResNet-50, a classifier of whole scans (He et al. 2016; Hara et al. 2018).

MONAI's `resnet50(spatial_dims=3, n_input_channels=1)` with its names and its defaults: a 7x7x7
convolution of stride 1, a 3x3x3 maximum of stride 2, bottlenecks with the stride in their 3x3x3
convolution, and a bias in the convolution of each shortcut.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from deepsc_jax.config import Config, DataConfig, PlatformConfig, StageConfig, option
from deepsc_jax.models.layers.batch_norm import BatchNorm, norm_names
from deepsc_jax.models.layers.blocks import EXACT, Conv, first_max_pool, recomputed
from deepsc_jax.models.layers.layout import Layout, Volume
from deepsc_jax.models.torch_names import CONV, LINEAR, Rule
from deepsc_jax.runtime.types import PyTree

EXPANSION = 4  # of a bottleneck's channels, in what it returns
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015


@dataclasses.dataclass(frozen=True)
class Options:
    """The network's own options."""

    NAME: ClassVar[str] = "resnet3d"

    widths: tuple[int, ...] = option(
        (64, 128, 256, 512), "code: channels inside the bottlenecks of each of the four layers"
    )
    blocks: tuple[int, ...] = option((3, 4, 6, 3), "paper: bottlenecks of each layer (ResNet-50)")
    stem_stride: int = option(1, "code: stride of the first convolution, in all three axes")
    classification: StageConfig = dataclasses.field(default_factory=StageConfig)

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples: it reads no tiles."""
        return 1

    def widened(self, factor: int) -> "Options":
        """The same network with `factor` times its channels."""
        return dataclasses.replace(self, widths=tuple(factor * w for w in self.widths))

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        """Refuse what cannot work.

        Raises:
          ValueError: widths and blocks do not pair, or too few of something.
        """
        if data.mask != "lungs":
            raise ValueError(f"mask is {data.mask}: this network sees the lungs alone: give lungs")
        if not 0 < len(self.widths) == len(self.blocks):
            raise ValueError(
                f"widths is {self.widths} and blocks is {self.blocks}: give each layer one of both"
            )
        for name, values in (("widths", self.widths), ("blocks", self.blocks)):
            if min(values) < 1:
                raise ValueError(f"{name} is {values}: each must be at least 1")
        if self.stem_stride < 1:
            raise ValueError(f"stem_stride is {self.stem_stride}: it must be at least 1")
        if platform.space > 1:
            raise ValueError(
                f"space is {platform.space}: this network's depth is not split: give 1"
            )


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 voxels a side and a shortcut, each with batch norm."""

    features: int
    stride: int
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume, weights: Array | None, train: bool) -> Volume:
        y = x
        sides, channels = (1, 3, 1), (self.features, self.features, EXPANSION * self.features)
        for i, (side, features) in enumerate(zip(sides, channels, strict=True)):
            stride = self.stride if side == 3 else 1
            y = Conv(
                features, side, (stride, stride), self.layout, kernel_init, name=f"conv{i + 1}"
            )(y)
            y = BatchNorm(self.layout, name=f"bn{i + 1}")(y, train=train, weights=weights)
            y = nn.relu(y) if i < 2 else y
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            steps = slice(None, None, self.stride)
            x = Conv(y.shape[-1], 1, 1, self.layout, kernel_init, name="downsample")(
                x[:, steps, steps, steps]
            )
            bias = self.param("downsample_bias", nn.initializers.zeros, (y.shape[-1],))
            norm = BatchNorm(self.layout, name="downsample_norm")
            x = norm(x + bias.astype(x.dtype), train=train, weights=weights)
        return nn.relu(x + y)


class ResNet3D(nn.Module):
    """The network; `build` makes it."""

    options: Options
    classes: int = 3
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch slices height width 1"],
        weights: Float[Array, "batch"] | None = None,
        *,
        train: bool,
    ) -> dict:
        """Logits of every scan.

        Args:
          x: a scan's slices.
          weights: 1 for a scan and 0 for what only fills the batch up; by default all are 1.
          train: whether norms use the batch's statistics and move the running ones, which are in
            the collection `batch_stats`.

        Returns:
          `logits (batch, class)`, float32 or wider, and `maps`: each layer's features by name.
        """
        widths, maps = self.options.widths, {}
        stride = self.options.stem_stride
        x = Conv(widths[0], 7, (stride, stride), self.layout, kernel_init, name="conv1")(x)
        x = nn.relu(BatchNorm(self.layout, name="bn1")(x, train=train, weights=weights))
        x = first_max_pool(x)
        block = recomputed(Bottleneck, self.layout.remat_blocks, static=(3,))
        for i, (features, count) in enumerate(zip(widths, self.options.blocks, strict=True)):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"layer{i + 1}_{j}"
                x = block(features, stride, self.layout, name=name)(x, weights, train)
            maps[f"layer{i + 1}"] = x = self.perturb(f"layer{i + 1}", x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        pooled = x.astype(wide).mean(axis=(1, 2, 3))
        head = nn.Dense(self.classes, dtype=wide, precision=EXACT, name="fc")
        return {"logits": head(pooled), "maps": maps}


def build(options: Options, data: DataConfig, layout: Layout) -> nn.Module:
    """The network of `options`."""
    return ResNet3D(options, len(data.classes), layout)


def losses(
    config: Config,
    out: dict[str, PyTree],
    carried: dict[str, PyTree],
    truth: Int[Array, "batch"],
    class_weights: Float[Array, "class"],
) -> tuple[dict[str, Float[Array, "batch"]], dict[str, PyTree]]:
    """Each scan's `cross_entropy`, times its class's weight, and `loss`, which is the same.

    The batch mean divides by the number of scans; torch's `weight=` divides by the weights' sum.
    What is carried stays as the network left it.
    """
    del config
    entropy = optax.softmax_cross_entropy_with_integer_labels(out["logits"], truth)
    weighted = class_weights[truth] * entropy
    return {"cross_entropy": weighted, "loss": weighted}, carried


TORCH_NAMES = (
    Rule("conv1/kernel", "conv1.weight", CONV),
    *norm_names("bn1", "bn1"),
    Rule("layer{n}_{i}/conv{k}/kernel", "layer{n}.{i}.conv{k}.weight", CONV),
    *norm_names("layer{n}_{i}/bn{k}", "layer{n}.{i}.bn{k}"),
    Rule("layer{n}_{i}/downsample/kernel", "layer{n}.{i}.downsample.0.weight", CONV),
    Rule("layer{n}_{i}/downsample_bias", "layer{n}.{i}.downsample.0.bias"),
    *norm_names("layer{n}_{i}/downsample_norm", "layer{n}.{i}.downsample.1"),
    Rule("fc/kernel", "fc.weight", LINEAR),
    Rule("fc/bias", "fc.bias"),
)
