"""Convolutions for GPUs and TPUs: as one, in bands of a row's voxels, and slice by slice."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deepsc_jax.models.layers.layout import Strides, Volume

# Of a band: its voxels, and the channels that they may fill on its narrower and its wider side. By
# timings of 1 to 64 channels on an H100: at 64 a band is slower.
BAND_VOXELS, BAND_NARROW, BAND_WIDE = (16, 8, 4, 2), 64, 128
# In shorter rows XLA takes a kernel's gradient for a forward convolution, and turns volumes for it.
BAND_GROUPS = 8
LANE_VOXELS, LANES = (32, 16, 8, 4, 2), 128  # of a TPU's vectors
TENSOR_CHANNELS = 8  # a multiple of it is what tensor cores take of 16-bit values


def native(x: Volume, kernel: Array, strides: tuple[int, ...], reaches: tuple[int, ...]) -> Volume:
    """One convolution with so much zero padding on both sides of depth, height and width."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        strides,
        [(reach, reach) for reach in reaches],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def whole(x: Volume, kernel: Array, strides: Strides, reach: int) -> Volume:
    """`conv3d` as one convolution."""
    in_plane = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return native(x, kernel, (*strides, strides[1]), (reach, *in_plane))


def band_voxels(width: int, kernel_shape: tuple[int, ...], stride: int) -> int:
    """How many voxels of a row `banded` takes together; 1 for no band."""
    channels, features = kernel_shape[3], kernel_shape[4] / stride
    narrow, wide = min(channels, features), max(channels, features)
    for group in BAND_VOXELS:
        whole = width % group == group % stride == 0 and width >= BAND_GROUPS * group
        fills = group * narrow <= BAND_NARROW and group * wide <= BAND_WIDE
        if whole and fills and group >= kernel_shape[2] // 2:
            return group
    return 1


def lane_voxels(width: int, kernel_shape: tuple[int, ...], stride: int) -> int:
    """How many voxels of a row `sliced` takes together; 1 for no band."""
    channels = max(kernel_shape[3], kernel_shape[4] // stride)
    group = row_voxels(width, channels)
    return group if group % stride == 0 and group >= kernel_shape[2] // 2 else 1


def row_voxels(width: int, channels: int) -> int:
    """How many voxels of a row fill a TPU's lanes with their channels; 1 if no two fit."""
    fitting = (g for g in LANE_VOXELS if width % g == 0 and g * channels <= LANES)
    return next(fitting, 1)


def banded(x: Volume, kernel: Array, strides: Strides, reach: int) -> Volume:
    """`conv3d` as one convolution of bands."""
    group = band_voxels(x.shape[3], kernel.shape, strides[1])
    return _in_bands(x, kernel, strides, reach, group, native)


def sliced(x: Volume, kernel: Array, strides: Strides, reach: int, single: bool = True) -> Volume:
    """`conv3d` as a sum of 2D convolutions, of bands where several voxels of a row fit the lanes.

    Summed in float32 or wider if `single`, else in the dtype of `x`, as some gradients are.
    """
    group = lane_voxels(x.shape[3], kernel.shape, strides[1])
    convolve = functools.partial(_by_slices, single=single)
    if group > 1:
        return _in_bands(x, kernel, strides, reach, group, convolve)
    in_plane = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return convolve(x, kernel, (*strides, strides[1]), (reach, *in_plane))


def _by_slices(
    x: Volume, kernel: Array, strides: tuple[int, ...], reaches: tuple[int, ...], single: bool
) -> Volume:
    """`native`, slice by slice of the kernel.

    Args:
      x: `(batch, depth, height, width, cin)`.
      kernel: `(kd, kh, kw, cin, cout)`.
      strides: along depth, height and width.
      reaches: zero padding of depth, height and width, on both sides.
      single: whether to sum in float32 or wider.
    """
    reach, *in_plane = reaches
    step, *steps = strides
    x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
    depth = x.shape[1] - kernel.shape[0] + 1  # before every `step`-th slice is taken
    kernel = kernel.astype(x.dtype)

    def conv2d(volume: Volume, weights: Float[Array, "kh kw cin cout"]) -> Volume:
        y = lax.conv_general_dilated(
            volume.reshape(-1, *volume.shape[2:]),
            weights,
            steps,
            [(margin, margin) for margin in in_plane],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32) if single else None,
        )
        return y.reshape(*volume.shape[:2], *y.shape[1:])

    parts = [conv2d(x[:, i : i + depth : step], weights) for i, weights in enumerate(kernel)]
    return sum(parts[1:], parts[0]).astype(x.dtype)


def _in_bands(
    x: Volume,
    kernel: Array,
    strides: Strides,
    reach: int,
    group: int,
    convolve: Callable[..., Volume],
) -> Volume:
    """`conv3d` from groups of voxels of a row, and those around each, to every `stride`-th.

    More around them where that makes a multiple of `TENSOR_CHANNELS`. The band is made in the
    kernel's own dtype, in which so many shares of its gradient are summed.
    """
    *volume, width, channels = x.shape
    step, stride = strides
    around = margin = kernel.shape[2] // 2
    while around < group and (group + 2 * around) * channels % TENSOR_CHANNELS:
        around += 1
    rows = x.reshape(*volume, width // group, group * channels)
    none = ((0, 0),) * 3
    before = jnp.pad(rows[..., :-1, (group - around) * channels :], (*none, (1, 0), (0, 0)))
    after = jnp.pad(rows[..., 1:, : around * channels], (*none, (0, 1), (0, 0)))
    rows = jnp.concatenate([before, rows, after], axis=-1)
    taps = jnp.pad(kernel, (*none[:2], (around - margin,) * 2, *none[:2])).transpose(2, 0, 1, 3, 4)
    banded_kernel = band(taps, group, stride)[:, :, None]
    y = convolve(rows, banded_kernel, (step, stride, 1), (reach, kernel.shape[1] // 2, 0))
    return y.reshape(*y.shape[:3], -1, kernel.shape[-1])


def band(
    kernel: Float[Array, "taps ka kb cin cout"], group: int, stride: int = 1
) -> Float[Array, "ka kb stacked grouped"]:
    """The kernel from group + taps - 1 stacked places to every `stride`-th of a group."""
    taps, *window, channels, _ = kernel.shape
    columns = [
        jnp.pad(kernel, ((i, group - 1 - i), (0, 0), (0, 0), (0, 0), (0, 0)))
        for i in range(0, group, stride)
    ]
    band = jnp.stack(columns, axis=-2).transpose(1, 2, 0, 3, 4, 5)
    return band.reshape(*window, (group + taps - 1) * channels, -1)
