"""The one geometric primitive: linear resampling between the grids of a scan.

A scan's coordinates are voxels of its working grid: voxel j spans [j, j + 1) and has its centre at
j + 1/2. Tiles (at full, 1/2, 1/4 and 1/8 resolution) and the stack of sampled slices are grids in
these coordinates, and every crop, pad and change of scale in the model is `resample` between two of
them: the paper's "zero-padding and 3D cropping" with the resampling that unequal grids need.

Values are linear between voxel centres, held between the outermost centre and the edge of the
source's box, and zero outside it. There is no antialiasing and no renormalisation.

In-plane, grids are regular with steps 1, 2, 4 or 8 and origins on multiples of the coarser step, so
that a change of scale is a fixed pattern; along depth, slice i of the stack lies at
floor(i * D / T) + 1/2, which is not regular, so depth takes a small weight matrix per scan.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deepsc_jax.geometry.sampling import slice_indices
from deepsc_jax.runtime import device_mesh

Part = Float[Array, "depth height width channel"]
# Of float32 products that must stay float32: by default they are TF32 on GPU, bfloat16 on TPU.
EXACT = lax.Precision.HIGHEST


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["centres", "count", "low", "high", "origin"],
    meta_fields=["step", "size"],
)
@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of an array `(depth, height, width, ...)` lie in its scan.

    Attributes:
      centres: depth of every slice's centre, ascending.
      count: how many of them are real; the others are padding.
      low: where the box begins along depth.
      high: where it ends.
      origin: row and column, in scan voxels, of the corner of the in-plane box.
      step: in-plane size of a voxel, in scan voxels.
      size: height and width in voxels of this grid.
    """

    centres: Float[Array, "n"]
    count: Int[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    origin: Int[Array, "2"]
    step: int
    size: tuple[int, int]


def tile_grid(
    origin: Int[Array, "3"], tile: tuple[int, int, int], depth: Int[Array, ""], scale: int = 1
) -> Grid:
    """The grid of a tile, or of its features at 1/scale.

    Args:
      origin: scan voxel of the tile's corner.
      tile: depth, height and width of the tile at full resolution.
      depth: the scan's true number of slices D; what the tile holds past it is padding.
      scale: 1, 2, 4 or 8.
    """
    real = jnp.result_type(float)
    start = origin[0].astype(real)
    valid = jnp.clip(depth - origin[0], 0, tile[0])
    count = -(-valid // scale)
    slices = jnp.arange(tile[0] // scale, dtype=real)
    return Grid(
        centres=start + (slices + 0.5) * scale,
        count=count,
        low=start,
        high=start + (count * scale).astype(real),
        origin=origin[1:],
        step=scale,
        size=(tile[1] // scale, tile[2] // scale),
    )


def slice_grid(depth: Int[Array, ""], slices: int, size: tuple[int, int], step: int = 1) -> Grid:
    """The grid of the stack of T sampled slices, or of its features at in-plane 1/step.

    Args:
      depth: the scan's true number of slices D.
      slices: T.
      size: height and width of the working grid.
      step: 1, 2, 4 or 8.
    """
    real = jnp.result_type(float)
    return Grid(
        centres=slice_indices(depth, slices).astype(real) + 0.5,
        count=jnp.asarray(slices),
        low=jnp.zeros((), real),
        high=depth.astype(real),
        origin=jnp.zeros(2, jnp.int32),
        step=step,
        size=(size[0] // step, size[1] // step),
    )


def depth_weights(source: Grid, target: Grid) -> Float[Array, "m n"]:
    """The matrix that brings slices at `source` to the slice centres of `target`."""
    centres, last = source.centres, jnp.maximum(source.count - 1, 0)
    at = target.centres
    below = jnp.clip((centres <= at[:, None]).sum(axis=1) - 1, 0, last)
    above = jnp.minimum(below + 1, last)
    gap = centres[above] - centres[below]
    share = jnp.where(gap > 0, (at - centres[below]) / jnp.where(gap > 0, gap, 1.0), 0.0)
    share = jnp.clip(share, 0.0, 1.0)[:, None]
    columns = jnp.arange(centres.shape[0])
    weights = (1 - share) * (columns == below[:, None]) + share * (columns == above[:, None])
    inside = (at >= source.low) & (at < source.high) & (source.count > 0)
    return jnp.where(inside[:, None], weights, 0.0)


def resample(x: Part, source: Grid, target: Grid) -> Part:
    """Bring `x` from grid `source` to grid `target`: `(depth, height, width, channel)`.

    In-plane one box must contain the other. Differentiable in `x`; any origin under jit.
    """
    if source.step <= target.step:
        x = _coarsen(x, target.step // source.step)
        x = _along_depth(x, source, target)
        return _place(x, (source.origin - target.origin) // target.step, target.size)
    factor = source.step // target.step
    cells = (target.size[0] // factor, target.size[1] // factor)
    x = _cut(x, (target.origin - source.origin) // source.step, cells)
    x = _along_depth(x, source, target)
    return _refine(_refine(x, factor, axis=1), factor, axis=2)


def _along_depth(x: Part, source: Grid, target: Grid) -> Part:
    weights = depth_weights(source, target)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Where depth is split over devices, of source and target the shallower one crosses them whole.
    gathered = x.shape[0] <= target.centres.shape[0]
    if gathered:
        x = device_mesh.whole_depth(x)
    else:
        x, weights = device_mesh.split_depth(x), device_mesh.split_depth(weights, axis=1)
    product = jnp.einsum("tn,nhwc->thwc", weights.astype(wide), x.astype(wide), precision=EXACT)
    if not gathered:
        product = device_mesh.whole_depth(product)
    return device_mesh.split_depth(product.astype(x.dtype))


def _coarsen(x: Part, factor: int) -> Part:
    """In-plane values at the centres of `factor` x `factor` blocks: the mean of the middle two."""
    if factor == 1:
        return x
    depth, height, width, channels = x.shape
    x = x.reshape(depth, height // factor, factor, width // factor, factor, channels)
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    return x[:, :, middle, :, middle].mean(axis=(2, 4))


def _place(x: Part, offset: Int[Array, "2"], size: tuple[int, int]) -> Part:
    """`x` at `offset` of an in-plane box of zeros, or the box of that size cut from `x`."""
    if x.shape[1:3] == size:
        return x
    depth, height, width, channels = x.shape
    if height <= size[0] and width <= size[1]:
        box = jnp.zeros((depth, *size, channels), x.dtype)
        return lax.dynamic_update_slice(box, x, _corner(offset))
    return lax.dynamic_slice(x, _corner(-offset), (depth, *size, channels))


def _cut(x: Part, offset: Int[Array, "2"], cells: tuple[int, int]) -> Part:
    """The in-plane box of `cells` at `offset`, with one more voxel on every side."""
    depth, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    if (height, width) == cells:
        return x
    box = (depth, cells[0] + 2, cells[1] + 2, channels)
    return lax.dynamic_slice(x, _corner(offset), box)


def _corner(offset: Int[Array, "2"]) -> tuple[Array, ...]:
    """An in-plane offset as indices of one type: with 64-bit types, a literal 0 is of another."""
    zero = jnp.zeros((), offset.dtype)
    return zero, offset[0], offset[1], zero


def _refine(x: Part, factor: int, axis: int) -> Part:
    """Linear upsampling by `factor` along an axis that carries one more voxel on both ends."""
    inner = x.shape[axis] - 2
    left, middle, right = (lax.slice_in_dim(x, i, i + inner, axis=axis) for i in range(3))
    phases = []
    for k in range(factor):
        shift = (k + 0.5) / factor - 0.5
        other = left if shift < 0 else right
        phases.append((1 - abs(shift)) * middle + abs(shift) * other)
    shape = (*x.shape[:axis], inner * factor, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


def to_tile(x: Part, source: Grid, tile: Grid) -> Part:
    """What a tile sees of an array on the slice grid: the paper's 3D cropping."""
    return resample(x, source, tile)


def to_scan(x: Part, tile: Grid, target: Grid) -> Part:
    """A tile's array on the slice grid, zero elsewhere: the paper's zero-padding."""
    return resample(x, tile, target)
