"""Patches of lesions: a case as a stack of pictures, one slice each.

A case's stored volume is then its patches in place of its frame: what reads slices reads patches.
They are cut where boxes were annotated, else where the lesion mask is: of an X-ray a patch of each
lesion, of a CT scan one in each of a few slices, evenly over the volume of its lesions. Liang et
al. 2021 cut 2 to 5 of a case.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from deepsc_jax.config import DataConfig
from deepsc_jax.data.images import Box, boxes, window
from deepsc_jax.data.preprocess import Prepared, WorkingGrid, to_working
from deepsc_jax.runtime.errors import InputError

MOST = 5  # patches that are cut by a mask (Liang et al. 2021)


class Place(NamedTuple):
    """Where a lesion is: a slice, and pixels of the frame."""

    depth: int
    box: Box


def cut(
    prepared: Prepared,
    data: DataConfig,
    annotated: Sequence[tuple[int, int, int, int]] = (),
    name: object = "the X-ray",
) -> Prepared:
    """The same case as patches; as it is where `data` asks for none.

    Args:
      prepared: on a grid of `data.grid_size`. It stays that of the frame.
      data: `patches` and their side, `working_size`.
      annotated: boxes in pixels of the source, of one slice.
      name: of the case, in what is said of it.

    Raises:
      InputError: neither a box nor a lesion tells where to cut.
    """
    if data.patches == "none":
        return prepared
    places = [Place(0, _on_grid(Box(*box), prepared.grid)) for box in annotated]
    if not places and prepared.lesion is not None:
        places = by_mask(prepared.lesion)
    if not places:
        raise InputError(
            f"{name}: no box and no lesion to cut patches of, at least 1 expected (--patches="
            f"{data.patches}): give a lesion mask or boxes, or leave the case out"
        )
    side = data.working_size[0]

    def patches(volume: np.ndarray) -> np.ndarray:
        if data.patches == "window":
            return np.stack([window(volume[at], box.centre, side) for at, box in places])
        return np.concatenate([_resized(volume[at], box, side) for at, box in places])

    masks = [None if x is None else patches(x) >= 0.5 for x in (prepared.lung, prepared.lesion)]
    assert masks[0] is not None
    volume = np.clip(patches(prepared.volume), 0, 1)  # weights sum to 1 but for rounding
    return dataclasses.replace(
        prepared, volume=volume, lung=masks[0], lesion=masks[1], classes=None
    )


def by_mask(lesion: Bool[np.ndarray, "depth height width"]) -> list[Place]:
    """Up to `MOST` places of lesions; none without a lesion.

    Of one slice, its lesions, the largest first. Of several, the largest lesion of each slice in
    which one of `MOST` equal parts of all lesion voxels, in order of slices, has its middle.
    """
    areas = lesion.sum(axis=(1, 2))
    if not areas.any():
        return []
    if len(lesion) == 1:
        return [Place(0, box) for box in _largest_first(lesion[0])[:MOST]]
    middles = (np.arange(MOST) + 0.5) / MOST * areas.sum()
    chosen = np.unique(np.searchsorted(np.cumsum(areas), middles))
    return [Place(int(at), _largest_first(lesion[at])[0]) for at in chosen]


def _largest_first(mask: Bool[np.ndarray, "height width"]) -> list[Box]:
    """The boxes of a picture's lesions, by the lesion's pixels that are in each."""

    def pixels(box: Box) -> int:
        return int(mask[box.top : box.bottom, box.left : box.right].sum())

    return sorted(boxes(mask), key=pixels, reverse=True)


def _on_grid(box: Box, grid: WorkingGrid) -> Box:
    """A box of the source in whole pixels of the grid, of at least one a side."""
    starts, steps = (np.tile(of[1:], 2) for of in (grid.start, grid.step))
    top, left, bottom, right = np.rint((np.array(box) - starts) / steps).astype(int).tolist()
    return Box(top, left, max(bottom, top + 1), max(right, left + 1))


def _resized(picture: np.ndarray, box: Box, side: int) -> np.ndarray:
    """What is in a box as a picture of `side` pixels a side, (1, side, side)."""
    steps = (1.0, (box.bottom - box.top) / side, (box.right - box.left) / side)
    grid = WorkingGrid((1, side, side), (0.0, box.top, box.left), steps, (1, *picture.shape))
    return to_working(picture[None], grid)
