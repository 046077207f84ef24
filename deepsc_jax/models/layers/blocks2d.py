"""Blocks of channel-last images: convolution, pooling, and CNNCF's residual blocks A and B.

Every function takes `(batch, height, width, channel)`. Images are no volumes of one slice: in a
3x3x3 convolution of one, two thirds of the products are with padding.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from deepsc_jax.models.layers.batch_norm import BatchNorm
from deepsc_jax.models.layers.layout import Layout

Image = Float[Array, "batch height width channel"]
xavier_init = nn.initializers.glorot_uniform()


class Conv2d(nn.Module):
    """2D convolution without bias, in `layout.dtype`; parameter `kernel (kh, kw, in, out)`.

    Zero padding of k // 2 on all sides (torch's `padding=k // 2`): `SAME` pads even sides at the
    far end alone where the stride is 2.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    layout: Layout = Layout()
    kernel_init: nn.initializers.Initializer = xavier_init

    @nn.compact
    def __call__(self, x: Image) -> Image:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.layout.dtype)
        x = x.astype(self.layout.dtype)
        if self.kernel == 1:
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(self.kernel // 2, self.kernel // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def first_max_pool(x: Image, stride: int = 2) -> Image:
    """3x3 maximum, one pixel past every side (torch's `MaxPool2d(3, stride, 1)`).

    Nine strided views, folded in order of rows: the gradient goes to the first of tied values, as
    torch's. XLA's own windowed maximum has a gradient that scatters, and adds in no fixed order on
    GPU. What lies past the sides is -inf, since the features may be negative.
    """
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    largest = None
    for row in range(3):
        for column in range(3):
            view = x[:, row : row + height : stride, column : column + width : stride]
            largest = view if largest is None else jnp.where(view > largest, view, largest)
    assert largest is not None
    return largest


class ResBlockA(nn.Module):
    """CNNCF's ResBlock-A (Liang et al. 2021, Fig. 6a): two inputs, two outputs of one size.

    With the inputs i1 and i2:

        u  = BN(conv1x1(maxpool3x3(i1)))
        v  = BN(conv3x3(ReLU(BN(conv3x3(i2)))))
        o1 = u + v
        o2 = ReLU(u + v)
    """

    features: int
    stride: int = 2
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        i1: Image,
        i2: Image,
        weights: Float[Array, "batch"] | None,
        moves: Bool[Array, ""] | None,
        train: bool,
    ) -> tuple[Image, Image]:
        """`(o1, o2)`; `weights` and `moves` are those of `BatchNorm`."""

        def norm(x: Image, name: str) -> Image:
            return BatchNorm(self.layout, name=name)(x, train=train, weights=weights, moves=moves)

        def conv(x: Image, kernel: int, stride: int, name: str) -> Image:
            return Conv2d(self.features, kernel, stride, self.layout, name=name)(x)

        upper = norm(conv(first_max_pool(i1, self.stride), 1, 1, "conv_upper"), "norm_upper")
        lower = nn.relu(norm(conv(i2, 3, self.stride, "conv1"), "norm1"))
        lower = norm(conv(lower, 3, 1, "conv2"), "norm2")
        total = upper + lower
        return total, nn.relu(total)


class ResBlockB(ResBlockA):
    """CNNCF's ResBlock-B (Fig. 6b): ResBlock-A without its first output, given twice instead."""

    def __call__(
        self,
        i1: Image,
        i2: Image,
        weights: Float[Array, "batch"] | None,
        moves: Bool[Array, ""] | None,
        train: bool,
    ) -> tuple[Image, Image]:
        """`(o2, o2)`."""
        _, rectified = super().__call__(i1, i2, weights, moves, train)
        return rectified, rectified
