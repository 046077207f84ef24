"""3D convolution of channel-last volumes, in the forms that run fast on each kind of device.

`native` is one 3D convolution.

`banded` is for GPUs, whose tensor cores 4, 16 or 32 channels leave mostly idle: neighbouring voxels
of a row become channels, those beyond the group's ends beside them, and the kernel a band. 27 % of
a joint step's products are then with zeros, and it takes 0.38 of the time (H100, bfloat16).

`sliced` is for TPUs, whose vectors have 128 lanes: bands whose outputs fill them, and for every
slice of the kernel a 2D convolution of these, with depth as the batch, summed. Native convolutions
of one tile are cut up by XLA into a batch, and copied for it. By the cycles that XLA's TPU compiler
expects, two 16-channel convolutions of 64x128x128 voxels with norms and gradients take 0.14 of
theirs (v5e); nothing was measured on a TPU.

`folded` is for XLA's CPU backend, several times as fast there: 2D convolutions with depth folded
into the batch. Shifted slices are stacked along channels; with very few channels
(`GROUPED_CHANNELS`) several slices are also computed together, as channels; or, from
`STACKED_CHANNELS` input channels up, one 2D convolution per kernel slice is summed. What does not
fit the cache goes slab by slab along depth.

`direct` is for CPUs as well, where XLA has oneDNN (`parallel.has_onednn`): one 3D convolution, also
for the gradient of its input, by oneDNN; the gradient of its kernel by Eigen; what is strided, as
`folded`. A joint step of phantoms took 0.73 of the time of `folded` (two cores of a Xeon, JAX
0.11.2). XLA cannot keep such a program on disk.

The backward pass of bands, slices and slabs stacks again what the forward pass stacked: the
network's memory would be mostly stacks.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deepsc_jax.runtime import device_mesh

Volume = Float[Array, "batch depth height width channel"]
ConvForm = Literal["native", "banded", "sliced", "folded", "direct"]
CPU_FORMS: tuple[ConvForm, ...] = ("folded", "direct")
# Of a band: its voxels, and the channels that they may fill on its narrower and its wider side. By
# timings of 1 to 64 channels on an H100: at 64 a band is slower.
BAND_VOXELS, BAND_NARROW, BAND_WIDE = (16, 8, 4, 2), 64, 128
# In shorter rows XLA takes a kernel's gradient for a forward convolution, and turns volumes for it.
BAND_GROUPS = 8
LANE_VOXELS, LANES = (32, 16, 8, 4, 2), 128  # of a TPU's vectors
TENSOR_CHANNELS = 8  # a multiple of it is what tensor cores take of 16-bit values
STACKED_CHANNELS = 32
GROUPED_CHANNELS, GROUPED_SLICES = 4, 4  # a quarter of the time at 2 channels, none gained at 8
# Of a slab, stacked: what stays in a CPU's last cache, and the slices of which it has a multiple.
SLAB_BYTES, SLAB_SLICES = 2**24, 8
# Of a kernel's gradient, since each is a convolution to compile; of many scans, slabs are larger.
MOST_SLABS = 16


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
    if not device_mesh.depth_is_split():
        return operation(x, kernel, reach)

    @jax.custom_vjp
    def apply(x: Volume, kernel: Array) -> Volume:
        return operation(x, kernel, reach)

    def forward(x: Volume, kernel: Array) -> tuple[Volume, tuple[Volume, Array]]:
        return apply(x, kernel), (x, kernel)

    def share(x: Volume, cotangent: Volume, kernel: Array) -> Array:
        seen = device_mesh.with_neighbours(x, reach)
        return jax.vjp(lambda k: operation(seen, k, 0), kernel)[1](cotangent)[0]

    def backward(saved: tuple[Volume, Array], cotangent: Volume) -> tuple[Volume, Array]:
        x, kernel = saved
        of_x = jax.vjp(lambda x: operation(x, kernel, reach), x)[1](cotangent)[0]
        return of_x, device_mesh.sum_over_space(share, (x, cotangent), kernel)

    apply.defvjp(forward, backward)
    return apply(x, kernel)


def conv3d(x: Volume, kernel: Float[Array, "kd kh kw cin cout"], stride: int, form: str) -> Volume:
    """Convolution with zero padding of k // 2 on both sides (torch's `padding=k // 2`).

    Args:
      x: `(batch, depth, height, width, cin)`.
      kernel: odd sizes; cast to the dtype of `x`.
      stride: in-plane; depth keeps stride 1.
      form: one of `ConvForm`.
    """
    reach = kernel.shape[0] // 2
    if form == "direct" and stride == 1 and kernel.shape[:3] != (1, 1, 1):
        return _stacking(x, kernel, _whole, stride, reach)
    if form not in CPU_FORMS:  # what is strided is folded in both

        def convolve(x: Volume, kernel: Array, reach: int) -> Volume:
            if kernel.shape[:4] == (1, 1, 1, 1) and stride == 1:
                return (x * kernel[0, 0, 0, 0]).astype(x.dtype)  # fused with what follows
            if form == "sliced":
                return _stacking(x, kernel, _sliced, stride, reach)
            if form == "banded" and _band_voxels(x.shape[3], kernel.shape, stride) > 1:
                return _stacking(x, kernel, _banded, stride, reach)
            return _whole(x, kernel, stride, reach)

        return with_summed_gradient(convolve, reach, x, kernel)
    if kernel.shape[:3] == (1, 1, 1) and stride == 1:
        return x @ kernel[0, 0, 0].astype(x.dtype)
    # One slab keeps what it stacked: nothing was gained by `_kernel_gradient` on phantoms.
    if _slab_slices(x, kernel.shape[0]) >= x.shape[1]:
        return _in_slabs(x, kernel, stride, reach)
    return _stacking(x, kernel, _in_slabs, stride, reach)


def _native(x: Volume, kernel: Array, strides: tuple[int, int], reaches: tuple[int, ...]) -> Volume:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (1, *strides),
        [(reach, reach) for reach in reaches],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _stacking(
    x: Volume, kernel: Array, form: Callable[..., Volume], stride: int, reach: int
) -> Volume:
    """`form(x, kernel, stride, reach)`, which keeps nothing but its arguments for its gradient."""
    return form(x, kernel, stride, reach)


def _forward(
    x: Volume, kernel: Array, form: Callable[..., Volume], stride: int, reach: int
) -> tuple[Volume, tuple[Volume, Array]]:
    return form(x, kernel, stride, reach), (x, kernel)


def _backward(
    form: Callable[..., Volume],
    stride: int,
    reach: int,
    saved: tuple[Volume, Array],
    cotangent: Volume,
) -> tuple[Volume, Array]:
    x, kernel = saved
    # The transpose of a sum in float32 would convert its cotangent to float32.
    linear = functools.partial(_sliced, single=False) if form is _sliced else form
    if stride == 1:
        turned = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
        # Fused with a band's padding, a turned kernel crashes libtpu 0.0.42's compiler; and XLA
        # gives oneDNN no convolution whose kernel it reverses.
        if form in (_sliced, _whole):
            turned = lax.optimization_barrier(turned)
        of_x = form(cotangent, turned, 1, kernel.shape[0] - 1 - reach)
    else:
        of_x = jax.linear_transpose(lambda x: linear(x, kernel, stride, reach), x)(cotangent)[0]
    if stride == 1 and form in (_whole, _in_slabs):
        assert reach == kernel.shape[0] // 2
        return of_x, _kernel_gradient(x, cotangent, kernel)
    return of_x, jax.linear_transpose(lambda k: linear(x, k, stride, reach), kernel)(cotangent)[0]


_stacking.defvjp(_forward, _backward)


def _band_voxels(width: int, kernel_shape: tuple[int, ...], stride: int) -> int:
    """How many voxels of a row `_banded` takes together; 1 for no band."""
    channels, features = kernel_shape[3], kernel_shape[4] / stride
    narrow, wide = min(channels, features), max(channels, features)
    for group in BAND_VOXELS:
        whole = width % group == group % stride == 0 and width >= BAND_GROUPS * group
        fills = group * narrow <= BAND_NARROW and group * wide <= BAND_WIDE
        if whole and fills and group >= kernel_shape[2] // 2:
            return group
    return 1


def _lane_voxels(width: int, kernel_shape: tuple[int, ...], stride: int) -> int:
    """How many voxels of a row `_sliced` takes together; 1 for no band."""
    channels = max(kernel_shape[3], kernel_shape[4] // stride)
    group = row_voxels(width, channels)
    return group if group % stride == 0 and group >= kernel_shape[2] // 2 else 1


def row_voxels(width: int, channels: int) -> int:
    """How many voxels of a row fill a TPU's lanes with their channels; 1 if no two fit."""
    fitting = (g for g in LANE_VOXELS if width % g == 0 and g * channels <= LANES)
    return next(fitting, 1)


def _whole(x: Volume, kernel: Array, stride: int, reach: int) -> Volume:
    """`conv3d` as one convolution."""
    in_plane = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return _native(x, kernel, (stride, stride), (reach, *in_plane))


def _kernel_gradient(x: Volume, cotangent: Volume, kernel: Array) -> Array:
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
    size = max(_slab_slices(rows[None], shifts), -(-len(rows) // MOST_SLABS))
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


def _banded(x: Volume, kernel: Array, stride: int, reach: int) -> Volume:
    """`conv3d` as one convolution of bands."""
    group = _band_voxels(x.shape[3], kernel.shape, stride)
    return _in_bands(x, kernel, stride, reach, group, _native)


def _sliced(x: Volume, kernel: Array, stride: int, reach: int, single: bool = True) -> Volume:
    """`conv3d` as a sum of 2D convolutions, of bands where several voxels of a row fit the lanes.

    Summed in float32 or wider if `single`, else in the dtype of `x`, as some gradients are.
    """
    group = _lane_voxels(x.shape[3], kernel.shape, stride)
    convolve = functools.partial(_by_slices, single=single)
    if group > 1:
        return _in_bands(x, kernel, stride, reach, group, convolve)
    in_plane = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return convolve(x, kernel, (stride, stride), (reach, *in_plane))


def _by_slices(
    x: Volume, kernel: Array, strides: tuple[int, int], reaches: tuple[int, ...], single: bool
) -> Volume:
    """`_native`, slice by slice of the kernel.

    Args:
      x: `(batch, depth, height, width, cin)`.
      kernel: `(kd, kh, kw, cin, cout)`.
      strides: in-plane.
      reaches: zero padding of depth, height and width, on both sides.
      single: whether to sum in float32 or wider.
    """
    reach, *in_plane = reaches
    x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
    depth = x.shape[1] - kernel.shape[0] + 1
    kernel = kernel.astype(x.dtype)

    def conv2d(volume: Volume, weights: Float[Array, "kh kw cin cout"]) -> Volume:
        y = lax.conv_general_dilated(
            volume.reshape(-1, *volume.shape[2:]),
            weights,
            strides,
            [(margin, margin) for margin in in_plane],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32) if single else None,
        )
        return y.reshape(*volume.shape[:2], *y.shape[1:])

    parts = [conv2d(x[:, i : i + depth], weights) for i, weights in enumerate(kernel)]
    return sum(parts[1:], parts[0]).astype(x.dtype)


def _in_bands(
    x: Volume, kernel: Array, stride: int, reach: int, group: int, convolve: Callable[..., Volume]
) -> Volume:
    """`conv3d` from groups of voxels of a row, and those around each, to every `stride`-th.

    More around them where that makes a multiple of `TENSOR_CHANNELS`. The band is made in the
    kernel's own dtype, in which so many shares of its gradient are summed.
    """
    *volume, width, channels = x.shape
    around = margin = kernel.shape[2] // 2
    while around < group and (group + 2 * around) * channels % TENSOR_CHANNELS:
        around += 1
    rows = x.reshape(*volume, width // group, group * channels)
    none = ((0, 0),) * 3
    before = jnp.pad(rows[..., :-1, (group - around) * channels :], (*none, (1, 0), (0, 0)))
    after = jnp.pad(rows[..., 1:, : around * channels], (*none, (0, 1), (0, 0)))
    rows = jnp.concatenate([before, rows, after], axis=-1)
    taps = jnp.pad(kernel, (*none[:2], (around - margin,) * 2, *none[:2])).transpose(2, 0, 1, 3, 4)
    band = _band(taps, group, stride)[:, :, None]
    y = convolve(rows, band, (stride, 1), (reach, kernel.shape[1] // 2, 0))
    return y.reshape(*y.shape[:3], -1, kernel.shape[-1])


def _in_slabs(x: Volume, kernel: Array, stride: int, reach: int) -> Volume:
    """`conv3d` slab by slab, of a depth that is not split over devices.

    Each is cut from `x` with its neighbours along depth; the whole volume is never padded.
    """
    depth, size = x.shape[1], _slab_slices(x, kernel.shape[0])
    assert reach == kernel.shape[0] // 2
    parts = []
    for first in range(0, depth, size):
        start, stop = first - reach, min(first + size, depth) + reach
        missing = (max(-start, 0), max(stop - depth, 0))
        slab = jnp.pad(x[:, max(start, 0) : stop], ((0, 0), missing, (0, 0), (0, 0), (0, 0)))
        parts.append(_slab(slab, kernel, stride))
    return jnp.concatenate(parts, axis=1)


def _slab_slices(x: Volume, taps: int) -> int:
    """How many slices a slab has: what stays in a cache, stacked."""
    stacked_slice = x.size // x.shape[1] * taps * x.dtype.itemsize
    return max(SLAB_BYTES // stacked_slice // SLAB_SLICES, 1) * SLAB_SLICES


def _slab(padded: Volume, kernel: Array, stride: int) -> Volume:
    """`conv3d` of slices that come with their neighbours along depth."""
    kernel = kernel.astype(padded.dtype)
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
    y = conv2d(stacked, _band(kernel, group))
    y = y.reshape(*y.shape[:4], group, -1).transpose(0, 1, 4, 2, 3, 5)
    return y.reshape(batch, -1, *y.shape[3:])[:, :depth]


def _band(
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
