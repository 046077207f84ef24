"""Lung masks for scans that come without one.

The built-in method thresholds air, keeps what thick tissue encloses, takes the trachea and main
bronchi away, and gives back what the threshold drops: vessels and consolidations.
It works on a grid of about 2 mm; only the surface is decided at the scan's own resolution. Where
the package `lungmask` (Hofmanninger et al., Eur Radiol Exp 4:50, 2020; the paper's choice) is
installed it is used instead.
"""

import warnings

import cc3d
import edt
import numpy as np
from jaxtyping import Bool, Num
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from deepsc_jax.data.scans import Scan
from deepsc_jax.runtime.errors import InputError

AIR_HU = -320.0  # between aerated lung or ground glass and soft tissue
PADDING_HU = -1100.0  # below: no measurement, filled by the scanner outside its circular field
WORKING_MM = 2.0  # blocks of voxels are averaged to about this
SMALLEST_ML = 200.0  # less is no lung, or no scan to diagnose
CLOSING_MM = 25.0  # keeps 98 % of the phantoms' consolidations, and takes in part of the hila
ROOM_AIR_HU = -930.0  # outside air averages below this, lung above
LUMEN_HU = -750.0  # the inside of an airway; its wall blurs it
THIN_MM = 8.0  # couch shells are thinner, the chest wall is thicker
BONE_HU = 250.0
GAS_HU = -930.0  # stomach and bowel gas averages below this
CORE_MM = 3.0  # half of what a thin diaphragm leaks through
AERATED_MM = 4.0  # what an opening by this radius leaves is lung, not bronchus or fissure
Spacing = tuple[float, float, float]
Box = tuple[slice, ...]
GIVE_A_MASK = "give a lung mask (predict: --lung_mask; prepare: the column lung_mask)"

_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1, 1, :] = _IN_PLANE[1, :, 1] = True


def find_lungs(scan: Scan, intensity: str = "hu") -> Bool[np.ndarray, "depth height width"]:
    """The lungs of a scan in canonical orientation, by `lungmask` if installed, else `lung_mask`.

    Raises InputError if no lung is found, or if intensity is 'unit' (images that are not HU).
    """
    if intensity != "hu":
        raise InputError(
            f"{scan.path or scan.name}: lungs are found by HU, but intensity is {intensity!r}: "
            f"{GIVE_A_MASK}"
        )
    mask = _lungmask_package(scan)
    if mask is not None:
        return mask
    return lung_mask(scan.values, scan.spacing_mm, scan.path or scan.name)


def _lungmask_package(scan: Scan) -> np.ndarray | None:
    """The mask of package `lungmask` (model R231), or None where it is absent or fails."""
    try:
        from lungmask import LMInferer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        mask = LMInferer(tqdm_disable=True).apply(np.clip(scan.values, -1024, 3071)) > 0
    except Exception as error:  # its weights are fetched on first use: network, disk, torch
        warnings.warn(
            f"{scan.name}: lungmask failed ({type(error).__name__}: {error}), "
            "using the built-in lung mask",
            stacklevel=3,
        )
        return None
    _check_volume(mask, scan.spacing_mm, scan.name)
    return mask


def lung_mask(
    values_hu: Num[np.ndarray, "depth height width"],
    spacing_mm: tuple[float, float, float],
    name: str,
) -> Bool[np.ndarray, "depth height width"]:
    """Both lungs with their vessels and lesions, without trachea and main bronchi.

    `values_hu` is in HU, canonical orientation (inferior to superior, anterior to posterior, right
    to left); `spacing_mm` in the same order. Raises InputError when no lung is found.
    """
    spacing = np.asarray(spacing_mm, float)
    step = np.maximum(1, np.round(WORKING_MM / spacing)).astype(int)
    step[0] = 1 if len(values_hu) < 48 else step[0]
    hu = _block_mean(values_hu, step)
    mm: Spacing = tuple(spacing * step)

    air, body = _enclosed_air(hu, mm)
    if not body.any():
        raise InputError(_no_lung(name, 0.0))
    box = _bounding_box(body)
    hu, air, body = hu[box], air[box], body[box]
    airways = _airways(hu, air, mm)
    lung = _lung_components(hu, air & ~airways, body, mm)
    if not lung.any():
        raise InputError(_no_lung(name, 0.0))
    filled = lung.copy()
    for side, medial in find_sides(lung, mm):
        part = _bounding_box(side)
        closed = _close(side[part], CLOSING_MM, mm)
        filled[part] |= closed | _consolidation(closed, medial, hu[part], mm)
    filled = lung | (filled & ~airways & body)

    mask = _to_source(filled, lung, hu, box, step, values_hu)
    _check_volume(mask, spacing_mm, name)
    return mask


def _bounding_box(mask: np.ndarray) -> Box:
    """The smallest box that holds the mask, with a voxel around where the array goes on."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        where = np.flatnonzero(mask.any(others))
        box.append(slice(max(0, int(where[0]) - 1), min(mask.shape[axis], int(where[-1]) + 2)))
    return tuple(box)


def _check_volume(mask: np.ndarray, spacing_mm: tuple[float, float, float], name: str) -> None:
    millilitres = float(mask.sum() * np.prod(spacing_mm) / 1000)
    if millilitres < SMALLEST_ML:
        raise InputError(_no_lung(name, millilitres))


def _no_lung(name: str, millilitres: float) -> str:
    return (
        f"{name}: found {millilitres:.0f} ml of lung, expected at least {SMALLEST_ML:.0f} ml in a "
        f"chest CT in HU: check the scan, or {GIVE_A_MASK}"
    )


def _block_mean(values: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Means of blocks of `step` voxels; HU clipped, so that metal does not weigh in."""
    blocks = []
    extra = [(0, int(-n % s)) for n, s in zip(values.shape[1:], step[1:], strict=True)]
    for start in range(0, len(values), step[0]):
        slab = np.clip(values[start : start + step[0]], 2 * PADDING_HU, 600, dtype=np.float32)
        slab = np.pad(slab.mean(0), extra, mode="edge")
        height, width = slab.shape[0] // step[1], slab.shape[1] // step[2]
        blocks.append(slab.reshape(height, step[1], width, step[2]).mean((1, 3)))
    return np.stack(blocks)


def _enclosed_air(hu: np.ndarray, mm: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Air that thick tissue encloses in its slice, and the filled body around it."""
    air = (hu < AIR_HU) & (hu >= PADDING_HU)
    open_rim = hu < PADDING_HU
    open_rim[:, [0, -1], :] = open_rim[:, :, [0, -1]] = True
    # A lung cut by the field of view touches the rim too, but is denser than room air.
    labels, count = _label_in_slices(air)
    touched = np.unique(labels[_dilated(open_rim, _IN_PLANE) & air])
    mean = np.asarray(ndimage.mean(hu, labels, touched) if len(touched) else np.zeros(0))
    is_outside = np.zeros(count + 1, bool)
    is_outside[touched[mean < ROOM_AIR_HU]] = True
    outside = is_outside[labels]

    # Couch, clothes and tubes are thin: the body is the largest thing left after an opening.
    tissue = hu >= AIR_HU
    core = cc3d.largest_k(_opened(tissue, THIN_MM / 2, mm), k=1, connectivity=6) > 0
    ways = [_seen(core, axis, way) for axis in (1, 2) for way in (1, -1)]
    body = np.sum(ways, axis=0, dtype=np.uint8) >= 3
    return air & ~outside, np.asarray(body)


def _airways(hu: np.ndarray, air: np.ndarray, mm: Spacing) -> np.ndarray:
    """Trachea and main bronchi, followed slice by slice from the top.

    The trachea is the longest chain of small round air spots near the middle; below the carina
    each branch is followed until it opens into the lung.
    """
    lumen = air & (hu < LUMEN_HU)
    labels, count = _label_in_slices(lumen)
    airways = np.zeros_like(air)
    if not count:
        return airways
    index = np.arange(1, count + 1)
    area = ndimage.sum_labels(lumen, labels, index) * mm[1] * mm[2]
    boxes = ndimage.find_objects(labels)
    height = np.array([b[1].stop - b[1].start for b in boxes]) * mm[1]
    width = np.array([b[2].stop - b[2].start for b in boxes]) * mm[2]
    column = np.array([(b[2].start + b[2].stop) / 2 for b in boxes]) * mm[2]
    middle = np.median(np.nonzero(air)[2]) * mm[2]
    is_round = (area > 40) & (area < 900) & (area > 0.5 * height * width)
    is_round &= (np.maximum(height, width) < 45) & (abs(column - middle) < 45)
    spots = cc3d.connected_components(np.r_[False, is_round][labels], connectivity=6)
    if not spots.any():
        return airways
    chains = [z for z, _, _ in ndimage.find_objects(spots)]
    length = np.array([(z.stop - z.start) * mm[0] for z in chains])
    bottom = chains[int(np.argmax(length))].start
    is_airway = (length >= 25) & [z.stop > bottom for z in chains]  # or an oesophagus full of air
    airways = np.r_[False, is_airway][spots]
    for z in range(bottom - 1, -1, -1):
        below = np.unique(labels[z][airways[z + 1]])
        below = below[(below > 0) & (np.r_[np.inf, area][below] < 900)]
        if not len(below):
            break
        airways[z] |= np.isin(labels[z], below)
    return airways | (_dilated(airways) & air)


def _lung_components(hu: np.ndarray, air: np.ndarray, body: np.ndarray, mm: Spacing) -> np.ndarray:
    """The air that is lung: in the body, and no gas of stomach or bowel.

    Judged on cores that lie deep in the air, so that a thin diaphragm does not join them.
    """
    cores, count = cc3d.connected_components(
        edt.edt(air, anisotropy=mm) > max(CORE_MM, *mm[1:]), connectivity=6, return_N=True
    )
    if not count:
        return np.zeros_like(air)
    index = np.arange(1, count + 1)
    volume = np.bincount(cores.ravel(), minlength=count + 1)[1:] * np.prod(mm) / 1000
    inside = volume * (ndimage.mean(body, cores, index) > 0.6)
    largest = int(np.argmax(inside))
    extent = [(z.start, z.stop) for z, _, _ in ndimage.find_objects(cores)]
    low, high = extent[largest]
    height = (np.mean(extent, axis=1) - low) / (high - low)
    gas = (ndimage.mean(hu, cores, index) < GAS_HU) & (height < 0.35)
    gas |= (np.array(extent)[:, 0] < low) & (volume < 0.2 * inside[largest])
    is_lung = (inside > 5) & (height > 0) & (height < 1) & ~gas
    is_lung[largest] = inside[largest] > 0
    lung = np.r_[False, is_lung][cores]
    other = np.r_[False, ~is_lung & (volume > 1)][cores]
    if not lung.any():
        return lung
    if other.any():
        air = air & (edt.edt(~lung, anisotropy=mm) < edt.edt(~other, anisotropy=mm))
    parts = cc3d.connected_components(air, connectivity=6)
    return air & np.isin(parts, np.unique(parts[lung]))


def find_sides(lung: np.ndarray, mm: Spacing) -> list[tuple[np.ndarray, int]]:
    """Each lung, and the way along the width axis to its medial side (+1 right lung, -1 left).

    They are parted by eroding until two large pieces stand side by side. The arrays are as wide as
    the body, so a lung that stays alone is the right one if it lies in the lower half.
    """
    depth_mm = edt.edt(lung, anisotropy=mm)
    for radius in (0, 2, 4, 6, 8, 11, 14, 18, 22):
        seeds = cc3d.largest_k(depth_mm > radius, k=2, connectivity=6)
        sizes = np.bincount(seeds.ravel(), minlength=3)[1:3]
        if sizes.min() == 0 or sizes.min() < 0.15 * sizes.max():
            continue
        columns = [np.nonzero(seeds == k)[2].mean() for k in (1, 2)]
        if abs(columns[0] - columns[1]) * mm[2] < 50:
            continue
        right, left = (1, 2) if columns[0] < columns[1] else (2, 1)
        is_right = edt.edt(seeds != right, anisotropy=mm) < edt.edt(seeds != left, anisotropy=mm)
        return [(lung & is_right, 1), (lung & ~is_right, -1)]
    return [(lung, 1 if np.nonzero(lung)[2].mean() < lung.shape[2] / 2 else -1)]


def _close(lung: np.ndarray, radius_mm: float, mm: Spacing) -> np.ndarray:
    """Closing by a ball, which fills vessels, fissures and lesions narrower than its diameter."""
    pad = [(int(np.ceil(radius_mm / s)) + 1,) * 2 for s in mm]
    near = edt.edt(~np.pad(lung, pad), anisotropy=mm) <= radius_mm
    closed = edt.edt(near, anisotropy=mm) > radius_mm
    holes = cc3d.connected_components(~closed, connectivity=6)
    closed = holes != holes[0, 0, 0]
    return closed[tuple(slice(a, -b) for a, b in pad)]


def _consolidation(lung: np.ndarray, medial: int, hu: np.ndarray, mm: Spacing) -> np.ndarray:
    """Dense voxels below which there is lung, and that lung surrounds in the slice or pleura holds.

    Recovers consolidations too large to close. Liver and stomach have no lung below; heart, hilum
    and spine have none on their medial side; the lung's convex hull stands for the chest wall.
    """
    lung = _opened(lung, AERATED_MM, mm)
    holes = np.array([ndimage.binary_fill_holes(lung_slice) for lung_slice in lung])
    dense = (_seen(lung, 2, -medial) | holes) & _seen(lung, 0, 1) & ~lung & (hu < BONE_HU)
    points = np.argwhere(dense)
    inside = np.ones(len(points), bool)
    try:
        hull = ConvexHull(np.argwhere(lung & _dilated(~lung)))
    except (QhullError, ValueError):  # nothing thick enough to have a hull
        return np.zeros_like(dense)
    for *normal, offset in hull.equations:
        inside &= points @ normal + offset <= 0.5
    dense[tuple(points[~inside].T)] = False
    return dense & _opened(dense | lung & (hu > AIR_HU), AERATED_MM, mm)


def _label_in_slices(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Components that do not reach over slices."""
    labels, count = ndimage.label(mask, _IN_PLANE)  # pyright: ignore[reportGeneralTypeIssues]
    return labels, count


def _dilated(mask: np.ndarray, structure: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(ndimage.binary_dilation(mask, structure))


def _seen(mask: np.ndarray, axis: int, way: int) -> np.ndarray:
    """Voxels with some of the mask before them along the axis, walked upwards or (-1) down."""
    line = np.flip(mask, axis) if way < 0 else mask
    line = np.logical_or.accumulate(line, axis=axis)
    return np.flip(line, axis) if way < 0 else line


def _opened(mask: np.ndarray, radius_mm: float, mm: Spacing) -> np.ndarray:
    """Opening by a ball, or by one voxel where voxels are larger than the ball."""
    radius_mm = max(radius_mm, *mm[1:])
    core = edt.edt(mask, anisotropy=mm) > radius_mm
    return edt.edt(~core, anisotropy=mm) <= radius_mm


def _to_source(
    filled: np.ndarray,
    lung: np.ndarray,
    hu: np.ndarray,
    box: Box,
    step: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    """The mask on the source grid. Within a working voxel of the surface, air there decides."""
    sure = (filled & ~_dilated(~filled)) | (filled & ~lung)
    surface = _dilated(filled) & ~sure & (lung | (hu >= AIR_HU))
    source = tuple(
        slice(b.start * s, min(b.stop * s, n))
        for b, s, n in zip(box, step, values.shape, strict=True)
    )
    levels = sure.view(np.uint8) * np.uint8(2) + surface.view(np.uint8)
    for axis in range(3):
        levels = np.repeat(levels, step[axis], axis)
    levels = levels[tuple(slice(0, s.stop - s.start) for s in source)]
    mask = np.zeros(values.shape, bool)
    mask[source] = (levels == 2) | ((levels == 1) & (values[source] < AIR_HU))
    return mask
