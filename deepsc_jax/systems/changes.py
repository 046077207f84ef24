"""Augmentation on the device: a scan's voxels moved by one resampling, then its intensities.

Arrays are as they travel, levels of 16 bits and a lesion mask, and come out so: what is 0 is
outside the lungs and padding, and stays 0; inside it stays above 0. One function serves a whole
scan, a tile cut from a wider box, and a sampled slice, a box one slice deep. The intensities of
scans that are not masked change once they are floats (`recoloured`).
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt16

from deepsc_jax.config import Ints3, TrainConfig
from deepsc_jax.data import augment
from deepsc_jax.data.arrays import LEVELS
from deepsc_jax.runtime import device_mesh

Columns = Mapping[str, Array]  # of one scan: `augment.Augmentation` by name
Levels = UInt16[Array, "depth height width"]
Smooth = Callable[[Array], Array]
Lesion = UInt8[Array, "depth height width"]
Truth = UInt8[Array, "depth height width"]  # lesion masks, or ids of `classes.IDS`

# 1/65535 = 2^-16 + 2^-32 + 2^-48 + ..., so that a level's value, correctly rounded, is the sum of
# two exact products. A division by a constant is not: XLA multiplies by the rounded reciprocal.
_HIGH, _LOW = 2.0**-16, 2.0**-32 + 2.0**-48

POINTS = 10  # control points of the elastic displacement on each axis, the scan's middle in theirs
REACH = 4  # voxels that blur and rim look to each side
_EXACT = lax.Precision.HIGHEST


def unit(levels: UInt16[Array, "*any"]) -> Float[Array, "*any"]:
    """Stored intensities as float32 in [0, 1]: `levels` / 65535, correctly rounded."""
    values = levels.astype(jnp.float32)
    return values * jnp.float32(_HIGH) + values * jnp.float32(_LOW)


def moved(
    levels: Levels,
    truth: Truth,
    columns: Columns,
    middle: Float[Array, "3"],
    start: Int[Array, "3"],
    corner: Int[Array, "3"],
    size: Ints3,
    *,
    classes: bool = False,
) -> tuple[Levels, Truth]:
    """A box of the changed scan, by one linear resampling of scan, lesions and lungs together.

    A voxel is inside a mask where the resampled mask is at least 1/2; intensities are means over
    the lung voxels around, so that the lungs' edge is not darkened. Of a scan that is not masked
    0 is what lies beyond it, and nothing else. A voxel's class is that of the nearest voxel.

    Args:
      levels: a box of the scan; what lies beyond it is 0.
      truth: its lesion mask, or its voxels' classes.
      columns: how the scan changes.
      middle: of the scan, in voxels.
      start: where the box begins in the scan.
      corner: where what is wanted begins in the changed scan.
      size: of what is wanted.
      classes: whether `truth` is of classes.
    """
    packed = device_mesh.whole_depth(levels.astype(jnp.uint32) | truth.astype(jnp.uint32) << 16)
    axes = [jnp.arange(side, dtype=jnp.float32) + corner[i] for i, side in enumerate(size)]
    offsets = [axis - middle[i] for i, axis in enumerate(axes)]
    displaced = _displacement(columns, offsets)
    matrix, low, share = columns["matrix"].reshape(3, 3), [], []
    for i in range(3):
        row = [matrix[i, j] * _along(offsets[j], j) for j in range(3)]
        place = sum(row) + displaced[i] + (middle[i] - start[i])
        low.append(jnp.floor(place).astype(jnp.int32))
        share.append(place - jnp.floor(place))
    value = lung = ill = nearest = jnp.zeros(size, jnp.float32)
    for beyond in itertools.product((0, 1), repeat=3):
        weight, there, index = jnp.float32(1), jnp.bool_(True), []
        for i, (step, last) in enumerate(zip(beyond, packed.shape, strict=True)):
            at = low[i] + step
            weight = weight * (share[i] if step else 1 - share[i])
            there = there & (at >= 0) & (at < last)
            index.append(jnp.clip(at, 0, last - 1))
        word = jnp.where(there, packed[tuple(index)], 0)
        level = (word & 0xFFFF).astype(jnp.uint16)
        value += weight * unit(level)
        lung += weight * (level > 0)
        if classes:
            ill = jnp.where(weight > nearest, (word >> 16).astype(jnp.float32), ill)
            nearest = jnp.maximum(nearest, weight)
        else:
            ill += weight * (word >> 16)
    inside = lung >= 0.5
    shown = _levels(value / jnp.maximum(lung, 0.5), inside)
    return shown, (ill if classes else ill >= 0.5).astype(jnp.uint8)


def textured(
    levels: Levels, lesion: Lesion, columns: Columns, train: TrainConfig, number: Int[Array, ""]
) -> tuple[Levels, Lesion]:
    """A box with other lungs and intensities; only what `train` has an extent for is computed.

    Blur, resolution and rim see nothing beyond the box.

    Args:
      levels: the box.
      lesion: its lesion mask.
      columns: how the scan changes.
      train: the extents.
      number: of the box in its scan: noise is another one in each.
    """
    values, inside = unit(levels), levels > 0
    if train.lung_rim_mm:
        values, inside = _rimmed(values, inside, columns)
    if train.blur_mm:
        values = _mean_inside(values, inside, lambda x: _blurred(x, columns["blur"]))
    if train.coarse_mm:
        values = _mean_inside(values, inside, lambda x: _coarse(x, columns["coarse"]))
    if train.gamma != augment.NONE:
        values = jnp.where(inside, values, 1) ** columns["gamma"]
    if train.noise:
        key = jax.random.fold_in(_key(columns), number)
        values += columns["noise"] * jax.random.normal(key, values.shape, jnp.float32)
    return _levels(values, inside), lesion * inside.astype(jnp.uint8)


def recoloured(
    values: Float[Array, "tile depth height width"],
    columns: Columns,
    intensity: Float[Array, "3"],
    train: TrainConfig,
) -> Float[Array, "tile depth height width"]:
    """Tiles of a scan that is not masked, with other contrast, brightness, gamma and noise.

    As MIScnn's, in its order, of z-scores; but written for values of [0, 1], which may leave it.

    Args:
      values: 0 is what lies beyond the scan, which is shown as its minimum.
      columns: how the scan changes.
      intensity: `preprocess.intensity_of` the scan.
      train: the extents.
    """
    least, mean, deviation = intensity
    values = jnp.where(values > 0, values, least)
    of_tile = functools.partial(jnp.mean, axis=(1, 2, 3), keepdims=True)
    low = values.min(axis=(1, 2, 3), keepdims=True)
    high = values.max(axis=(1, 2, 3), keepdims=True)
    if train.contrast != augment.NONE:
        middle = of_tile(values)
        values = jnp.clip((values - middle) * columns["contrast"] + middle, low, high)
    if train.brightness != augment.NONE:
        values = (values - mean) * columns["brightness"] + mean
    if train.gamma != augment.NONE:
        values = _curved(values, columns["gamma"])
    if train.noise:
        normal = jax.random.normal(_key(columns), values.shape, jnp.float32)
        values += deviation * columns["noise"] * normal
    return values


def _curved(values: Array, gamma: Array) -> Array:
    """Each tile's values to a power, between its extremes; its mean and deviation stay."""
    axes = (1, 2, 3)
    low = values.min(axis=axes, keepdims=True)
    extent = values.max(axis=axes, keepdims=True) - low
    # A tile of one value stays as it is.
    share = jnp.where(extent > 0, (values - low) / jnp.where(extent > 0, extent, 1), 0)
    curved = jnp.where(share > 0, share, 1) ** gamma * (share > 0)
    mean, deviation = (f(values, axis=axes, keepdims=True) for f in (jnp.mean, jnp.std))
    spread = jnp.std(curved, axis=axes, keepdims=True)
    curved = (curved - jnp.mean(curved, axis=axes, keepdims=True)) / jnp.maximum(spread, 1e-6)
    return jnp.where(gamma == 1, values, curved * deviation + mean)


def _levels(values: Float[Array, "..."], inside: Bool[Array, "..."]) -> UInt16[Array, "..."]:
    rounded = jnp.clip(jnp.rint(values * LEVELS), 1, LEVELS)
    return jnp.where(inside, rounded, 0).astype(jnp.uint16)


def _key(columns: Columns) -> Array:
    return jax.random.key(columns["seed"].astype(jnp.uint32))


def _along(values: Float[Array, "n"], axis: int) -> Array:
    """A vector along one of three axes."""
    return values.reshape([-1 if i == axis else 1 for i in range(3)])


def _displacement(columns: Columns, offsets: list[Array]) -> Array:
    """By how many voxels each voxel is displaced, (3, *size): a cubic B-spline of random points."""
    # Of another stream than noise: boxes are numbered from 0.
    key = jax.random.fold_in(_key(columns), 2**31 - 1)
    points = jax.random.truncated_normal(
        key, -augment.ELASTIC_LIMIT, augment.ELASTIC_LIMIT, (3, *[POINTS] * 3), jnp.float32
    )
    points *= columns["displacement"][:, None, None, None]
    weights = []
    for i, offset in enumerate(offsets):
        place = offset / columns["distance"][i] + (POINTS - 1) / 2
        gap = jnp.abs(jnp.clip(place, 1, POINTS - 2)[:, None] - jnp.arange(POINTS))
        near = 2 / 3 - gap**2 + gap**3 / 2
        far = jnp.clip(2 - gap, 0) ** 3 / 6
        weights.append(jnp.where(gap < 1, near, far))
    return jnp.einsum("eijk,ai,bj,ck->eabc", points, *weights, precision=_EXACT, optimize=True)


def _mean_inside(values: Array, inside: Array, smooth: Smooth) -> Array:
    """A linear smoothing of what is inside, by what is inside."""
    shares = inside.astype(jnp.float32)
    return smooth(values * shares) / jnp.maximum(smooth(shares), 1e-6)


def _shifted(x: Array, by: int, axis: int, fill: float) -> Array:
    """`x[i + by]` along an axis, `fill` beyond its ends."""
    if abs(by) >= x.shape[axis]:
        return jnp.full_like(x, fill)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (max(-by, 0), max(by, 0))
    padded = jnp.pad(x, pads, constant_values=fill)
    return lax.slice_in_dim(padded, max(by, 0), max(by, 0) + x.shape[axis], axis=axis)


def _blurred(x: Array, sigma: Float[Array, "3"]) -> Array:
    for axis in range(3):
        steps = jnp.arange(-REACH, REACH + 1)
        weights = jnp.exp(-0.5 * (steps / jnp.maximum(sigma[axis], 1e-3)) ** 2)
        weights /= weights.sum()
        parts = [weights[k + REACH] * _shifted(x, k, axis, 0) for k in range(-REACH, REACH + 1)]
        x = functools.reduce(jnp.add, parts)
    return x


def _coarse(x: Array, side: Float[Array, "3"]) -> Array:
    """Linear between every `side`-th voxel, on each axis."""
    for axis in range(3):
        last = x.shape[axis] - 1
        place = jnp.arange(last + 1)
        low = jnp.floor(place / side[axis]) * side[axis]
        share = (place - low) / side[axis]
        below, above = (
            jnp.take(x, jnp.clip(jnp.rint(at), 0, last).astype(jnp.int32), axis=axis)
            for at in (low, low + side[axis])
        )
        share = _along(share, axis)
        x = below * (1 - share) + above * share
    return x


def _rimmed(values: Array, inside: Array, columns: Columns) -> tuple[Array, Array]:
    """Lungs that reach `rim` mm farther, soft tissue taken in, or less far where it is below 0."""
    rim = columns["rim"]
    grows = rim > 0
    # What the mask grows from, or what it shrinks from.
    distance = jnp.where(jnp.where(grows, inside, ~inside), 0.0, jnp.inf)
    for axis in range(3):
        steps = [
            _shifted(distance, k, axis, jnp.inf) + (k * columns["spacing"][axis]) ** 2
            for k in range(-REACH, REACH + 1)
        ]
        distance = jnp.stack(steps).min(axis=0)
    near = distance <= rim**2
    reached = jnp.where(grows, near, inside & ~near)
    return jnp.where(inside, values, columns["tissue"]), reached
