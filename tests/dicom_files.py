"""CT series as a scanner exports them, with texts in every tag that holds one, by pydicom."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepsc_jax.data.scans import Scan

FRAME_OF_REFERENCE = "1.2.3.77"
SOP = "1.2.3.4"


def geometry(slices: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Orientation (6) and positions (slices, 3) of planes tilted by degrees about the x axis.

    The table moves along z, whatever the gantry's tilt is, by 2.5 mm.
    """
    angle = np.deg2rad(tilt)
    orientation = np.array([1, 0, 0, 0, np.cos(angle), np.sin(angle)])
    positions = np.array([[-100, -150, 2.5 * index] for index in range(slices)], float)
    return orientation, positions


def write_series(
    folder: Path,
    hu: np.ndarray,
    *,
    tilt: float = 0.0,
    reverse: bool = False,
    numbers: list[int] | None = None,
    texts: dict[str, str] | None = None,
    spacing: tuple[float, float] = (0.9, 0.7),
    step: float = 1.0,
    modality: str = "CT",
    uid: str = SOP,
) -> Path:
    """Slices of (D, H, W) HU, from the feet on, as CT images of a file each.

    Args:
      folder: to write to.
      hu: the values.
      tilt: of the gantry, in degrees.
      reverse: whether the slices are numbered and named from the head on.
      numbers: of the instances; by default from 1 on.
      texts: more elements, by keyword.
      spacing: between rows and columns, in mm.
      step: by what the distance of 2.5 mm is multiplied.
      modality: as the tag says it.
      uid: of the series.
    """
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    orientation, positions = geometry(len(hu), tilt)
    for index, (plane, position) in enumerate(zip(hu, positions * [1, 1, step], strict=True)):
        rank = len(hu) - 1 - index if reverse else index
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{uid}.{index + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3", uid
        data.FrameOfReferenceUID, data.Modality = FRAME_OF_REFERENCE, modality
        data.InstanceNumber = (numbers or range(1, len(hu) + 1))[rank]
        data.ImagePositionPatient = [f"{value:g}" for value in position]
        data.ImageOrientationPatient = [f"{value:.10g}" for value in orientation]
        data.PixelSpacing, data.SliceThickness = list(spacing), 2.5 * step
        data.Rows, data.Columns = plane.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation, data.RescaleIntercept, data.RescaleSlope = 0, -1024, 1
        data.PixelData = (plane + 1024).astype("<u2").tobytes()
        with pydicom.config.disable_value_validation():
            for keyword, text in (texts or {}).items():
                setattr(data, keyword, text)
            data.save_as(folder / f"IM{rank:04}", enforce_file_format=True)
    return folder


def slices_by_uid(folder: Path) -> dict[str, Any]:
    pydicom = pytest.importorskip("pydicom")
    return {data.SOPInstanceUID: data for data in map(pydicom.dcmread, folder.iterdir())}


def overlays(path: Path, folder: Path, scan: Scan, pixels: np.ndarray) -> dict[int, np.ndarray]:
    """Each segment on the canonical grid, placed by the slices that its frames refer to.

    Slices are found on the grid by their own pixels, not by an order. A frame's position must be
    that of its slice.
    """
    pydicom = pytest.importorskip("pydicom")
    data, slices = pydicom.dcmread(path), slices_by_uid(folder)
    places = {
        uid: next(
            index
            for index, plane in enumerate(scan.values)
            if np.array_equal(plane, each.pixel_array.astype(np.float32) - 1024)
        )
        for uid, each in slices.items()
    }
    segments = {
        item.SegmentNumber: np.zeros(scan.values.shape, bool) for item in data.SegmentSequence
    }
    shared = data.SharedFunctionalGroupsSequence[0]
    for frame, groups in zip(pixels, data.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        uid = source.ReferencedSOPInstanceUID
        slice_ = slices[uid]
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_array_equal(
            np.array(position, float), np.array(slice_.ImagePositionPatient, float)
        )
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        segments[number][places[uid]] = frame > 0
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    any_slice = next(iter(slices.values()))
    np.testing.assert_allclose(
        np.array(orientation, float), np.array(any_slice.ImageOrientationPatient, float), atol=1e-9
    )
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    assert list(spacing) == list(any_slice.PixelSpacing)
    assert data.FrameOfReferenceUID == any_slice.FrameOfReferenceUID
    assert data.StudyInstanceUID == any_slice.StudyInstanceUID
    referenced = data.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == any_slice.SeriesInstanceUID
    return segments
