"""Scans and masks: NIfTI files or DICOM folders in, NIfTI files on the source's own grid out.

In memory every volume has the canonical order (depth, height, width): inferior to superior,
anterior to posterior, patient right to left. That is the transpose of a NIfTI array in "LPS" voxel
order, and what SimpleITK's `GetArrayFromImage` gives of an LPS-oriented image. Only axes are
swapped and flipped, nothing is resampled: an oblique scan goes to the closest axes and keeps its
affine.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float32, Num
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from deepsc_jax.data.dicom import read_series
from deepsc_jax.data.nifti import Affine, Source, read_nifti
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside

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

_LPS = axcodes2ornt(("L", "P", "S"))
_MM_PER_UNIT = {1: 1e3, 2: 1.0, 3: 1e-3}
"""By NIfTI's code for metre, millimetre and micron; a scan without one is taken to be in mm."""


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


def load_scan(path: str | os.PathLike[str], intensity: Intensity = "hu") -> Scan:
    """Load a scan from a NIfTI file (.nii, .nii.gz) or a folder of DICOM slices.

    Voxel sizes and orientation come from the affine nibabel chooses (sform before qform). A fourth
    axis of length 1 is dropped. `intensity` says what the values must look like: CT numbers (`hu`)
    or a 0..255 or 0..1 image (`unit`); they are checked, not changed.

    Raises:
        InputError: missing, empty, truncated or non-NIfTI file; folder without a CT series; not a
            3D volume; fewer than MIN_SLICES slices; voxel size that is zero, negative or not a
            number; NaN or infinite voxels; one value throughout; values that contradict
            `intensity`.
    """
    path = Path(path)
    if path.is_dir():
        return convert_dicom(path, intensity)
    return _to_scan(read_nifti(path), path, intensity)


def convert_dicom(folder: str | os.PathLike[str], intensity: Intensity = "hu") -> Scan:
    """Load the CT series with most slices in a folder of DICOM files (extra `dicom`).

    Raises:
        InputError: as `load_scan` and `dicom.read_series` say.
    """
    folder = Path(folder)
    series = read_series(folder)
    header = nib.Nifti1Header()
    header.set_data_shape(series.voxels.shape)
    header.set_sform(series.affine, code="scanner")
    header.set_qform(series.affine, code="scanner", strip_shears=True)
    header.set_xyzt_units("mm")
    # The header holds float32: taking the affine back from it makes the written file agree exactly.
    affine = np.asarray(header.get_sform(), np.float64)
    return _to_scan(Source(series.voxels, 1.0, 0.0, affine, header), folder, intensity)


def load_mask(path: str | os.PathLike[str], scan: Scan, kind: str = "lesion mask") -> Mask:
    """Load a mask of `scan` in canonical order; it may be stored in another axis order.

    Raises:
        InputError: as `load_scan` for the file; shape or position other than the scan's (a corner
            off by more than AFFINE_TOLERANCE_VOXELS); values other than 0 and 1.
    """
    path = Path(path)
    source = read_nifti(path)
    voxels, affine = _canonical(source, path)
    if voxels.shape != scan.values.shape:
        raise InputError(
            f"{path}: {kind} is {source.shape}, its scan {scan.name} "
            f"{scan.source_shape}: resample the mask onto the scan, or leave it out"
        )
    scan_affine = _canonical_affine(scan.affine, scan.source_shape)
    offset = _largest_corner_offset(affine, scan_affine, voxels.shape[::-1])
    if offset > AFFINE_TOLERANCE_VOXELS:
        raise InputError(
            f"{path}: {kind} lies up to {offset:.3g} voxels away from its scan {scan.name} by the "
            f"affines in their headers, expected at most {AFFINE_TOLERANCE_VOXELS:g}: "
            "resample the mask onto the scan, or correct its header"
        )
    mask = np.empty(voxels.shape, np.bool_)
    others: list[np.ndarray] = []
    for index, raw in enumerate(voxels):
        values = source.scaled(raw)
        # A slope in the header makes 1 of a scaled integer mask 1.00000006.
        mask[index] = one = np.abs(values - 1) < 1e-4
        others.append(np.unique(values[~(one | (np.abs(values) < 1e-4))]))
    wrong = np.unique(np.concatenate(others))
    if wrong.size:
        shown = ", ".join(f"{value:.6g}" for value in wrong[:5])
        raise InputError(
            f"{path}: {kind} holds {shown}{', …' if wrong.size > 5 else ''} beside 0 and 1, "
            "expected 0 and 1 alone: write it as 0 (background) and 1"
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
    to_source = ornt_transform(_LPS, io_orientation(scan.affine))
    header = scan.header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1.0, 0.0)
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_class(apply_orientation(stored.T, to_source), scan.affine, header)
    with aside(path) as partial:
        nib.save(image, partial)


def _to_scan(source: Source, path: Path, intensity: Intensity) -> Scan:
    voxels, affine = _canonical(source, path)
    depth, height, width = voxels.shape
    if depth < MIN_SLICES:
        raise InputError(
            f"{path}: scan of {depth} slices, expected at least {MIN_SLICES}: the network halves "
            "the depth three times; give the whole series"
        )
    if min(height, width) < MIN_SLICES:
        raise InputError(
            f"{path}: its slices are {height}×{width}, expected at least {MIN_SLICES}×{MIN_SLICES}:"
            " check the file's dimensions"
        )
    values = np.empty(voxels.shape, np.float32)
    bad = 0
    low, high = np.inf, -np.inf
    for index, raw in enumerate(voxels):
        with np.errstate(over="ignore"):
            values[index] = source.scaled(raw)
        bad += values[index].size - int(np.count_nonzero(np.isfinite(values[index])))
        low, high = min(low, float(values[index].min())), max(high, float(values[index].max()))
    if bad:
        raise InputError(
            f"{path}: {bad} voxels are NaN or infinite, expected a number in each: "
            "write the file with air (-1024 HU) in their place"
        )
    _check_intensity(low, high, intensity, path)
    millimetres = _MM_PER_UNIT.get(int(source.header["xyzt_units"]), 1.0)
    width_mm, height_mm, depth_mm = np.linalg.norm(affine[:3, :3], axis=0) * millimetres
    return Scan(
        name=scan_name(path),
        values=values,
        spacing_mm=(float(depth_mm), float(height_mm), float(width_mm)),
        affine=source.affine,
        source_shape=source.shape,
        path=str(path),
        header=source.header,
    )


def _check_intensity(low: float, high: float, intensity: Intensity, path: Path) -> None:
    found = f"{path}: its values lie within {low:g}..{high:g}"
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}, expected an image: check the export")
    if intensity == "unit" and (low < 0 or high > 255 or 1 < high <= 2):
        raise InputError(
            f"{found}, expected 0..1 or 0..255 with --intensity=unit: "
            "prepare and train with --intensity=hu for CT numbers"
        )
    if intensity == "hu" and low > -500:
        advice = (
            "prepare and train with --intensity=unit for images that are not in HU"
            if high <= 255
            else "rescale them to HU (stored values often lack an offset of -1024)"
        )
        raise InputError(f"{found}, expected HU with air near -1000: {advice}")


def _canonical(source: Source, path: Path) -> tuple[np.ndarray, Affine]:
    """A (D, H, W) view of the raw voxels, and the affine of its transpose, in the header's unit."""
    linear = source.affine[:3, :3]
    with np.errstate(over="ignore", under="ignore"):
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
    to_lps = ornt_transform(io_orientation(source.affine), _LPS)
    voxels = apply_orientation(source.voxels, to_lps).T
    return voxels, _canonical_affine(source.affine, source.voxels.shape)


def _canonical_affine(affine: Affine, shape: tuple[int, ...]) -> Affine:
    return affine @ inv_ornt_aff(ornt_transform(io_orientation(affine), _LPS), shape)


def _largest_corner_offset(a: Affine, b: Affine, shape: tuple[int, ...]) -> float:
    """Largest distance between the two grids' corners, in voxels (of `b`, its smallest side)."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape]), -1).reshape(-1, 3)
    offsets = corners @ (a - b)[:3, :3].T + (a - b)[:3, 3]
    return float(np.linalg.norm(offsets, axis=1).max() / np.linalg.norm(b[:3, :3], axis=0).min())


def scan_name(path: str | os.PathLike[str]) -> str:
    """What a scan is called after its file or folder; links keep their own name."""
    return Path(os.path.abspath(path)).name.removesuffix(".gz").removesuffix(".nii")
