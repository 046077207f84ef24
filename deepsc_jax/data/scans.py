"""Scans and masks: NIfTI files or DICOM folders in, NIfTI files on the source's own grid out.

In memory every volume has the canonical order (depth, height, width): inferior to superior,
anterior to posterior, patient right to left. That is the transpose of a NIfTI array in "LPS" voxel
order, and what SimpleITK's `GetArrayFromImage` gives of an LPS-oriented image. Only axes are
swapped and flipped, nothing is resampled: an oblique scan goes to the closest axes and keeps its
affine.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float32, Num
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from deepsc_jax.data import itk, nifti
from deepsc_jax.data.dicom import read_series
from deepsc_jax.data.images import PICTURES
from deepsc_jax.data.nifti import MM_PER_UNIT, largest_corner_distance
from deepsc_jax.data.source import (
    FORMATS,
    LPS,
    MAX_SLICES,
    Affine,
    Doubt,
    Source,
    require_packed_plausibly,
    settled,
    to_source_axes,
)
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.names import counted

Intensity = Literal["hu", "unit"]
Volume = Float32[np.ndarray, "depth height width"]
Mask = Bool[np.ndarray, "depth height width"]

MIN_SLICES = 8
"""The network pools by 2 three times: fewer slices than 2³ leave nothing at its coarsest scale."""

AFFINE_TOLERANCE_VOXELS = 0.1
"""How far a mask's corner may lie from its scan's, in voxels of the scan. Headers store float32
matrices or quaternions, whose rounding stays below 0.01 voxel; half a voxel is another grid."""

MIN_UPRIGHT = 0.98
"""Share of its spacing's product that a voxel's volume must have. A gantry tilted by 11° is there;
volumes and distances in mm, which take the axes for upright, would be more wrong beyond."""

VOXEL_MM = (0.1, 25.0)
"""What a side of a voxel of a chest CT in HU may measure."""

SUFFIXES = (*nifti.SUFFIXES, *itk.SUFFIXES)
"""Of files that hold a scan or a mask, in small letters; files have them in any case. Of a pair
.img and .hdr the first is named, though `load_scan` takes either."""

MOST_LABELS = 32
"""Of a lung mask: lobes and segments have fewer, an image given in its place has more."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT scan in canonical order, with what is needed to write results on its source's grid."""

    name: str
    values: Volume
    """HU; with `intensity='unit'` whatever the file holds within 0..255 or 0..1."""
    spacing_mm: tuple[float, float, float]
    """Voxel size in canonical order (depth, height, width)."""
    affine: Affine
    """Of the source file: its voxel index to its world, in the header's unit (mm as a rule)."""
    source_shape: tuple[int, int, int]
    """Of the source file, in its own axis order."""
    path: str | None
    header: nib.Nifti1Header
    """The source's geometry alone: forms and their codes, voxel sizes, units; no patient data."""
    notes: tuple[str, ...] = ()
    """What another reader would read differently, was allowed, or was left out: a line each."""
    files: tuple[Path, ...] = ()
    """Of DICOM: the file of each slice, in the order of the source's last axis."""


def load_scan(
    path: str | os.PathLike[str],
    intensity: Intensity = "hu",
    allow: Collection[str] = frozenset(),
) -> Scan:
    """Load a scan from a file of one of `SUFFIXES` or a folder of DICOM slices.

    Voxel sizes and orientation come from the affine nibabel chooses (sform before qform). A fourth
    axis of length 1 is dropped. NRRD, MetaImage and DICOM need the extra `dicom`.

    Args:
        path: the file, or the folder.
        intensity: what the values must look like: CT numbers (`hu`) or a 0..255 or 0..1 image
            (`unit`); they are checked, not changed.
        allow: kinds of doubt (`source.KINDS`) that become notes; else they are refused.

    Raises:
        InputError: missing, empty, truncated or foreign file; folder without a CT series; not a
            3D volume; fewer than MIN_SLICES slices, or more than MAX_SLICES; voxel size that is
            zero, negative, not a number, recorded differently, or (HU) outside VOXEL_MM; NaN or
            infinite voxels; one value throughout; values that contradict `intensity`.
    """
    path = Path(path)
    source = _read(path)
    axes = _axes(source, path)
    depth, height, width = (source.shape[axis] for axis in axes)
    if depth < MIN_SLICES:
        raise InputError(
            f"{path}: scan of {counted(depth, 'slice')}, expected at least {MIN_SLICES}: the "
            "network halves the depth three times; give the whole series"
        )
    if depth > MAX_SLICES:
        raise InputError(
            f"{path}: scan of {depth} slices, expected at most {MAX_SLICES}: check its dimensions, "
            "or crop it to the chest"
        )
    if min(height, width) < MIN_SLICES:
        raise InputError(
            f"{path}: its slices are {height}×{width}, expected at least {MIN_SLICES}×{MIN_SLICES}:"
            " check the file's dimensions"
        )
    spacing_mm = _spacing_mm(source)
    doubts = list(source.doubts)
    if intensity == "hu" and not all(VOXEL_MM[0] <= size <= VOXEL_MM[1] for size in spacing_mm):
        shown = " × ".join(f"{size:g}" for size in reversed(spacing_mm))
        measured = (
            f"its voxels measure {shown} mm, expected {VOXEL_MM[0]:g} to {VOXEL_MM[1]:g} each"
        )
        doubts.append(Doubt("voxels", measured, "correct the header, or its unit"))
    notes = source.notes + settled(path, doubts, allow)
    require_packed_plausibly(path, source.unpacked, source.packed)
    values, low, high = _values(source, path)
    notes += settled(path, _intensity_doubts(low, high, intensity, path), allow)
    return Scan(
        name=scan_name(path),
        values=values,
        spacing_mm=spacing_mm,
        affine=source.affine,
        source_shape=source.shape,
        path=str(path),
        header=source.header,
        notes=notes,
        files=source.files,
    )


def load_mask(
    path: str | os.PathLike[str],
    scan: Scan,
    kind: str = "lesion mask",
    allow: Collection[str] = frozenset(),
    notes: list[str] | None = None,
) -> Mask:
    """Load a mask of `scan` in canonical order; it may be stored in another axis order.

    A lesion mask holds 0 and 1; a lung mask may hold labels of sides or lobes, or 255: what is not
    0 is lung. Shape and position are compared before voxels are read.

    Args:
        path: of the mask's file.
        scan: whose mask it is.
        kind: `lesion mask` or `lung mask`.
        allow: as of `load_scan`.
        notes: where given, what another reader would read differently is added, a line each, unless
            the scan's notes have it.

    Raises:
        InputError: as `load_scan` for the file; shape or position other than the scan's (a corner
            off by more than AFFINE_TOLERANCE_VOXELS); values other than 0 and 1, or than labels.
    """
    path = Path(path)
    source = _read(path)
    shape = tuple(source.shape[axis] for axis in _axes(source, path))
    if shape != scan.values.shape:
        raise InputError(
            f"{path}: {kind} is {source.shape}, its scan {scan.name} "
            f"{scan.source_shape}: resample the mask onto the scan, or leave it out"
        )
    doubts = list(source.doubts)
    mm, scan_mm = _mm_per_unit(source.header), _mm_per_unit(scan.header)
    offset = _offset_voxels(source, scan, mm / scan_mm)
    if not offset <= AFFINE_TOLERANCE_VOXELS and mm != scan_mm:
        offset = _offset_voxels(source, scan, 1.0)
        doubts.append(
            Doubt(
                "voxels",
                f"by the units in their headers its voxels are {mm / scan_mm:g} times those of its "
                "scan, by the numbers alone they are where its scan's are: ITK reads the first, "
                "nibabel the second",
                "correct the header",
            )
        )
    if not offset <= AFFINE_TOLERANCE_VOXELS:
        raise InputError(
            f"{path}: {kind} lies up to {offset:.3g} voxels away from its scan {scan.name} by the "
            f"affines in their headers, expected at most {AFFINE_TOLERANCE_VOXELS:g}: "
            "resample the mask onto the scan, or correct its header"
        )
    found = source.notes + settled(path, doubts, allow)
    if notes is not None:
        notes += [f"{kind}: {note}" for note in found if note not in scan.notes]
    labels = kind == "lung mask"
    mask = np.empty(shape, np.bool_)
    others, seen = np.zeros(0), np.zeros(0)
    for index, raw in enumerate(_canonical(source)):
        values = source.scaled(raw)
        whole = np.rint(values)
        # A slope in the header makes 1 of a scaled integer mask 1.00000006.
        with np.errstate(invalid="ignore"):  # infinities
            fits = np.abs(values - whole) < 1e-4 * np.maximum(1, np.abs(whole))
        fits &= (whole >= 0) if labels else (whole == 0) | (whole == 1)
        mask[index] = fits & (whole > 0)
        if not fits.all():
            others = np.union1d(others, values[~fits])
        elif labels and len(seen) <= MOST_LABELS + 1:
            seen = np.union1d(seen, whole)
    if others.size:
        shown = ", ".join(f"{value:.6g}" for value in others[:5])
        beside, expected = (
            ("", "0 (background) and whole numbers above")
            if labels
            else (" beside 0 and 1", "0 and 1 alone")
        )
        raise InputError(
            f"{path}: {kind} holds {shown}{', …' if len(others) > 5 else ''}{beside}, "
            f"expected {expected}: write it as 0 (background) and 1"
        )
    if len(seen) > MOST_LABELS + 1:
        raise InputError(
            f"{path}: {kind} holds more than {MOST_LABELS} labels, expected those of lungs or "
            "lobes, all of which are lung: write it as 0 (background) and 1"
        )
    return mask


def save_like(
    array: Num[np.ndarray, "depth height width"] | Mask,
    scan: Scan,
    path: str | os.PathLike[str],
    dtype: np.dtype | type | str,
) -> None:
    """Write a canonical array as NIfTI on the source's own grid, orientation, affine and forms.

    Raises:
        ValueError: the array is not of the scan's shape, or `dtype` cannot hold its values.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if array.shape != scan.values.shape:
        raise ValueError(f"array is {array.shape}, its scan {scan.name} {scan.values.shape}")
    dtype = np.dtype(dtype)
    stored = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(stored, array):
        raise ValueError(f"{path}: values do not fit {dtype} without loss")
    header = scan.header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1.0, 0.0)
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_class(to_source_axes(stored, scan.affine), scan.affine, header)
    with aside(path) as partial:
        nib.save(image, partial)


def is_scan(name: str) -> bool:
    """Whether a file's name is that of a scan or mask: one of SUFFIXES, in any case of letters."""
    return name.lower().endswith(SUFFIXES)


def _read(path: Path) -> Source:
    if os.path.isdir(path):
        return read_series(path)
    name = path.name.lower()
    if name.endswith(itk.SUFFIXES):
        return itk.read_itk(path)
    if name.endswith((*nifti.SUFFIXES, ".hdr")):
        return nifti.read_nifti(path)
    if name.endswith(PICTURES):
        raise InputError(
            f"{path}: a picture by its name, a CT scan expected: X-rays are for a model and a "
            "store of --modality=xray"
        )
    raise InputError(
        f"{path}: {'not a scan by its name' if os.path.exists(path) else 'no such file'}, "
        f"expected {FORMATS} (or the folder, for DICOM): convert it first"
    )


def _values(source: Source, path: Path) -> tuple[Volume, float, float]:
    """The scaled voxels in canonical order, their least and their largest."""
    voxels = _canonical(source)
    values = np.empty(voxels.shape, np.float32)
    bad = 0
    low, high = np.inf, -np.inf
    for index, raw in enumerate(voxels):
        with np.errstate(over="ignore", invalid="ignore"):
            values[index] = source.scaled(raw)
        bad += values[index].size - int(np.count_nonzero(np.isfinite(values[index])))
        low, high = min(low, float(values[index].min())), max(high, float(values[index].max()))
    if bad:
        raise InputError(
            f"{path}: NaN or infinite in {counted(bad, 'voxel')}, expected a number in each: "
            "write the file with air (-1024 HU) in their place"
        )
    return values, low, high


def _intensity_doubts(low: float, high: float, intensity: Intensity, path: Path) -> list[Doubt]:
    within = f"its values lie within {low:g}..{high:g}"
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}, expected an image: check the export")
    if intensity == "unit" and (low < 0 or high > 255 or 1 < high <= 2):
        raise InputError(
            f"{path}: {within}, expected 0..1 or 0..255 with --intensity=unit: "
            "prepare and train with --intensity=hu for CT numbers"
        )
    if intensity == "hu" and low > -500:
        advice = (
            "prepare and train with --intensity=unit for images that are not in HU"
            if high <= 255
            else "rescale them to HU (stored values often lack an offset of -1024)"
        )
        return [Doubt("intensity", f"{within}, expected HU with air near -1000", advice)]
    return []


def _axes(source: Source, path: Path) -> tuple[int, int, int]:
    """The file's axes that are the canonical depth, height and width.

    Raises InputError where its affine has no three axes that stand upright on each other.
    """
    linear = source.affine[:3, :3]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norms = np.linalg.norm(linear, axis=0)
    if not (np.isfinite(source.affine).all() and np.isfinite(norms).all() and (norms > 0).all()):
        shown = " × ".join(f"{norm:g}" for norm in norms)
        raise InputError(
            f"{path}: its affine gives voxels of {shown} mm, expected positive numbers: "
            "correct the header"
        )
    upright = abs(np.linalg.det(linear / norms))
    if upright < MIN_UPRIGHT:
        raise InputError(
            f"{path}: the axes of its affine are sheared (a voxel has {upright:.0%} of the volume "
            f"that its spacing says, expected at least {MIN_UPRIGHT:.0%}): resample it to upright "
            "axes, or correct the header"
        )
    ways = io_orientation(source.affine)[:, 0].astype(int).tolist()
    return ways.index(2), ways.index(1), ways.index(0)


def _mm_per_unit(header: nib.Nifti1Header) -> float:
    return MM_PER_UNIT.get(int(header["xyzt_units"]), 1.0)


def _offset_voxels(source: Source, scan: Scan, scale: float) -> float:
    """How far a corner of a mask lies from its scan's, in voxels; its affine is scaled first."""
    scan_affine = _canonical_affine(scan.affine, scan.source_shape)
    affine = _canonical_affine(source.affine, source.shape)
    affine[:3] *= scale
    depth, height, width = scan.values.shape
    offset = largest_corner_distance(affine, scan_affine, (width, height, depth))
    return offset / float(np.linalg.norm(scan_affine[:3, :3], axis=0).min())


def _spacing_mm(source: Source) -> tuple[float, float, float]:
    canonical = _canonical_affine(source.affine, source.shape)
    sizes = np.linalg.norm(canonical[:3, :3], axis=0) * _mm_per_unit(source.header)
    width_mm, height_mm, depth_mm = sizes
    return float(depth_mm), float(height_mm), float(width_mm)


def _canonical(source: Source) -> np.ndarray:
    """A (D, H, W) view of the raw voxels."""
    to_lps = ornt_transform(io_orientation(source.affine), LPS)
    return apply_orientation(source.voxels(), to_lps).T


def _canonical_affine(affine: Affine, shape: tuple[int, ...]) -> Affine:
    return affine @ inv_ornt_aff(ornt_transform(io_orientation(affine), LPS), shape)


def scan_name(path: str | os.PathLike[str]) -> str:
    """What a scan or an X-ray is called after its file or folder; links keep their own name."""
    name = Path(os.path.abspath(path)).name
    suffixes = [
        suffix for suffix in (*SUFFIXES, ".hdr", *PICTURES) if name.lower().endswith(suffix)
    ]
    return name[: len(name) - max(map(len, suffixes), default=0)] or name
