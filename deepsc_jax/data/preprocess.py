"""From a scan to what the network sees, and from its probabilities back to the scan's grid.

Paper, section V-A: HU clipped to [-1400, 200], scaled to [0, 1], multiplied by the lung mask;
slices as they come. A config may ask for a coarser working grid (assumed): then a working voxel is
the mean over what of it lies in the lungs, and so is what is brought back. With the chest wall in
it, the lungs' border would be brighter than lesions are, and lesions there would lose their rim.
What a network sees is the box around the lungs, so that what lies beyond them, and how much of it a
scan holds, changes nothing. A voxel is 0 if and only if it is outside of the lungs.

Coordinates are edges: source voxel j spans [j, j + 1) and has its centre at j + ½.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float32, Int64, Num, UInt8

from deepsc_jax.config import DataConfig
from deepsc_jax.data.plausibility import check_lungs
from deepsc_jax.data.scans import Mask, Scan, Volume
from deepsc_jax.data.source import MAX_SLICES
from deepsc_jax.runtime.errors import InputError

DARKEST = 1 / 65535  # of what is inside the lungs: 0.02 HU, the step in which stores keep volumes
AnyVolume = Num[np.ndarray, "depth height width"] | Bool[np.ndarray, "depth height width"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class WorkingGrid:
    """Where the working array lies in its source, all in canonical (depth, height, width) order."""

    shape: tuple[int, int, int]
    """Of the working array."""
    start: Triple
    """Source coordinate of the first working voxel's lower edge; may be negative."""
    step: Triple
    """Source voxels per working voxel."""
    source_shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan on its working grid."""

    volume: Volume
    """In [0, 1]; 0 outside the lungs, at least `DARKEST` inside."""
    lung: Mask
    lesion: Mask | None
    grid: WorkingGrid
    notes: tuple[str, ...] = ()
    """The scan's, and what is to be said of its lungs: a line each."""
    spacing_mm: Triple = (1.0, 1.0, 1.0)
    """Of a working voxel."""
    classes: UInt8[np.ndarray, "depth height width"] | None = None
    """`labels.class_map`, of a scan that is not masked."""


def working_grid(
    source_shape: tuple[int, int, int], spacing_mm: Triple, lung_mask: Mask, config: DataConfig
) -> WorkingGrid:
    """Place the working grid of a scan: it begins where the box around the lungs does.

    A working voxel is the source's where the wanted spacing is 0, else of that size. Along depth
    the grid ends with the lungs. In-plane it has the working size; lungs that are wider make its
    voxels larger, along both axes by one factor.

    Args:
        source_shape: (D, H, W) of the scan.
        spacing_mm: its voxel size, same order.
        lung_mask: of the scan, not empty.
        config: `working_spacing_mm` and `working_size` are read.
    """
    extents = [_extent(lung_mask, axis) for axis in range(3)]
    sides = [high - low for low, high in extents]
    steps = [
        _step(wanted, spacing, side)
        for wanted, spacing, side in zip(config.working_spacing_mm, spacing_mm, sides, strict=True)
    ]
    coarser = max(
        1.0,
        *(
            n / (size * s)
            for n, size, s in zip(sides[1:], config.working_size, steps[1:], strict=True)
        ),
    )
    steps = [steps[0], steps[1] * coarser, steps[2] * coarser]
    # The fewest voxels that hold the box, as far beyond it on either side.
    cells = [max(1, math.ceil(n / s - 1e-6)) for n, s in zip(sides, steps, strict=True)]
    start = [
        low - (count * s - n) / 2
        for (low, _), n, count, s in zip(extents, sides, cells, steps, strict=True)
    ]
    return WorkingGrid((cells[0], *config.working_size), _three(start), _three(steps), source_shape)


def _step(wanted_mm: float, spacing_mm: float, side: int) -> float:
    """Source voxels per working voxel along an axis on which the lungs have `side` voxels."""
    ratio = wanted_mm / spacing_mm if wanted_mm else 1.0
    # A float32 affine makes 0.7 mm 0.69999999: that is no reason to interpolate.
    return 1.0 if abs(ratio - 1) * side < 1e-3 else ratio


def to_working(array: AnyVolume, grid: WorkingGrid) -> Volume:
    """Resample a source array onto the working grid.

    Separable and linear; where the working voxel is larger than the source's, the triangle is as
    wide as it (antialiasing). Weights are normalised over the source voxels in reach; a working
    voxel whose centre lies outside the source is 0. Where the grids coincide, values are copied.
    """
    _check_shape(array, grid.source_shape)
    return _separable(array, [_forward_weights(grid, axis) for axis in range(3)])


def to_source(array: AnyVolume, grid: WorkingGrid, inside: Mask | None = None) -> Volume:
    """Bring a working array (probabilities, not labels) back to the source's grid.

    Separable and linear between the working voxels' centres, held from the outermost centre to the
    edge of the working window, 0 beyond it. Where the grids coincide, values are copied.

    Args:
        array: on the working grid, in [0, 1] where `inside` is given.
        grid: of both.
        inside: of the working voxels, those that count; the array is 0 elsewhere. Weights are then
            normalised over them, so that the zeros beside them take nothing away.
    """
    _check_shape(array, grid.shape)
    axes = [_backward_weights(grid, axis) for axis in range(3)]
    there = _separable(array, axes)
    if inside is not None:
        share = _separable(inside, axes)
        np.divide(there, share, out=there, where=share > 0)
        np.minimum(there, 1, out=there)  # but for rounding it is
    return there


def normalise(
    values: Num[np.ndarray, "*shape"], config: DataConfig, shift: float = 0.0
) -> Float32[np.ndarray, "*shape"]:
    """Map intensities to [0, 1].

    `intensity='hu'`: with `shift` added, clipped to `hu_window` and scaled. `intensity='unit'`:
    divided by 255 if any value exceeds 1, else taken as they are; so give it whole scans, not
    single slices.
    """
    window = config.hu_window if config.intensity == "hu" else _unit_range(values)
    low, high = (bound - shift for bound in window)
    scaled = np.clip(np.asarray(values, np.float32), np.float32(low), np.float32(high))
    scaled -= np.float32(low)
    scaled /= np.float32(high - low)
    return scaled


def level_shift(scan: Scan, lung_mask: Mask, config: DataConfig) -> float:
    """HU to add to a scan so that its lungs' lower quartile is `lung_level_hu`; 0 where that is 0.

    The lower quartile, since lesions, vessels and the border are above it unless lesions fill
    three quarters of the lungs.
    """
    if not config.lung_level_hu:
        return 0.0
    return config.lung_level_hu - float(np.quantile(scan.values[lung_mask], 0.25))


def intensity_of(volume: Volume) -> Triple:
    """What a z-score needs of a normalised scan: its least value, mean and deviation."""
    mean = float(volume.mean(dtype=np.float64))
    squares = sum(float(np.square(plane - mean, dtype=np.float64).sum()) for plane in volume)
    return float(volume.min()), mean, (squares / volume.size) ** 0.5


def prepare_scan(
    scan: Scan,
    lung_mask: Mask,
    config: DataConfig,
    lesion_mask: Mask | None = None,
    allow: Collection[str] = frozenset(),
) -> Prepared:
    """Normalise a scan, bring it and its masks to the working grid, and mask it by the lungs.

    A working voxel is of the lungs if at least half of it is, and lesion if at least half of its
    part in the lungs is. Lungs in HU are checked (`plausibility.check_lungs`); `allow` is its
    argument.

    Raises:
        InputError: the lung mask is empty, at the source or on the working grid, or is none of a
            chest in HU; the working grid has more than MAX_SLICES slices.
    """
    for mask in (lung_mask, lesion_mask):
        if mask is not None:
            _check_shape(mask, _three(scan.values.shape))
    if not lung_mask.any():
        raise InputError(
            f"{scan.path or scan.name}: its lung mask is empty, expected lungs: give another mask, "
            "or check that the file is a chest CT"
        )
    grid = working_grid(_three(scan.values.shape), scan.spacing_mm, lung_mask, config)
    if grid.shape[0] > MAX_SLICES:
        raise InputError(
            f"{scan.path or scan.name}: {len(scan.values)} slices of {scan.spacing_mm[0]:g} mm are "
            f"{grid.shape[0]} on the working grid, expected at most {MAX_SLICES}: check its voxel "
            "size, or choose a coarser --working_spacing_mm"
        )
    notes = scan.notes
    if config.intensity == "hu":
        notes += check_lungs(scan, lung_mask, allow)
    share = to_working(lung_mask, grid)
    lung = share >= 0.5
    if not lung.any():
        raise InputError(
            f"{scan.path or scan.name}: its lungs vanish on the working grid of {grid.shape}: "
            "check the lung mask, or choose a finer --working_spacing_mm or --working_size"
        )
    # Outside of the lungs the network sees nothing, so nothing is asked of it there.
    lesion = None
    if lesion_mask is not None:
        lesion = (to_working(lesion_mask & lung_mask, grid) >= 0.5 * share) & lung
    values = normalise(scan.values, config, level_shift(scan, lung_mask, config))
    values *= lung_mask
    volume = to_working(values, grid)
    np.divide(volume, share, out=volume, where=lung)
    np.clip(volume, DARKEST, 1, out=volume)  # weights sum to 1 but for rounding
    volume *= lung
    depth, height, width = (a * b for a, b in zip(scan.spacing_mm, grid.step, strict=True))
    return Prepared(volume, lung, lesion, grid, notes, (depth, height, width))


@dataclass(frozen=True, eq=False)
class _Weights:
    """Resampling along one axis: out[i] = Σ_k values[i, k] · source[columns[i, k]]."""

    values: Float32[np.ndarray, "out taps"]
    columns: Int64[np.ndarray, "out taps"]
    source: int
    """Length of the source axis."""

    def is_identity(self) -> bool:
        ones = self.values == 1
        return (
            len(self.values) == self.source
            and bool((ones.sum(axis=1) == 1).all())
            and np.array_equal(self.columns[ones], np.arange(self.source))
        )

    def matrix(self) -> scipy.sparse.csr_array:
        rows, taps = np.nonzero(self.values)
        entries = (self.values[rows, taps], (rows, self.columns[rows, taps]))
        return scipy.sparse.csr_array(entries, shape=(len(self.values), self.source))


def _extent(mask: Mask, axis: int) -> tuple[int, int]:
    """Lower and upper edge of the mask's bounding box along `axis`, in voxels."""
    others = tuple(other for other in range(3) if other != axis)
    (inside,) = np.nonzero(mask.any(axis=others))
    return int(inside[0]), int(inside[-1]) + 1


def _unit_range(values: np.ndarray) -> tuple[float, float]:
    return (0.0, 255.0) if values.max(initial=0) > 1 else (0.0, 1.0)


def _forward_weights(grid: WorkingGrid, axis: int) -> _Weights:
    """(working, source) weights of one axis: see `to_working`."""
    n = grid.source_shape[axis]
    step = grid.step[axis]
    radius = max(step, 1.0)
    centres = grid.start[axis] + (np.arange(grid.shape[axis]) + 0.5) * step
    first = np.floor(centres - 0.5 - radius).astype(int)
    reach = first[:, None] + np.arange(int(np.ceil(2 * radius)) + 2)
    weights = np.clip(1 - np.abs(reach + 0.5 - centres[:, None]) / radius, 0, None)
    weights[(reach < 0) | (reach >= n)] = 0
    weights[(centres < 0) | (centres > n)] = 0
    total = weights.sum(axis=1, keepdims=True)
    return _Weights(
        (weights / np.where(total > 0, total, 1)).astype(np.float32), np.clip(reach, 0, n - 1), n
    )


def _backward_weights(grid: WorkingGrid, axis: int) -> _Weights:
    """(source, working) weights of one axis: see `to_source`."""
    n = grid.shape[axis]
    edges = (np.arange(grid.source_shape[axis]) + 0.5 - grid.start[axis]) / grid.step[axis]
    index = np.clip(edges - 0.5, 0, n - 1)
    low = np.minimum(np.floor(index).astype(int), max(n - 2, 0))
    upper = index - low
    weights = np.stack([1 - upper, upper], axis=1)
    weights[(edges < 0) | (edges > n)] = 0
    return _Weights(
        weights.astype(np.float32), np.minimum(np.stack([low, low + 1], axis=1), n - 1), n
    )


def _separable(array: AnyVolume, axes: list[_Weights]) -> Volume:
    """Apply the weights of each axis, slice by slice.

    Beside the result only a few in-plane results are held: those that the current slice needs.
    """
    depth, height, width = axes
    shape = (len(depth.values), len(height.values), len(width.values))
    out = np.zeros(shape, np.float32)
    in_plane = _in_plane(height, width)
    held: dict[int, np.ndarray] = {}
    for index in range(shape[0]):
        used = depth.values[index] > 0
        sources = depth.columns[index][used].tolist()
        held = {source: held[source] for source in sources if source in held}
        for source, weight in zip(sources, depth.values[index][used], strict=True):
            if source not in held:
                held[source] = in_plane(np.asarray(array[source], np.float32))
            if weight == 1:
                out[index] = held[source]
            else:
                out[index] += weight * held[source]
    return out


def _in_plane(height: _Weights, width: _Weights) -> Callable[[np.ndarray], np.ndarray]:
    """The function that resamples one slice, (source H, source W) to (H, W)."""
    rows = None if height.is_identity() else height.matrix()
    columns = None if width.is_identity() else width.matrix()

    def resample(image: np.ndarray) -> np.ndarray:
        if rows is not None:
            image = rows @ image
        if columns is not None:
            image = (columns @ np.ascontiguousarray(image.T)).T
        return image

    return resample


def _check_shape(array: np.ndarray, expected: tuple[int, int, int]) -> None:
    if array.shape != expected:
        raise ValueError(f"array is {array.shape}, its grid {expected}")


def _three(values) -> tuple:
    first, second, third = values
    return first, second, third
