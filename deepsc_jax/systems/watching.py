"""What systems that find lesions have watched of validation: figures and planes of a scan.

Arrays of tiles are `(scan, tile, d, h, w)`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

THRESHOLD = 0.5  # of what counts as found


def lesion_figures(
    probability: Float[Array, "scan tile d h w"],
    truth: Bool[Array, "scan tile d h w"],
    lesion_free: Bool[Array, "scan"],
    voxel_ml: Float[Array, "scan"],
) -> dict[str, Float[Array, "scan"]]:
    """`lesion_dsc` of scans with lesions, and the `lesion_free_ml` found in those of none.

    nan of the others; a scan whose lesions are not known is neither.
    """
    voxels = (1, 2, 3, 4)
    found, volume = probability >= THRESHOLD, truth.sum(voxels)
    marked = found.sum(voxels)
    dice = 2 * (found & truth).sum(voxels) / jnp.maximum(marked + volume, 1)
    return {
        "lesion_dsc": jnp.where(volume > 0, dice, jnp.nan),
        "lesion_free_ml": jnp.where(lesion_free & (volume == 0), marked * voxel_ml, jnp.nan),
    }


def telling_slice(
    truth: Bool[Array, "scan tile d h w"],
    origins: Int[Array, "scan tile 3"],
    depth: Int[Array, "scan"],
) -> Int[Array, "scan"]:
    """The slice of a scan in which a tile holds most lesion; without any, the middle one."""
    counts = truth.sum((3, 4))
    best = counts.reshape(len(counts), -1).argmax(axis=1)
    tile, inside = best // counts.shape[2], best % counts.shape[2]
    slices = jnp.take_along_axis(origins[..., 0], tile[:, None], axis=1)[:, 0] + inside
    return jnp.where(counts.any((1, 2)), slices, depth // 2)


def plane(
    values: Float[Array, "scan tile d h w"],
    origins: Int[Array, "scan tile 3"],
    slices: Int[Array, "scan"],
    size: tuple[int, int],
) -> Float[Array, "scan height width"]:
    """One slice of each scan, put together from its tiles, 0 where there is none."""
    _, _, depth, height, width = values.shape

    def of_scan(tiles: Array, corners: Array, index: Array) -> Array:
        inside = index - corners[:, 0]
        cut = jnp.take_along_axis(
            tiles, jnp.clip(inside, 0, depth - 1)[:, None, None, None], axis=1
        )
        there = ((inside >= 0) & (inside < depth))[:, None, None]
        rows = (corners[:, 1, None] + jnp.arange(height))[:, :, None]
        columns = (corners[:, 2, None] + jnp.arange(width))[:, None, :]
        empty = jnp.zeros(size, values.dtype)
        return empty.at[rows, columns].add(jnp.where(there, cut[:, 0], 0), mode="drop")

    return jax.vmap(of_scan)(values, origins, slices)


def sampled_plane(
    maps: Float[Array, "scan slice height width"],
    slices: Int[Array, "scan"],
    depth: Int[Array, "scan"],
) -> Float[Array, "scan height width"]:
    """Of maps on sampled slices, `floor(i D / T)` for i < T, the one nearest below a slice."""
    count = maps.shape[1]
    nearest = jnp.clip(slices * count // jnp.maximum(depth, 1), 0, count - 1)
    return jnp.take_along_axis(maps, nearest[:, None, None, None], axis=1)[:, 0]
