"""The authors' published CNNCF and its four teachers: plain 2D residual networks.

MONAI's `ResNet` with `spatial_dims=2, conv1_t_size=3, conv1_t_stride=1, no_max_pool=True,
bias_downsample=False` computes the same function of the same weights, under the same names.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepsc_jax.models.layers.batch_norm import BatchNorm
from deepsc_jax.models.layers.blocks import EXACT, recomputed
from deepsc_jax.models.layers.blocks2d import Conv2d, Image, xavier_init
from deepsc_jax.models.layers.layout import Layout

BASIC = (3, 3)  # the sides of a block's kernels
BOTTLENECK = (1, 3, 1)
EXPANSION = 4  # of a bottleneck's channels, in what it returns


@dataclasses.dataclass(frozen=True)
class Shape:
    """A network's blocks.

    Attributes:
      kernels: of a block, `BASIC` or `BOTTLENECK`.
      blocks: of each group.
      widths: channels of each group.
    """

    kernels: tuple[int, ...]
    blocks: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)


TEACHERS = (
    Shape(BASIC, (2, 1, 3, 1)),
    Shape(BASIC, (2, 2, 2, 1)),
    Shape(BOTTLENECK, (3, 1, 2, 1)),
    Shape(BOTTLENECK, (3, 2, 2, 1)),
)


class ResidualBlock(nn.Module):
    """Convolutions and a shortcut; the first 3x3 convolution has the stride."""

    features: int
    kernels: tuple[int, ...]
    stride: int
    layout: Layout

    @nn.compact
    def __call__(self, x: Image, weights: Array | None, train: bool) -> Image:
        def norm(y: Image, name: str) -> Image:
            return BatchNorm(self.layout, name=name)(y, train=train, weights=weights)

        y, last = x, len(self.kernels) - 1
        outward = self.features * (EXPANSION if self.kernels == BOTTLENECK else 1)
        strided = self.kernels.index(3)
        for i, side in enumerate(self.kernels):
            features = outward if i == last else self.features
            stride = self.stride if i == strided else 1
            y = Conv2d(features, side, stride, self.layout, name=f"conv{i + 1}")(y)
            y = norm(y, f"bn{i + 1}")
            y = nn.relu(y) if i < last else y
        if self.stride != 1 or x.shape[-1] != outward:
            x = Conv2d(outward, 1, self.stride, self.layout, name="downsample")(x)
            x = norm(x, "downsample_norm")
        return nn.relu(x + y)


class ResNet2D(nn.Module):
    """A classifier of images."""

    shape: Shape
    classes: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Image, weights: Float[Array, "batch"] | None, *, train: bool) -> dict:
        """`logits (batch, class)`, and `maps`: each group's features by name."""
        maps = {}
        x = Conv2d(self.shape.widths[0], 3, 1, self.layout, name="conv1")(x)
        x = nn.relu(BatchNorm(self.layout, name="bn1")(x, train=train, weights=weights))
        block = recomputed(ResidualBlock, self.layout.remat_blocks, static=(3,))
        for i, (features, count) in enumerate(
            zip(self.shape.widths, self.shape.blocks, strict=True)
        ):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"layer{i + 1}_{j}"
                x = block(features, self.shape.kernels, stride, self.layout, name=name)(
                    x, weights, train
                )
            maps[f"layer{i + 1}"] = x = self.perturb(f"layer{i + 1}", x)
        return {"logits": head(x, self.classes), "maps": maps}


def head(x: Image, classes: int) -> Float[Array, "batch class"]:
    """Global average pooling and a linear layer, float32 or wider; for a compact module."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pooled = x.astype(wide).mean(axis=(1, 2))
    linear = nn.Dense(classes, dtype=wide, precision=EXACT, kernel_init=xavier_init, name="fc")
    return linear(pooled)
