"""From a batch as it travels to what a system sees, on the device, within a jitted step.

`batch` has the table of both. A batch that is already as seen passes unchanged.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from deepsc_jax.config import DataConfig, Ints3, TrainConfig
from deepsc_jax.data import augment
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.classes import MIRRORED_IDS
from deepsc_jax.data.preprocess import DARKEST
from deepsc_jax.geometry.sampling import slice_indices
from deepsc_jax.systems.changes import Columns, moved, recoloured, textured, unit

Batch = dict[str, Array]


def decode(
    sent: Mapping[str, Array | np.ndarray], reads: Reads, data: DataConfig, train: TrainConfig
) -> Batch:
    """What a system sees of a batch of a stage that reads `reads`.

    Args:
      sent: a batch as it travels (`batch.fields`), of training or of an evaluation.
      reads: of the stage.
      data: the sizes of tiles and slices.
      train: the extents of augmentation; what has none is not computed.
    """
    batch = cast(Batch, dict(sent))
    vectors = batch.pop("augmentation", None)
    columns = {} if vectors is None else augment.columns(vectors)
    of_tiles, of_scan = reads.truth
    if columns:
        batch = _changed(batch, reads, columns, data, train)
    if "volume" in batch:
        volume, truth, origins = batch.pop("volume"), batch.pop(of_scan), batch["origins"]
        batch["tiles"], batch[of_tiles] = (cut(x, origins, data.tile) for x in (volume, truth))
        if reads.slices:
            batch["slices"] = sampled(volume, batch["depth"], data.slices)
    for name in ("tiles", "slices"):
        if name in batch and batch[name].dtype == jnp.uint16:
            values = _intensities(unit(batch[name]), columns)
            if columns and data.mask == "none":
                of_scan = functools.partial(recoloured, train=train)
                boxes = values if name == "tiles" else values[:, :, None]  # each slice is one
                changed = jax.vmap(of_scan)(boxes, columns, batch["intensity"])
                values = changed.reshape(values.shape)
            batch[name] = values
    if "lesions" in batch and batch["lesions"].dtype == jnp.uint8:
        batch["lesions"] = batch["lesions"].astype(jnp.float32)
    if "classes" in batch and batch["classes"].dtype == jnp.uint8:
        batch["classes"] = _sides(batch["classes"].astype(jnp.int32), columns)
    return batch


def in_one_tile(
    sent: Mapping[str, Array | np.ndarray], reads: Reads, data: DataConfig
) -> tuple[Mapping[str, Array | np.ndarray], DataConfig]:
    """An evaluation's batch with each scan as one tile, however deep, and what decodes it.

    For a network that was trained on such: see `System.predictor`. A batch of scans that are no
    deeper than a tile, or that holds no whole scans, passes unchanged.
    """
    if "volume" not in sent or sent["volume"].shape[1] == 1:
        return sent, data
    merged = {
        name: x.reshape(len(x), 1, -1, *x.shape[3:])
        for name, x in sent.items()
        if name in ("volume", reads.truth[1])
    }
    origins = jnp.zeros_like(sent["origins"][:, :1])
    deep = merged["volume"].shape[2]
    of_scan = dataclasses.replace(data, tile=(deep, *data.tile[1:]), depth_bucket=deep)
    return {**sent, **merged, "origins": origins}, of_scan


def _changed(
    batch: Batch, reads: Reads, columns: Columns, data: DataConfig, train: TrainConfig
) -> Batch:
    """The same batch of changed scans, their scale and shift apart, as it would travel."""
    starts = batch.pop("starts", None)
    of_tiles, of_scan = reads.truth
    named = [("volume", of_scan), ("tiles", of_tiles), ("slices", None)]
    present = [(name, mask) for name, mask in named if name in batch]
    if not (augment.moves(train) or _textures(train, data)):
        for name in itertools.chain.from_iterable(present):
            if name is not None:
                batch[name] = jnp.where(
                    _per_scan(columns["flip"], batch[name]) > 0,
                    batch[name][..., ::-1],
                    batch[name],
                )
        return batch
    for name, mask in present:
        boxes = batch[name]
        masks = batch[mask] if mask else jnp.zeros(boxes.shape, jnp.uint8)
        shape = boxes.shape
        if name == "volume":  # a scan is one box
            boxes, masks = (x.reshape(len(x), 1, -1, *shape[3:]) for x in (boxes, masks))
        if name == "slices":  # each is a box
            boxes, masks = boxes[:, :, None], masks[:, :, None]
        places = _places(name, batch, starts, data)
        deep, high, wide = data.tile if name == "tiles" else boxes.shape[2:]
        size = deep, high, wide
        of_scan = functools.partial(
            _changed_boxes, size=size, classes=reads.classes, train=train, data=data
        )
        # One scan after another: what a resampling takes would be too much for all.
        boxes, masks = lax.map(of_scan, (boxes, masks, columns, batch["depth"], *places))
        whole = boxes.shape[:2] + size if name == "tiles" else shape
        batch[name] = boxes.reshape(whole)
        if mask:
            batch[mask] = masks.reshape(whole)
    return batch


def _textures(train: TrainConfig, data: DataConfig) -> bool:
    """Whether intensities change as levels."""
    return data.mask == "lungs" and augment.textures(train)


def _places(
    name: str, batch: Batch, starts: Array | None, data: DataConfig
) -> tuple[Int[Array, "scan box 3"], Int[Array, "scan box 3"]]:
    """Where each scan's boxes begin in the scan itself, and in the changed one."""
    if name == "tiles":
        origins = batch["origins"]
        return (origins if starts is None else starts), origins
    if name == "volume":
        zero = jnp.zeros((len(batch["depth"]), 1, 3), jnp.int32)
        return zero, zero
    indices = jax.vmap(lambda depth: slice_indices(depth, data.slices))(batch["depth"])
    corners = jnp.stack([indices, jnp.zeros_like(indices), jnp.zeros_like(indices)], axis=-1)
    return corners, corners


def _changed_boxes(
    scan: tuple[Array, Array, Columns, Array, Array, Array],
    *,
    size: Ints3,
    classes: bool,
    train: TrainConfig,
    data: DataConfig,
) -> tuple[Array, Array]:
    """One scan's boxes and masks, or classes of voxels, changed."""
    boxes, masks, columns, depth, starts, corners = scan
    middle = (jnp.stack([depth, *data.working_size]).astype(jnp.float32) - 1) / 2

    def one(levels: Array, lesion: Array, start: Array, corner: Array, number: Array) -> tuple:
        if augment.moves(train):
            levels, lesion = moved(
                levels, lesion, columns, middle, start, corner, size, classes=classes
            )
        else:
            mirror = columns["flip"] > 0
            levels, lesion = (jnp.where(mirror, x[..., ::-1], x) for x in (levels, lesion))
        if _textures(train, data):
            levels, lesion = textured(levels, lesion, columns, train, number)
        return levels, lesion

    return jax.vmap(one)(boxes, masks, starts, corners, jnp.arange(len(boxes)))


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
    return jnp.where(values > 0, jnp.clip(values * scale + shift, DARKEST, 1), 0)


def _per_scan(column: Float[Array, "scan"], x: Array) -> Array:
    """A column, to be spread over what there is of each scan."""
    return column.reshape(-1, *[1] * (x.ndim - 1))
