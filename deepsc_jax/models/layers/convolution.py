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

`direct` is for CPUs as well, where XLA has oneDNN (`compiler.has_onednn`): one 3D convolution,
also for the gradient of its input, by oneDNN; the gradient of its kernel by Eigen; what is strided,
as `folded`. A joint step of phantoms took 0.73 of the time of `folded` (two cores of a Xeon, JAX
0.11.2). XLA cannot keep such a program on disk.

The backward pass of bands, slices and slabs stacks again what the forward pass stacked: the
network's memory would be mostly stacks.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float

from deepsc_jax.models.layers.bands import band_voxels, banded, sliced, whole
from deepsc_jax.models.layers.layout import CPU_FORMS, ConvForm, Strides, Volume
from deepsc_jax.models.layers.slabs import in_slabs, kernel_gradient, slab_slices
from deepsc_jax.runtime import device_mesh

Convolution = Callable[[Volume, Array, Strides, int], Volume]


@dataclasses.dataclass(frozen=True)
class Form:
    """The functions of a form of convolution, and of its gradients.

    Attributes:
      forward: the convolution `(x, kernel, strides, reach)`, with so many slices of zero padding.
      transposed: the one whose transposes are the gradients that have no function of their own.
      kernel_gradient: `(x, cotangent, kernel)`, at strides of 1.
      turned_apart: whether the input's gradient keeps its turned kernel apart from what made it.
    """

    forward: Convolution
    transposed: Convolution
    kernel_gradient: Callable[[Volume, Volume, Array], Array] | None = None
    turned_apart: bool = False


# XLA gives oneDNN no convolution whose kernel it reverses; and, fused with a band's padding, a
# turned kernel crashes libtpu 0.0.42's compiler.
WHOLE = Form(whole, whole, kernel_gradient, turned_apart=True)
BANDED = Form(banded, banded)
# The transpose of a sum in float32 would convert its cotangent to float32.
SLICED = Form(sliced, functools.partial(sliced, single=False), turned_apart=True)
FOLDED = Form(in_slabs, in_slabs, kernel_gradient)


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


def conv3d(
    x: Volume, kernel: Float[Array, "kd kh kw cin cout"], stride: int | Strides, form: ConvForm
) -> Volume:
    """Convolution with zero padding of k // 2 on both sides (torch's `padding=k // 2`).

    Args:
      x: `(batch, depth, height, width, cin)`.
      kernel: odd sizes; cast to the dtype of `x`.
      stride: in-plane, where depth keeps stride 1; or of depth, and in-plane.
      form: how it is computed.
    """
    reach = kernel.shape[0] // 2
    strides = (1, stride) if isinstance(stride, int) else stride
    if form == "direct" and strides == (1, 1) and kernel.shape[:3] != (1, 1, 1):
        return _stacking(x, kernel, WHOLE, strides, reach)
    if form not in CPU_FORMS:  # what is strided is folded in both

        def convolve(x: Volume, kernel: Array, reach: int) -> Volume:
            if kernel.shape[:4] == (1, 1, 1, 1) and strides == (1, 1):
                return (x * kernel[0, 0, 0, 0]).astype(x.dtype)  # fused with what follows
            if form == "sliced":
                return _stacking(x, kernel, SLICED, strides, reach)
            if form == "banded" and band_voxels(x.shape[3], kernel.shape, strides[1]) > 1:
                return _stacking(x, kernel, BANDED, strides, reach)
            return whole(x, kernel, strides, reach)

        return with_summed_gradient(convolve, reach, x, kernel)
    if kernel.shape[:3] == (1, 1, 1) and strides == (1, 1):
        return x @ kernel[0, 0, 0].astype(x.dtype)
    # One slab keeps what it stacked: nothing was gained by `kernel_gradient` on phantoms.
    if slab_slices(x, kernel.shape[0]) >= x.shape[1]:
        return in_slabs(x, kernel, strides, reach)
    return _stacking(x, kernel, FOLDED, strides, reach)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _stacking(x: Volume, kernel: Array, form: Form, strides: Strides, reach: int) -> Volume:
    """The convolution, which keeps nothing but its arguments for its gradient."""
    return form.forward(x, kernel, strides, reach)


def _forward(
    x: Volume, kernel: Array, form: Form, strides: Strides, reach: int
) -> tuple[Volume, tuple[Volume, Array]]:
    return form.forward(x, kernel, strides, reach), (x, kernel)


def _backward(
    form: Form, strides: Strides, reach: int, saved: tuple[Volume, Array], cotangent: Volume
) -> tuple[Volume, Array]:
    x, kernel = saved

    def of_input(x: Volume) -> Volume:
        return form.transposed(x, kernel, strides, reach)

    def of_kernel(kernel: Array) -> Volume:
        return form.transposed(x, kernel, strides, reach)

    if strides != (1, 1):
        of_x = jax.linear_transpose(of_input, x)(cotangent)[0]
        return of_x, jax.linear_transpose(of_kernel, kernel)(cotangent)[0]
    turned = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    if form.turned_apart:
        turned = lax.optimization_barrier(turned)
    of_x = form.forward(cotangent, turned, strides, kernel.shape[0] - 1 - reach)
    if form.kernel_gradient is None:
        return of_x, jax.linear_transpose(of_kernel, kernel)(cotangent)[0]
    assert reach == kernel.shape[0] // 2
    return of_x, form.kernel_gradient(x, cotangent, kernel)


_stacking.defvjp(_forward, _backward)
