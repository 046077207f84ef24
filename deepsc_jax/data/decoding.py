"""From a batch as it travels to what a system sees, on the device, within a jitted step.

`batch` has the table of both. A batch that is already as seen passes unchanged.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt16

from deepsc_jax.config import DataConfig, Ints3
from deepsc_jax.data import augment
from deepsc_jax.data.arrays import LEVELS
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.classes import MIRRORED_IDS
from deepsc_jax.geometry.sampling import slice_indices

Batch = dict[str, Array]
Columns = Mapping[str, Array]  # of `augmentation`, by name; none in an evaluation

# 1/65535 = 2^-16 + 2^-32 + 2^-48 + ..., so that a level's value, correctly rounded, is the sum of
# two exact products. A division by a constant is not: XLA multiplies by the rounded reciprocal.
_HIGH, _LOW = 2.0**-16, 2.0**-32 + 2.0**-48
LEAST = 1 / LEVELS  # the least value inside the lungs; 0 is outside


def decode(batch: Batch, reads: Reads, data: DataConfig) -> Batch:
    """What a system sees of a batch of a stage that reads `reads`.

    Args:
      batch: as it travels (`batch.fields`), of training or of an evaluation.
      reads: of the stage.
      data: the sizes of tiles and slices.
    """
    batch = dict(batch)
    vector = batch.pop("augmentation", None)
    columns = {} if vector is None else dict(zip(augment.NAMES, vector.T, strict=True))
    if "volume" in batch:
        of_tiles, of_scan = reads.truth
        volume, truth = (_mirrored(batch.pop(name), columns) for name in ("volume", of_scan))
        origins = batch["origins"]
        batch["tiles"], batch[of_tiles] = (cut(x, origins, data.tile) for x in (volume, truth))
        if reads.slices:
            batch["slices"] = sampled(volume, batch["depth"], data.slices)
    else:
        named = ("tiles", "lesions", "classes", "slices")
        batch |= {name: _mirrored(batch[name], columns) for name in named if name in batch}
    for name in ("tiles", "slices"):
        if name in batch and batch[name].dtype == jnp.uint16:
            batch[name] = _intensities(unit(batch[name]), columns)
    if "lesions" in batch and batch["lesions"].dtype == jnp.uint8:
        batch["lesions"] = batch["lesions"].astype(jnp.float32)
    if "classes" in batch and batch["classes"].dtype == jnp.uint8:
        batch["classes"] = _sides(batch["classes"].astype(jnp.int32), columns)
    return batch


def unit(stored: UInt16[Array, "*any"]) -> Float[Array, "*any"]:
    """Stored intensities as float32 in [0, 1]: `stored` / 65535, correctly rounded."""
    values = stored.astype(jnp.float32)
    return values * jnp.float32(_HIGH) + values * jnp.float32(_LOW)


def cut(
    volume: Shaped[Array, "scan slab d height width"],
    origins: Int[Array, "scan tile 3"],
    tile: Ints3,
) -> Shaped[Array, "scan tile d h w"]:
    """The tiles at `origins`, corners of non-overlapping tiles.

    No slice leaves its place within its slab, along which depth may be split over devices.
    """
    scans, slabs, depth, height, width = volume.shape
    sides = (height // tile[1], tile[1], width // tile[2], tile[2])
    blocks = volume.reshape(scans, slabs, depth, *sides)

    def of_scan(blocks: Array, places: Array) -> Array:
        return blocks[places[:, 0], :, places[:, 1], :, places[:, 2], :]

    return jax.vmap(of_scan)(blocks, origins // jnp.asarray(tile, origins.dtype))


def sampled(
    volume: Shaped[Array, "scan slab d height width"], depth: Int[Array, "scan"], slices: int
) -> Shaped[Array, "scan slices height width"]:
    """The slices `C_i = V[floor(i D / T)]` of scans in slabs."""
    deep = volume.shape[2]

    def of_scan(volume: Array, depth: Array) -> Array:
        indices = slice_indices(depth, slices)
        return volume[indices // deep, indices % deep]

    return jax.vmap(of_scan)(volume, depth)


def _mirrored(x: Array, columns: Columns) -> Array:
    """Left and right exchanged in the scans whose `flip` says so."""
    if not columns:
        return x
    return jnp.where(_per_scan(columns["flip"], x) > 0, x[..., ::-1], x)


def _sides(classes: Array, columns: Columns) -> Array:
    """The left lung is the right one in the scans that are mirrored."""
    if not columns:
        return classes
    swapped = jnp.asarray(MIRRORED_IDS, classes.dtype)[classes]
    return jnp.where(_per_scan(columns["flip"], classes) > 0, swapped, classes)


def _intensities(values: Array, columns: Columns) -> Array:
    """Scaled and shifted; what is 0 is outside the lungs and stays 0, the others above it."""
    if not columns:
        return values
    scale, shift = (_per_scan(columns[name], values) for name in ("scale", "shift"))
    return jnp.where(values > 0, jnp.clip(values * scale + shift, LEAST, 1), 0)


def _per_scan(column: Float[Array, "scan"], x: Array) -> Array:
    """A column, to be spread over what there is of each scan."""
    return column.reshape(-1, *[1] * (x.ndim - 1))
