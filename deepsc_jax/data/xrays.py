"""An X-ray on its way to a network: a volume of one slice, whole frame, without a mask.

The picture is stretched to the working size, whatever its sides are, as the published loader of
CNNCF does (torchvision's `Resize` of a PIL image). Masks of its lesions and lungs are pictures of
the same size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.images import Box, read_levels, read_xray
from deepsc_jax.data.patches import cut
from deepsc_jax.data.preprocess import Prepared, WorkingGrid, to_working
from deepsc_jax.data.scans import Mask, Volume, is_scan
from deepsc_jax.runtime.errors import InputError

LEAST_SIDE = 16  # pixels: what a network halves four times


def load_xray(path: Path) -> Volume:
    """An X-ray as a volume of one slice in [0, 1].

    Raises:
      InputError: as `images.read_xray`; it is a CT scan by its name, or a folder; or too small.
    """
    if path.is_dir() or is_scan(path.name):
        kind = "a folder" if path.is_dir() else "a CT scan by its name"
        raise InputError(
            f"{path}: {kind}, the file of an X-ray expected (PNG, JPEG or DICOM): CT is for a "
            "model and a store of --modality=ct"
        )
    image = read_xray(path)
    if min(image.shape) < LEAST_SIDE:
        raise InputError(
            f"{path}: an image of {_size(image)} pixels, at least {LEAST_SIDE} a side expected: "
            "give the X-ray, not its preview"
        )
    return image[None]


def load_mask(path: Path, xray: Volume, kind: str = "lesion mask") -> Mask:
    """A mask of an X-ray: a picture of its size, of 0 and one other level.

    Raises:
      InputError: as `images.read_levels`; it is of another size, or has more levels.
    """
    levels = read_levels(path)
    if levels.shape != xray.shape[1:]:
        raise InputError(
            f"{path}: {kind} has {_size(levels)} pixels, its X-ray {_size(xray[0])}: draw the mask "
            "on the X-ray, or leave it out"
        )
    others = np.unique(levels[levels != 0])
    if len(others) > 1:
        raise InputError(
            f"{path}: {kind} has {len(others)} levels beside 0, one expected: write it as 0 "
            "(background) and 255, as a PNG"
        )
    return (levels != 0)[None]


def frame_grid(xray: Volume, data: DataConfig) -> WorkingGrid:
    """The working grid over the whole frame, each axis by itself."""
    _, height, width = xray.shape
    rows, columns = data.grid_size
    steps = (1.0, height / rows, width / columns)
    return WorkingGrid((1, rows, columns), (0.0, 0.0, 0.0), steps, (1, height, width))


def prepare(
    xray: Volume,
    data: DataConfig,
    lesion: Mask | None = None,
    lung: Mask | None = None,
    boxes: Sequence[tuple[int, int, int, int]] = (),
    name: object = "the X-ray",
) -> Prepared:
    """An X-ray and its masks on the working grid; its lungs are nowhere where none are given.

    Of `boxes`, in its pixels, patches are cut where `data` asks for some; `name` is the case's, in
    what is said of it.

    Raises:
      InputError: as `patches.cut`.
    """
    grid = frame_grid(xray, data)
    volume = np.clip(to_working(xray, grid), 0, 1)  # weights sum to 1 but for rounding
    masks = [None if mask is None else to_working(mask, grid) >= 0.5 for mask in (lesion, lung)]
    lungs = np.zeros(volume.shape, bool) if masks[1] is None else masks[1]
    return cut(Prepared(volume, lungs, masks[0], grid, (), grid.step), data, boxes, name)


def load_case(case: Case) -> tuple[Volume, Mask | None, Mask | None]:
    """A case's X-ray, lesions and lungs: see `load_with_masks`."""
    return load_with_masks(case.name, case.scan, case.lesion_mask, case.lung_mask, case.boxes)


def load_with_masks(
    name: str,
    path: Path,
    lesion_mask: Path | None = None,
    lung_mask: Path | None = None,
    boxes: Sequence[tuple[int, int, int, int]] = (),
) -> tuple[Volume, Mask | None, Mask | None]:
    """An X-ray, its lesions and lungs; None where no mask is given.

    Raises:
      InputError: one cannot be read, or a box reaches out of the X-ray.
    """
    xray = load_xray(path)
    lesion = None if lesion_mask is None else load_mask(lesion_mask, xray)
    lung = None if lung_mask is None else load_mask(lung_mask, xray, "lung mask")
    _, height, width = xray.shape
    for box in map(Box._make, boxes):
        if box.top < 0 or box.left < 0 or box.bottom > height or box.right > width:
            raise InputError(
                f"{name}: box {' '.join(map(str, box))} reaches out of {path}, which has "
                f"{_size(xray[0])} pixels: mend it (top, left, bottom, right), or leave it out"
            )
    return xray, lesion, lung


def _size(image: np.ndarray) -> str:
    height, width = image.shape
    return f"{height}×{width}"
