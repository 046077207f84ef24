"""What DICOM objects that are made of a CT series say of it: its UIDs, its frames and no more.

Needs pydicom (the extra `dicom`). Nothing is copied that is not named here, so that no text of a
scanner's or a hospital's gets into what is written. The patient module is blank unless it is asked
for.
"""

import contextlib
import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"

_UIDS = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "SOPClassUID",
    "SOPInstanceUID",
)
_OF_ALL = _UIDS[:3]  # the same in each slice
_GEOMETRY = ("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
PATIENT = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientSex",
    "OtherPatientNames",
    "EthnicGroup",
    "PatientComments",
)
"""Keywords of the patient module (DICOM PS3.3, C.7.1.1) that are copied where that is asked for:
single values, since an item of a sequence may hold anything."""
_BLANK = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_BLANK_STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
_SEXES = ("M", "F", "O", "")
_DATE = re.compile(r"(\d{8})?")
_UID = re.compile(r"(?=.{1,64}$)(0|[1-9]\d*)(\.(0|[1-9]\d*))+")


def installed() -> bool:
    """Whether the libraries that write DICOM objects are."""
    return all(importlib.util.find_spec(name) is not None for name in ("pydicom", "highdicom"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries without their warnings, which quote what is in a file, and as lenient as it.

    Values are looked at when they are asked for, not when a file is read.
    """
    from pydicom.config import disable_value_validation

    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@quiet()
def source_images(files: Sequence[Path], *, keep_identifiers: bool = False) -> list[Untyped]:
    """The slices in these files, in this order, as pydicom data sets without pixels.

    Their distance is that of their planes, along the normal: in a series with a tilted gantry it is
    less than that of their positions.

    Args:
      files: of the slices.
      keep_identifiers: whether the patient module is copied; else it is blank.

    Raises:
      InputError: the slices cannot be referred to: a UID or a position is missing or malformed, or
        they are no CT images.
    """
    read = [_read(path, patient=keep_identifiers and not index) for index, path in enumerate(files)]
    first = read[0]
    images = []
    for header in read:
        _require_referable(header, first)
        images.append(_image(header, first))
    positions = np.array([image.ImagePositionPatient for image in images], np.float64)
    axes = np.array(images[0].ImageOrientationPatient, np.float64)
    step = _step_mm(positions, np.cross(axes[:3], axes[3:]))
    thickness = _numbers(first, "SliceThickness", 1)
    for image in images:
        image.SpacingBetweenSlices = _decimal(step)
        image.SliceThickness = _decimal(thickness[0] if thickness and thickness[0] > 0 else step)
    return images


@quiet()
def patient(path: Path) -> dict[str, str]:
    """Name and ID of the patient in a DICOM file, "" where they are not in it."""
    header = _read(path, patient=True)
    return {word: str(header.get(word) or "") for word in ("PatientName", "PatientID")}


def _read(path: Path, *, patient: bool) -> Untyped:
    """The elements of a file that are used here."""
    import pydicom

    wanted: list[Untyped] = [*_UIDS, *_GEOMETRY, "SliceThickness", *(PATIENT if patient else ())]
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=wanted)
    except OSError:
        raise
    except Exception as error:  # of many kinds, of a file that another library has read
        raise InputError(f"a slice cannot be read by pydicom ({type(error).__name__})") from error


def _require_referable(header: Untyped, first: Untyped) -> None:
    """Raise InputError where an object cannot refer to a slice; no value is quoted."""
    for word in _UIDS:
        if not _UID.fullmatch(str(header.get(word) or "")):
            raise InputError(f"its slices have no {word} that is a UID")
        if word in _OF_ALL and header.get(word) != first.get(word):
            raise InputError(f"its slices differ in {word}")
    if header.SOPClassUID != CT_IMAGE_STORAGE:
        raise InputError("its slices are no CT images of one frame by their SOPClassUID")
    for word, count in (
        ("ImagePositionPatient", 3),
        ("ImageOrientationPatient", 6),
        ("PixelSpacing", 2),
    ):
        if not _numbers(header, word, count):
            raise InputError(f"its slices have no {word} that can be read")


def _numbers(header: Untyped, word: str, count: int) -> tuple[float, ...]:
    """The numbers of an element, () where they are not `count`."""
    try:
        value = header.get(word)
        values = (value,) if count == 1 else tuple(value)
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else ()


def _image(header: Untyped, first: Untyped) -> Untyped:
    """A data set of a slice that holds what is named here, and nothing else of it."""
    from pydicom.dataset import Dataset

    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, whatever the source has
    image.Modality = "CT"
    for word in _UIDS:
        setattr(image, word, str(header.get(word)))
    image.Rows, image.Columns = int(header.Rows), int(header.Columns)
    # Orientation and spacing agree but for rounding, or the scan was refused; highdicom wants them
    # the same.
    for word, source in (
        ("ImagePositionPatient", header),
        ("ImageOrientationPatient", first),
        ("PixelSpacing", first),
    ):
        setattr(image, word, [_decimal(float(value)) for value in source.get(word)])
    for word in (*_BLANK, *_BLANK_STUDY):
        setattr(image, word, "")
    for word in PATIENT:
        if word in first:
            setattr(image, word, first.get(word))
    if str(image.PatientSex) not in _SEXES:
        image.PatientSex = ""
    if not _DATE.fullmatch(str(image.PatientBirthDate or "")):
        image.PatientBirthDate = ""
    return image


def _decimal(value: float) -> Untyped:
    """A number as DICOM's decimal string, which has at most 16 letters."""
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)


def _step_mm(positions: Float64[np.ndarray, "slice 3"], normal: Float64[np.ndarray, "3"]) -> float:
    """The mean distance of neighbouring planes; 1 of a single one."""
    if len(positions) < 2:
        return 1.0
    return float(abs((positions[-1] - positions[0]) @ normal)) / (len(positions) - 1)
