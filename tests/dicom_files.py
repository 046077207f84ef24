"""CT series as a scanner exports them, with texts in every tag that holds one, by pydicom."""

from pathlib import Path

import numpy as np
import pytest

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
