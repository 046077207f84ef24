"""A scan as `--mask` asks for it: its lungs alone, or all of it, with the lungs yet to be found."""

from collections.abc import Collection

import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data.labels import class_map
from deepsc_jax.data.patches import cut
from deepsc_jax.data.plausibility import check_lungs
from deepsc_jax.data.preprocess import (
    Prepared,
    Triple,
    WorkingGrid,
    normalise,
    prepare_scan,
    to_working,
)
from deepsc_jax.data.scans import Mask, Scan
from deepsc_jax.data.source import MAX_SLICES
from deepsc_jax.runtime.errors import InputError


def prepare(
    scan: Scan,
    lung: Mask | None,
    data: DataConfig,
    lesion: Mask | None = None,
    allow: Collection[str] = frozenset(),
) -> Prepared:
    """Normalise a scan, bring it to the working grid, and, as `mask` says, keep its lungs alone.

    Args:
      scan: the scan.
      lung: its lungs; without a mask they are needed for the class of every voxel alone.
      data: `mask` and the working grid.
      lesion: its lesions.
      allow: as `preprocess.prepare_scan`.

    Raises:
      InputError: as `preprocess.prepare_scan`.
    """
    if data.mask == "lungs":
        if lung is None:
            raise ValueError("--mask=lungs needs the lungs")
        return prepare_scan(scan, lung, data, lesion, allow)
    depth, height, width = scan.values.shape
    name = scan.path or scan.name
    grid = whole_grid((depth, height, width), scan.spacing_mm, data)
    if grid.shape[0] > MAX_SLICES:
        raise InputError(
            f"{name}: {depth} slices of {scan.spacing_mm[0]:g} mm are "
            f"{grid.shape[0]} on the working grid, expected at most {MAX_SLICES}: check its voxel "
            "size, or choose a coarser --working_spacing_mm"
        )
    volume = to_working(normalise(scan.values, data), grid)
    np.clip(volume, 0, 1, out=volume)  # weights sum to 1 but for rounding
    depth_mm, height_mm, width_mm = (
        step * mm for step, mm in zip(grid.step, scan.spacing_mm, strict=True)
    )
    spacing_mm = depth_mm, height_mm, width_mm
    if lung is None:
        nothing = np.zeros(volume.shape, bool)
        return cut(Prepared(volume, nothing, None, grid, scan.notes, spacing_mm), data, (), name)
    lungs = to_working(lung, grid) >= 0.5
    if not lungs.any():
        raise InputError(
            f"{name}: its lung mask is empty on the working grid, expected "
            "lungs: give another mask, or check that the file is a chest CT"
        )
    notes = scan.notes
    if data.intensity == "hu":
        notes += check_lungs(scan, lung, allow)
    lesions = None if lesion is None else to_working(lesion, grid) >= 0.5
    classes = class_map(lungs, lesions, spacing_mm)
    return cut(Prepared(volume, lungs, lesions, grid, notes, spacing_mm, classes), data, (), name)


def whole_grid(
    source_shape: tuple[int, int, int], spacing_mm: Triple, data: DataConfig
) -> WorkingGrid:
    """The working grid over all of a scan, in its middle in-plane: nothing is known of its lungs.

    Depth is divided into `working_slices` equal slices, or round(D · spacing / wanted). In-plane a
    working voxel is of the wanted size; a scan that is wider than the working grid makes it larger,
    along both axes by one factor. A wanted spacing of 0 is the scan's own.
    """
    wanted = [w or s for w, s in zip(data.working_spacing_mm, spacing_mm, strict=True)]
    slices = data.working_slices or max(1, round(source_shape[0] * spacing_mm[0] / wanted[0]))
    steps = [wanted[axis] / spacing_mm[axis] for axis in (1, 2)]
    sides = list(zip(source_shape[1:], data.grid_size, steps, strict=True))
    coarser = max(1.0, *(n / (size * step) for n, size, step in sides))
    height, width = (step * coarser for step in steps)
    rows, columns = data.grid_size
    return WorkingGrid(
        (slices, rows, columns),
        (0.0, (source_shape[1] - rows * height) / 2, (source_shape[2] - columns * width) / 2),
        (source_shape[0] / slices, height, width),
        source_shape,
    )
