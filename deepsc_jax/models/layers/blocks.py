"""Blocks of channel-last volumes: convolution, normalisation, pooling and upsampling.

Every function takes `(batch, depth, height, width, channel)`. A mask says which voxels count: the
real slices of a padded volume, or the lungs. Statistics are taken over those alone, and whatever
follows a convolution or norm is zero elsewhere, so that what is computed for the voxels that count
depends neither on how many others lie around them nor on what they hold.
"""

from typing import TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deepsc_jax.geometry.grids import EXACT
from deepsc_jax.models.layers.bands import row_voxels
from deepsc_jax.models.layers.convolution import conv3d, with_summed_gradient
from deepsc_jax.models.layers.layout import CPU_FORMS, Layout, Strides, Volume

Block = TypeVar("Block", bound=nn.Module)

# Height and width are 1 where whole slices count.
Counted = Bool[Array, "batch depth height width 1"]
Mask = Counted | None
PerChannel = Float[Array, "batch channel"]
NORM_EPSILON = 1e-5  # torch's; Flax's default is 1e-6
SAMPLED_ROWS = 8  # one in so many gives the size of a norm's mean

kernel_init = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")  # He et al. 2015


def standardise(x: Array, mean: float, sd: float) -> Array:
    """Lung voxels at about mean 0 and deviation 1; 0, which is outside of the lungs, stays 0.

    Assumed; no paper here names such a step. Between 0 and 1 the lungs' border is several times as
    strong as a lesion's: on phantoms a plain U-Net then reached DSC 0.44, and so 0.70.
    """
    return jnp.where(x > 0, (x - mean) / sd, 0)


def real_slices(valid: Int[Array, "batch"], depth: int) -> Bool[Array, "batch depth 1 1 1"]:
    """The mask of the first `valid` slices of `depth`."""
    return (jnp.arange(depth) < valid[:, None])[:, :, None, None, None]


def masked(x: Volume, mask: Mask) -> Volume:
    """`x` with zeros where `mask` is False."""
    if mask is None:
        return x
    # A product: JAX moves the zeros of a `where`, as large as x, out of the loop over tiles, and
    # each use would read them from memory.
    return x * mask.astype(x.dtype)


@overload
def pool_mask(mask: Counted, factors: tuple[int, int, int] = (2, 2, 2)) -> Counted: ...
@overload
def pool_mask(mask: None, factors: tuple[int, int, int] = (2, 2, 2)) -> None: ...
def pool_mask(mask: Mask, factors: tuple[int, int, int] = (2, 2, 2)) -> Mask:
    """The mask of volumes that are coarser by `factors`: True where any voxel of a block counts.

    An axis of length 1 stays.
    """
    if mask is None:
        return None
    for axis, factor in enumerate(factors, start=1):
        if mask.shape[axis] > 1 and factor > 1:
            shape = (*mask.shape[:axis], -1, factor, *mask.shape[axis + 1 :])
            mask = mask.reshape(shape).any(axis=axis + 1)
    return mask


def pyramid(mask: Mask, levels: int, factors: tuple[int, int, int] = (2, 2, 2)) -> tuple[Mask, ...]:
    """The mask at full size, pooled once, twice, ...: of `levels` levels."""
    masks = [mask]
    for _ in range(levels - 1):
        masks.append(pool_mask(masks[-1], factors))
    return tuple(masks)


def count_voxels(mask: Mask, shape: tuple[int, ...]) -> Float[Array, "batch"]:
    """How many voxels of a volume of `shape` count, at least 1."""
    batch, depth, height, width = shape[:4]
    real = jnp.result_type(float)
    if mask is None:
        return jnp.full((batch,), depth * height * width, real)
    share = (depth * height * width) // (mask.shape[1] * mask.shape[2] * mask.shape[3])
    return jnp.maximum(mask.sum((1, 2, 3, 4), dtype=real) * share, 1)


def masked_mean(x: Volume, mask: Mask) -> PerChannel:
    """The mean over the voxels that count, in float32 or wider; 0 where none does."""
    wide = masked(x.astype(jnp.promote_types(x.dtype, jnp.float32)), mask)
    return wide.sum((1, 2, 3)) / count_voxels(mask, x.shape).astype(wide.dtype)[:, None]


class Conv(nn.Module):
    """3D convolution without bias, in `layout.dtype`; parameter `kernel (kd, kh, kw, in, out)`."""

    features: int
    kernel: int = 3
    stride: int | Strides = 1
    layout: Layout = Layout()
    kernel_init: nn.initializers.Initializer = kernel_init

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        shape = (self.kernel,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return conv3d(x.astype(self.layout.dtype), kernel, self.stride, self.layout.form)


def _column_sums(x: Volume) -> Float[Array, "batch columns"]:
    """Sums over depth and height as dot products, of all voxels and channels of a row."""
    rows = x.reshape(len(x), x.shape[1] * x.shape[2], -1)
    ones = jnp.ones(rows.shape[:2], rows.dtype)
    return jnp.einsum("br,brc->bc", ones, rows, precision=EXACT)


def _affine(x: Volume, slope: PerChannel, offset: PerChannel) -> Volume:
    return x * slope[:, None, None, None] + offset[:, None, None, None]


def _affine_forward(
    x: Volume, slope: PerChannel, offset: PerChannel
) -> tuple[Volume, tuple[Volume, PerChannel]]:
    return _affine(x, slope, offset), (x, slope)


def _affine_backward(
    saved: tuple[Volume, PerChannel], cotangent: Volume
) -> tuple[Volume, PerChannel, PerChannel]:
    x, slope = saved

    def per_channel(columns: Array) -> PerChannel:
        return columns.reshape(len(x), -1, x.shape[-1]).sum(axis=1)

    of_slope, of_offset = (per_channel(_column_sums(y)) for y in (cotangent * x, cotangent))
    return cotangent * slope[:, None, None, None], of_slope, of_offset


_affine_on_cpu = jax.custom_vjp(_affine)  # the sums of its gradients are dot products
_affine_on_cpu.defvjp(_affine_forward, _affine_backward)


def affine(x: Volume, slope: PerChannel, offset: PerChannel, layout: Layout) -> Volume:
    """`x * slope + offset`, whose gradient a CPU sums on all cores."""
    return (_affine_on_cpu if layout.form in CPU_FORMS else _affine)(x, slope, offset)


class GroupNorm(nn.Module):
    """Group normalisation over the voxels that count (Wu and He 2018), the others set to zero.

    Statistics are float32 (or wider) whatever the dtype of `x`. Sums and sums of squares are dot
    products, which XLA's CPU backend runs on all cores, unlike its reductions; so are, with a CPU's
    forms of convolutions, the sums of the gradient. With `sliced` ones they are plain sums, since
    for the dot products a TPU would lay every volume anew; and all, up to the ReLU where one
    follows, happens on rows of lanes, as convolutions of as many channels read and write them.
    """

    groups: int
    layout: Layout = Layout()
    relu: bool = False

    @nn.compact
    def __call__(self, x: Volume, mask: Mask) -> Volume:
        shape, channels = x.shape, x.shape[-1]
        count = count_voxels(mask, shape)[:, None]
        voxels = row_voxels(x.shape[3], channels) if self.layout.form == "sliced" else 1
        x, mask = _rows_of_lanes(x, voxels), _lanes_mask(mask, voxels, channels)
        batch = len(x)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        count = (count * (channels // self.groups)).astype(wide.dtype)

        def per_channel(values: Array) -> Array:
            return jnp.tile(jnp.repeat(values, channels // self.groups, axis=1), voxels)

        # About the size of the mean, which would otherwise cancel in the variance.
        shift = _mean_of_some_rows(wide, mask).reshape(batch, voxels, self.groups, -1)
        shift = per_channel(lax.stop_gradient(shift.mean(axis=(1, 3))))
        wide = masked(wide - shift[:, None, None, None], mask)

        def group_sums(values: Array) -> Array:
            plain = self.layout.form == "sliced"
            columns = values.sum(axis=(1, 2)) if plain else _column_sums(values)
            sums = columns.reshape(batch, shape[3], self.groups, -1)
            return sums.sum(axis=(1, 3))

        mean = group_sums(wide) / count
        variance = nn.relu(group_sums(wide * wide) / count - mean * mean)
        inverse = lax.rsqrt(variance + NORM_EPSILON)
        slope = per_channel(inverse) * jnp.tile(scale, voxels)
        offset = jnp.tile(bias, voxels) - per_channel(mean) * slope
        y = affine(wide, slope, offset, self.layout)
        y = masked(y.astype(x.dtype), mask)
        return (nn.relu(y) if self.relu else y).reshape(shape)


def _rows_of_lanes(x: Volume, voxels: int) -> Volume:
    """`voxels` voxels of a row side by side in the channels."""
    return x.reshape(*x.shape[:3], -1, voxels * x.shape[-1])


def _lanes_mask(mask: Mask, voxels: int, channels: int) -> Mask:
    """`mask` for `_rows_of_lanes`."""
    if mask is None or voxels == 1 or mask.shape[3] == 1:
        return mask
    return jnp.repeat(_rows_of_lanes(mask, voxels), channels, axis=-1)


def _mean_of_some_rows(x: Volume, mask: Mask) -> PerChannel:
    """The mean of the voxels that count in every `SAMPLED_ROWS`-th row of every slice.

    Of rows, since depth may be split over devices. 0 where none counts.
    """
    rows = slice(x.shape[2] // 2 % SAMPLED_ROWS, None, SAMPLED_ROWS)
    some = x[:, :, rows]
    if mask is None:
        return some.mean(axis=(1, 2, 3))
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    here = jnp.broadcast_to(mask, (*some.shape[:4], mask.shape[4])).astype(x.dtype)
    return (some * here).sum((1, 2, 3)) / jnp.maximum(here.sum((1, 2, 3)), 1)


class ConvNormAct(nn.Module):
    """Convolution, group norm, ReLU; with a group a channel, the norm is an instance norm."""

    features: int
    groups: int
    kernel: int = 3
    stride: int | Strides = 1
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Volume, mask: Mask) -> Volume:
        """`mask` is of the result's size."""
        x = Conv(self.features, self.kernel, self.stride, self.layout, name="conv")(x)
        return GroupNorm(self.groups, self.layout, relu=True, name="norm")(x, mask)


class Deconv(nn.Module):
    """Transposed convolution with kernel 2 and stride 2: a matrix product and a depth-to-space."""

    features: int
    layout: Layout = Layout()
    bias: bool = False
    kernel_init: nn.initializers.Initializer = kernel_init

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        batch, depth, height, width, channels = x.shape
        kernel = self.param("kernel", self.kernel_init, (2, 2, 2, channels, self.features))
        flat = kernel.transpose(3, 0, 1, 2, 4).reshape(channels, -1)

        def product(x: Volume, flat: Array, _: int) -> Volume:
            return x @ flat.astype(x.dtype)

        y = with_summed_gradient(product, 0, x.astype(self.layout.dtype), flat)
        if self.layout.form in CPU_FORMS:
            # XLA would lay the gradient anew for each of two products.
            y = lax.optimization_barrier(y)
        # Pairs of a row's voxels are moved whole: a TPU pads the last axis to its 128 lanes.
        y = y.reshape(batch, depth, height, width, 2, 2, -1).transpose(0, 1, 4, 2, 5, 3, 6)
        y = y.reshape(batch, 2 * depth, 2 * height, 2 * width, self.features)
        if not self.bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)


def max_pool(x: Volume) -> Volume:
    """2x2x2 maximum with stride 2; sides must be even.

    Tied values share the gradient equally (torch's `amax`; `max_pool3d` picks one), and it is
    deterministic on GPU. Inputs are activations >= 0 with zeros where nothing counts, so a
    half-filled last slice pools to its real half.

    The values are compared with one another, never with their maximum: XLA may compute an
    activation twice, in two fusions that round differently, and then `jnp.max`, whose gradient goes
    to the values that equal the maximum, drops it without a word (seen on CPU).
    """
    x, ties = _larger(*_even_and_odd(x, 3), 1.0, 1.0)
    for axis in (2, 1):
        x, ties = _larger(*_even_and_odd(x, axis), *_even_and_odd(ties, axis))
    return x


def _even_and_odd(x: Array, axis: int) -> tuple[Array, Array]:
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return lax.index_in_dim(pairs, 0, axis + 1, False), lax.index_in_dim(pairs, 1, axis + 1, False)


def _larger(
    a: Array, b: Array, ties_a: Array | float, ties_b: Array | float
) -> tuple[Array, Array]:
    """The larger of `a` and `b`, and how many values it stands for, given theirs.

    In products, not `where`, as `mask_depth` is.
    """
    share = (a == b).astype(a.dtype) * (ties_b / (ties_a + ties_b))  # of the gradient, for b
    ties = (a >= b).astype(a.dtype) * ties_a + (a <= b).astype(a.dtype) * ties_b
    return jnp.where(a < b, b, a + share * (b - a)), ties


def first_max_pool(x: Volume) -> Volume:
    """3x3x3 maximum with stride 2, one voxel past every side (torch's `MaxPool3d(3, 2, 1)`).

    The gradient goes to the first of tied values, as torch's. Axis by axis, each time to the first
    of three: together that is the first of the 27 in order of rows. XLA's own windowed maximum has
    a gradient that scatters, and adds in no fixed order on GPU.
    """
    for axis in (3, 2, 1):
        margins = [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = jnp.pad(x, margins, constant_values=-jnp.inf)
        last = x.shape[axis] - (x.shape[axis] + 1) % 2  # of the windows' first voxels
        x, *others = (lax.slice_in_dim(padded, i, i + last, stride=2, axis=axis) for i in range(3))
        for other in others:
            x = jnp.where(other > x, other, x)
    return x


def average_in_plane(x: Volume, factor: int) -> Volume:
    """Mean over `factor` x `factor` in-plane blocks; sides must be multiples of `factor`."""
    batch, depth, height, width, channels = x.shape
    blocks = x.reshape(batch, depth, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(3, 5))


def recomputed(block: type[Block], wanted: bool, static: tuple[int, ...] = ()) -> type[Block]:
    """`block`, or, where `wanted`, `block` whose insides the backward pass computes again.

    `static` arguments, counted from `self`, are no arrays.
    """
    return nn.remat(block, static_argnums=static) if wanted else block
