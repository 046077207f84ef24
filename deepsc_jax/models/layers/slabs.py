"""Convolutions for CPUs: slab by slab along depth, and the gradient of a kernel."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deepsc_jax.models.layers.bands import band
from deepsc_jax.models.layers.layout import Strides, Volume

STACKED_CHANNELS = 32
GROUPED_CHANNELS, GROUPED_SLICES = 4, 4  # a quarter of the time at 2 channels, none gained at 8
# Of a slab, stacked: what stays in a CPU's last cache, and the slices of which it has a multiple.
SLAB_BYTES, SLAB_SLICES = 2**24, 8
# Of a kernel's gradient, since each is a convolution to compile; of many scans, slabs are larger.
MOST_SLABS = 16


def in_slabs(x: Volume, kernel: Array, strides: Strides, reach: int) -> Volume:
    """`conv3d` slab by slab, of a depth that is not split over devices.

    Each is cut from `x` with its neighbours along depth; the whole volume is never padded.
    """
    depth, size, step = x.shape[1], slab_slices(x, kernel.shape[0]), strides[0]
    assert reach == kernel.shape[0] // 2
    size = -(-size // step) * step  # so that every slab begins with a slice that is kept
    parts = []
    for first in range(0, depth, size):
        start, stop = first - reach, min(first + size, depth) + reach
        missing = (max(-start, 0), max(stop - depth, 0))
        slab = jnp.pad(x[:, max(start, 0) : stop], ((0, 0), missing, (0, 0), (0, 0), (0, 0)))
        parts.append(_slab(slab, kernel, strides))
    return jnp.concatenate(parts, axis=1)


def slab_slices(x: Volume, taps: int) -> int:
    """How many slices a slab has: what stays in a cache, stacked."""
    stacked_slice = x.size // x.shape[1] * taps * x.dtype.itemsize
    return max(SLAB_BYTES // stacked_slice // SLAB_SLICES, 1) * SLAB_SLICES


def _slab(padded: Volume, kernel: Array, strides: Strides) -> Volume:
    """`conv3d` of slices that come with their neighbours along depth."""
    kernel = kernel.astype(padded.dtype)
    taps, *window, channels, features = kernel.shape
    batch, slices, height, width, _ = padded.shape
    step, stride = strides
    depth = slices - taps + 1  # before every `step`-th slice is taken
    padding = [(k // 2, k // 2) for k in window]

    def conv2d(volume: Volume, weights: Float[Array, "kh kw cin cout"]) -> Volume:
        folded = volume.reshape(-1, height, width, volume.shape[-1])
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            folded, weights, (stride, stride), padding, dimension_numbers=dims
        )
        return y.reshape(*volume.shape[:2], *y.shape[1:])

    if taps == 1:
        return conv2d(padded[:, ::step], kernel[0])
    if channels >= STACKED_CHANNELS:
        parts = [conv2d(padded[:, i : i + depth : step], kernel[i]) for i in range(taps)]
        return sum(parts[1:], parts[0])
    grouped = step == 1 and max(channels, features) <= GROUPED_CHANNELS
    group = GROUPED_SLICES if grouped else 1
    padded = jnp.pad(padded, ((0, 0), (0, -depth % group), (0, 0), (0, 0), (0, 0)))
    reach = group + taps - 1
    last = padded.shape[1] - reach + 1
    shifted = [padded[:, i : last + i : group * step] for i in range(reach)]
    stacked = jnp.concatenate(shifted, axis=-1)
    y = conv2d(stacked, band(kernel, group))
    y = y.reshape(*y.shape[:4], group, -1).transpose(0, 1, 4, 2, 3, 5)
    return y.reshape(batch, -1, *y.shape[3:])[:, :depth]


def kernel_gradient(x: Volume, cotangent: Volume, kernel: Array) -> Array:
    """The gradient of a kernel, on CPU: the cotangent is the image, `x` the kernel.

    The slices of all scans are one image of depth and height, whose channels are the voxels of a
    row; slab by slab, what the kernel's width shifts is stacked, and so copied once: the image
    Eigen copies for each place of the kernel (the other way round it took 1.4 to 2 times as long).
    oneDNN, with a window as large as the image, takes up to three times as long as Eigen: XLA gives
    it no reversed kernel.
    """
    shifts = kernel.shape[2]
    margin, tall, wide = (k // 2 for k in kernel.shape[:3])
    *_, height, width, channels = x.shape
    apart = (0, margin if len(x) > 1 else 0)  # zero slices between scans
    none = (0, 0)
    rows = jnp.pad(x, (none, apart, none, (wide, wide), none))
    rows = rows.reshape(-1, height, width + 2 * wide, channels)
    image = jnp.pad(cotangent, (none, apart, none, none, none))
    image = image.reshape(-1, height, width, image.shape[-1])
    size = max(slab_slices(rows[None], shifts), -(-len(rows) // MOST_SLABS))
    total = jnp.zeros((), kernel.dtype)
    for first in range(0, len(rows), size):
        last = min(first + size, len(rows))
        start, stop = max(first - margin, 0), min(last + margin, len(rows))
        slab = rows[first:last]
        stacked = jnp.concatenate([slab[:, :, i : i + width] for i in range(shifts)], axis=-1)
        part = lax.conv_general_dilated(
            image[start:stop].transpose(3, 0, 1, 2),
            lax.rev(stacked, (3,)),
            (1, 1),
            [(start - first + margin, last + margin - stop), (tall, tall)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        total += part.astype(kernel.dtype)
    # Both roles exchanged, the kernel comes out turned in depth and height; and stacked, reversed.
    total = total[:, ::-1, ::-1, ::-1].reshape(*total.shape[:3], shifts, channels)
    return total.transpose(1, 2, 3, 4, 0)
