"""Reading a CT series from a folder of DICOM files, through SimpleITK and its GDCM.

Needs the `dicom` extra. SimpleITK's wheels decode the usual compressed transfer syntaxes, JPEG
Lossless among them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Num

from deepsc_jax.runtime.errors import InputError

POSITION_TOLERANCE = 0.1
"""Largest deviation of one slice gap from the median gap, as a share of it. Scanners round
positions to 0.01-0.1 mm; a missing slice doubles a gap."""


@dataclass(frozen=True, eq=False)
class Series:
    """One CT series as stored: voxels in HU and where they are."""

    voxels: Num[np.ndarray, "columns rows slices"]
    affine: Float64[np.ndarray, "4 4"]
    """Voxel index (column, row, slice) to millimetres in NIfTI's RAS+ world."""
    uid: str


def read_series(folder: Path) -> Series:
    """Read the CT series with most slices in `folder` (subfolders are not searched).

    Slices are ordered by their position; rescale slope and intercept are applied, so voxels are HU.
    The slice axis of the affine is the mean step between slice positions, so a tilted gantry's
    shear is kept.

    Raises:
        InputError: SimpleITK is absent; no DICOM series; not a CT; slices that cannot be decoded,
            differ in size, or are not evenly spaced.
    """
    sitk = _simpleitk()
    reader = sitk.ImageSeriesReader()
    showed_warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        uid, files = _largest_series(sitk, folder)
        reader.SetFileNames(files)
        reader.MetaDataDictionaryArrayUpdateOn()
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{folder}: its DICOM files cannot be read as one series ({_reason(error)}): "
            "copy the series afresh, one series to a folder"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(showed_warnings)

    modality = _tag(reader, 0, "0008|0060")
    if modality not in ("", "CT"):
        raise InputError(f"{folder}: its modality is {modality}, expected CT: give a CT series")
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{folder}: its DICOM files hold {image.GetDimension()}-D images of "
            f"{image.GetNumberOfComponentsPerPixel()} components, expected a stack of grey slices: "
            "export the CT as one file per slice"
        )

    affine = np.eye(4)
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    step = _slice_step(reader, len(files), folder)
    if step is not None:
        affine[:3, 2] = step
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return Series(sitk.GetArrayFromImage(image).T, lps_to_ras @ affine, uid)


def _simpleitk():
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(
            "reading DICOM needs SimpleITK, which is not installed: pip install 'deepsc_jax[dicom]'"
        ) from error
    return SimpleITK


def _largest_series(sitk, folder: Path) -> tuple[str, tuple[str, ...]]:
    reader = sitk.ImageSeriesReader
    series = {
        uid: reader.GetGDCMSeriesFileNames(str(folder), uid)
        for uid in reader.GetGDCMSeriesIDs(str(folder))
    }
    if not series:
        raise InputError(
            f"{folder}: a folder without a DICOM series, expected one CT series: give the folder "
            "that holds the slices themselves, or a .nii or .nii.gz file"
        )
    uid = max(series, key=lambda key: (len(series[key]), key))
    if len(series) > 1:
        print(
            f"note: {folder}: {len(series)} DICOM series found, the one with most slices is read "
            f"({len(series[uid])} slices, {uid}): for another, give a folder that holds it alone",
            file=sys.stderr,
        )
    return uid, series[uid]


def _slice_step(reader, count: int, folder: Path) -> Float64[np.ndarray, "3"] | None:
    """The mean step from slice to slice in mm (DICOM's LPS), or None where it is not recorded."""
    texts = [_tag(reader, index, "0020|0032") for index in range(count)]
    if count < 2 or not all(texts):
        return None
    try:
        positions = np.array([[float(value) for value in text.split("\\")] for text in texts])
    except ValueError as error:
        raise InputError(
            f"{folder}: an ImagePositionPatient cannot be read ({error}), expected three numbers a "
            "slice: export the series afresh"
        ) from error
    steps = np.diff(positions, axis=0)
    gaps = np.linalg.norm(steps, axis=1)
    median = float(np.median(gaps))
    if median <= 0 or np.abs(gaps - median).max() > POSITION_TOLERANCE * median:
        raise InputError(
            f"{folder}: its slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart, expected "
            "even steps: a slice is missing or two series are mixed; export the series afresh"
        )
    return (positions[-1] - positions[0]) / (count - 1)


def _tag(reader, index: int, key: str) -> str:
    return reader.GetMetaData(index, key).strip() if reader.HasMetaDataKey(index, key) else ""


def _reason(error: Exception) -> str:
    """The last line of an ITK message, which is the one that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
