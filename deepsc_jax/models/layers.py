"""Convolution, normalisation, pooling and upsampling of channel-last volumes.

Every function takes `(batch, depth, height, width, channel)`. Depth may be padded: `valid` gives,
per batch element, how many slices are real, and what is computed for those never depends on how
many padded slices follow. `mask_depth` restores zeros there, which a zero-padded convolution of
the unpadded volume would have seen.

Convolutions have two forms with the same result. `native` is one 3D convolution. `folded` writes it
as 2D convolutions with depth folded into the batch, several times faster on XLA's CPU backend:
shifted slices are stacked along channels; with very few channels (`GROUPED_CHANNELS`) several
slices are also computed together, as channels; or, from `STACKED_CHANNELS` input channels up, one
2D convolution per kernel slice is summed.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deepsc_jax import parallel

Volume = Float[Array, "batch depth height width channel"]
Valid = Int[Array, "batch"] | None
ConvForm = Literal["native", "folded"]
STACKED_CHANNELS = 32
GROUPED_CHANNELS, GROUPED_SLICES = 4, 4  # a quarter of the time at 2 channels, none gained at 8
SLAB_BYTES, SLAB_SLICES = 2**24, 4
NORM_EPSILON = 1e-5  # torch's; Flax's default is 1e-6
# Of float32 products that must stay float32: by default they are TF32 on GPU, bfloat16 on TPU.
EXACT = lax.Precision.HIGHEST

kernel_init = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")  # He et al. 2015


def depth_mask(valid: Int[Array, "batch"], depth: int) -> Array:
    """True for the real slices: `(batch, depth, 1, 1, 1)`."""
    return (jnp.arange(depth) < valid[:, None])[:, :, None, None, None]


def mask_depth(x: Volume, valid: Valid) -> Volume:
    """`x` with its padded slices set to zero."""
    if valid is None:
        return x
    return jnp.where(depth_mask(valid, x.shape[1]), x, jnp.zeros((), x.dtype))


def halve(valid: Valid, times: int = 1) -> Valid:
    """Real slices after `times` poolings by 2: a half-filled last slice counts as real."""
    return None if valid is None else -(-valid // 2**times)


def with_summed_gradient(
    operation: Callable[[Volume, Array, int], Volume], reach: int, x: Volume, kernel: Array
) -> Volume:
    """`operation(x, kernel, reach)`, whose kernel's gradient is summed over devices in its dtype.

    Where depth is split over devices, each one's share of a kernel's gradient would be summed in
    the compute dtype, bfloat16: here it is the kernel's own, float32.

    Args:
      operation: of a volume and a kernel, with so many slices of zero padding on both sides.
      reach: of the kernel along depth, in slices to each side.
      x: its input.
      kernel: in the dtype of its parameter.
    """
    if not parallel.depth_is_split():
        return operation(x, kernel, reach)

    @jax.custom_vjp
    def apply(x: Volume, kernel: Array) -> Volume:
        return operation(x, kernel, reach)

    def forward(x: Volume, kernel: Array) -> tuple[Volume, tuple[Volume, Array]]:
        return apply(x, kernel), (x, kernel)

    def share(x: Volume, cotangent: Volume, kernel: Array) -> Array:
        seen = parallel.with_neighbours(x, reach)
        return jax.vjp(lambda k: operation(seen, k, 0), kernel)[1](cotangent)[0]

    def backward(saved: tuple[Volume, Array], cotangent: Volume) -> tuple[Volume, Array]:
        x, kernel = saved
        of_x = jax.vjp(lambda x: operation(x, kernel, reach), x)[1](cotangent)[0]
        return of_x, parallel.sum_over_space(share, (x, cotangent), kernel)

    apply.defvjp(forward, backward)
    return apply(x, kernel)


def conv3d(x: Volume, kernel: Float[Array, "kd kh kw cin cout"], stride: int, form: str) -> Volume:
    """Convolution with zero padding of k // 2 on both sides (torch's `padding=k // 2`).

    Args:
      x: `(batch, depth, height, width, cin)`.
      kernel: odd sizes; cast to the dtype of `x`.
      stride: in-plane; depth keeps stride 1.
      form: `native` or `folded`.
    """
    padding = [(k // 2, k // 2) for k in kernel.shape[:3]]
    if form == "native":

        def native(x: Volume, kernel: Array, reach: int) -> Volume:
            return lax.conv_general_dilated(
                x,
                kernel.astype(x.dtype),
                (1, stride, stride),
                [(reach, reach), *padding[1:]],
                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            )

        return with_summed_gradient(native, padding[0][0], x, kernel)
    kernel = kernel.astype(x.dtype)
    if kernel.shape[:3] == (1, 1, 1) and stride == 1:
        return x @ kernel[0, 0, 0]
    return _folded(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _folded(x: Volume, kernel: Array, stride: int) -> Volume:
    """`conv3d` as 2D convolutions, slab by slab; keeps nothing but `x` for the backward pass."""
    reach = kernel.shape[0] // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
    slabs = _slabs(x, kernel)
    parts = [_slab(padded[:, i : i + n + 2 * reach], kernel, stride) for i, n in slabs]
    return jnp.concatenate(parts, axis=1)


def _folded_forward(x: Volume, kernel: Array, stride: int) -> tuple[Volume, tuple[Volume, Array]]:
    return _folded(x, kernel, stride), (x, kernel)


def _folded_backward(
    stride: int, saved: tuple[Volume, Array], cotangent: Volume
) -> tuple[Volume, Array]:
    x, kernel = saved
    if stride == 1:
        of_x = _folded(cotangent, kernel[::-1, ::-1, ::-1].swapaxes(3, 4), 1)
    else:
        of_x = jax.linear_transpose(lambda x: _whole(x, kernel, stride), x)(cotangent)[0]
    reach = kernel.shape[0] // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
    of_kernel = jnp.zeros_like(kernel)
    for i, n in _slabs(x, kernel):
        slab = padded[:, i : i + n + 2 * reach]
        transpose = jax.linear_transpose(lambda k, slab=slab: _slab(slab, k, stride), kernel)
        of_kernel += transpose(cotangent[:, i : i + n])[0]
    return of_x, of_kernel


_folded.defvjp(_folded_forward, _folded_backward)


def _whole(x: Volume, kernel: Array, stride: int) -> Volume:
    reach = kernel.shape[0] // 2
    return _slab(jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0))), kernel, stride)


def _slabs(x: Volume, kernel: Array) -> list[tuple[int, int]]:
    """First slice and number of slices of every slab: what stays in cache, stacked."""
    batch, depth, height, width, channels = x.shape
    slice_bytes = batch * height * width * channels * kernel.shape[0] * x.dtype.itemsize
    size = max(SLAB_BYTES // slice_bytes, SLAB_SLICES)
    return [(i, min(size, depth - i)) for i in range(0, depth, size)]


def _slab(padded: Volume, kernel: Array, stride: int) -> Volume:
    """`conv3d` of slices that come with their neighbours along depth."""
    taps, *window, channels, features = kernel.shape
    batch, slices, height, width, _ = padded.shape
    depth = slices - taps + 1
    padding = [(k // 2, k // 2) for k in window]

    def conv2d(volume: Volume, weights: Float[Array, "kh kw cin cout"]) -> Volume:
        folded = volume.reshape(-1, height, width, volume.shape[-1])
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            folded, weights, (stride, stride), padding, dimension_numbers=dims
        )
        return y.reshape(*volume.shape[:2], *y.shape[1:])

    if taps == 1:
        return conv2d(padded, kernel[0])
    if channels >= STACKED_CHANNELS:
        parts = [conv2d(padded[:, i : i + depth], kernel[i]) for i in range(taps)]
        return sum(parts[1:], parts[0])
    group = GROUPED_SLICES if max(channels, features) <= GROUPED_CHANNELS else 1
    padded = jnp.pad(padded, ((0, 0), (0, -depth % group), (0, 0), (0, 0), (0, 0)))
    reach = group + taps - 1
    last = padded.shape[1] - reach + 1
    stacked = jnp.concatenate([padded[:, i : last + i : group] for i in range(reach)], axis=-1)
    y = conv2d(stacked, _stacked_kernel(kernel, group))
    y = y.reshape(*y.shape[:4], group, -1).transpose(0, 1, 4, 2, 3, 5)
    return y.reshape(batch, -1, *y.shape[3:])[:, :depth]


def _stacked_kernel(
    kernel: Float[Array, "kd kh kw cin cout"], group: int
) -> Float[Array, "kh kw stacked grouped"]:
    """The 2D kernel from group + kd - 1 stacked slices to `group` slices: a band of `kernel`."""
    taps, *in_plane, channels, features = kernel.shape
    columns = [
        jnp.pad(kernel, ((i, group - 1 - i), (0, 0), (0, 0), (0, 0), (0, 0))) for i in range(group)
    ]
    band = jnp.stack(columns, axis=-2).transpose(1, 2, 0, 3, 4, 5)
    return band.reshape(*in_plane, (group + taps - 1) * channels, group * features)


class Conv(nn.Module):
    """3D convolution without bias, in `dtype`; parameter `kernel (kd, kh, kw, in, out)`."""

    features: int
    kernel: int = 3
    stride: int = 1
    form: ConvForm = "native"
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = kernel_init

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        shape = (self.kernel,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return conv3d(x.astype(self.dtype), kernel, self.stride, self.form)


class GroupNorm(nn.Module):
    """Group normalisation over a volume's real slices (Wu and He 2018), padded slices set to zero.

    Statistics are float32 (or wider) whatever the dtype of `x`. Sums and sums of squares are dot
    products, which XLA's CPU backend runs on all cores, unlike its reductions.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Volume, valid: Valid) -> Volume:
        batch, depth, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        slices = jnp.full((batch,), depth) if valid is None else valid
        real = jnp.maximum(slices, 1).astype(wide.dtype)[:, None]
        # About the size of the mean, which would otherwise cancel in the variance: the mean of
        # every slice's first row; of the first slice, one device would have to send all others.
        first = mask_depth(wide[:, :, :1], valid).sum(axis=(1, 2, 3)) / (real * width)
        shift = first.reshape(batch, self.groups, -1).mean(axis=2)
        shift = jnp.repeat(lax.stop_gradient(shift), channels // self.groups, 1)
        wide = mask_depth(wide - shift[:, None, None, None], valid)
        rows = wide.reshape(batch, depth * height, width * channels)
        ones = jnp.ones(rows.shape[:2], rows.dtype)

        def group_sums(values: Array) -> Array:
            sums = jnp.einsum("br,brc->bc", ones, values, precision=EXACT)
            sums = sums.reshape(batch, width, self.groups, channels // self.groups)
            return sums.sum(axis=(1, 3))

        count = real * (height * width * channels // self.groups)
        mean = group_sums(rows) / count
        variance = nn.relu(group_sums(rows * rows) / count - mean * mean)
        inverse = lax.rsqrt(variance + NORM_EPSILON)

        def per_channel(values: Array) -> Array:
            return jnp.repeat(values, channels // self.groups, axis=1)

        slope = per_channel(inverse) * scale
        offset = bias - per_channel(mean) * slope
        y = wide * slope[:, None, None, None] + offset[:, None, None, None]
        return mask_depth(y.astype(x.dtype), valid)


class ConvNormAct(nn.Module):
    """Convolution, group norm, ReLU."""

    features: int
    groups: int
    kernel: int = 3
    stride: int = 1
    form: ConvForm = "native"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Volume, valid: Valid) -> Volume:
        x = Conv(self.features, self.kernel, self.stride, self.form, self.dtype, name="conv")(x)
        return nn.relu(GroupNorm(self.groups, name="norm")(x, valid))


class Deconv(nn.Module):
    """Transposed convolution with kernel 2 and stride 2: a matrix product and a depth-to-space."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        batch, depth, height, width, channels = x.shape
        init = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
        kernel = self.param("kernel", init, (2, 2, 2, channels, self.features))
        flat = kernel.transpose(3, 0, 1, 2, 4).reshape(channels, -1)

        def product(x: Volume, flat: Array, _: int) -> Volume:
            return x @ flat.astype(x.dtype)

        y = with_summed_gradient(product, 0, x.astype(self.dtype), flat)
        y = y.reshape(batch, depth, height, width, 2, 2, 2, -1)
        y = y.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(batch, 2 * depth, 2 * height, 2 * width, self.features)


def max_pool(x: Volume) -> Volume:
    """2x2x2 maximum with stride 2; sides must be even.

    Tied values share the gradient equally (torch's `amax`; `max_pool3d` picks one), and it is
    deterministic on GPU. Inputs are activations >= 0 with zeros in padded slices, so a half-filled
    last slice pools to its real half.

    The values are compared with one another, never with their maximum: XLA may compute an
    activation twice, in two fusions that round differently, and then `jnp.max`, whose gradient goes
    to the values that equal the maximum, drops it without a word (seen on CPU).
    """
    ties = jnp.ones(x.shape, x.dtype)
    for axis in (3, 2, 1):
        x, ties = _larger(*_even_and_odd(x, axis), *_even_and_odd(ties, axis))
    return x


def _even_and_odd(x: Array, axis: int) -> tuple[Array, Array]:
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return lax.index_in_dim(pairs, 0, axis + 1, False), lax.index_in_dim(pairs, 1, axis + 1, False)


def _larger(a: Array, b: Array, ties_a: Array, ties_b: Array) -> tuple[Array, Array]:
    """The larger of `a` and `b`, and how many values it stands for, given theirs."""
    share = jnp.where(a == b, ties_b / (ties_a + ties_b), 0)  # of the gradient, for b
    ties = jnp.where(a < b, ties_b, jnp.where(a == b, ties_a + ties_b, ties_a))
    return jnp.where(a < b, b, a + share * (b - a)), ties


def average_in_plane(x: Volume, factor: int) -> Volume:
    """Mean over `factor` x `factor` in-plane blocks; sides must be multiples of `factor`."""
    batch, depth, height, width, channels = x.shape
    blocks = x.reshape(batch, depth, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(3, 5))


def recomputed(block: type[nn.Module], wanted: bool) -> Any:
    """`block`, or, where `wanted`, `block` whose insides the backward pass computes again."""
    return nn.remat(block) if wanted else block


def resolve_form(form: str, platform: str) -> ConvForm:
    """The convolution form that `auto` stands for on `platform` (`jax.default_backend()`)."""
    if form == "auto":
        return "folded" if platform == "cpu" else "native"
    return "native" if form == "native" else "folded"


def resolve_dtype(name: str, platform: str) -> jnp.dtype:
    """The compute dtype that `auto` stands for on `platform`."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
