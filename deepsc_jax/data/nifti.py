"""NIfTI files as they are stored: checked for damage and for geometry that cannot be meant.

nibabel reads a header leniently (it mends a voxel size of 0 to 1 mm) and a gzip stream no further
than it must (so a flipped byte passes). Both matter here, so the raw header is looked at first and
the stream is read to its end, where gzip compares its checksum.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Num
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError

from deepsc_jax.runtime.errors import InputError

Affine = Float64[np.ndarray, "4 4"]

_GZIP_LARGEST_RATIO = 1032  # deflate: 258 bytes from 2 bits

_READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    KeyError,
    OverflowError,
    ImageFileError,
    ImageDataError,
    HeaderDataError,
    HeaderTypeError,
    WrapStructError,
)


@dataclass(frozen=True, eq=False)
class Source:
    """A file as read: raw voxels in the file's axis order, how to scale them, and geometry."""

    voxels: Num[np.ndarray, "x y z"]
    slope: float
    intercept: float
    affine: Affine
    header: nib.Nifti1Header

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the volume, in the file's axis order."""
        return _xyz(self.voxels.shape)

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """Some of the raw voxels with slope and intercept, in float64 as nibabel does."""
        if self.slope == 1 and self.intercept == 0:
            return raw
        return raw * np.float64(self.slope) + self.intercept


def read_nifti(path: Path) -> Source:
    """Read a 3D NIfTI-1 or NIfTI-2 file (.nii, .nii.gz); trailing axes of length 1 are dropped.

    Raises:
        InputError: missing, unreadable, empty, truncated, damaged or non-NIfTI file; not 3D;
            voxel size that is zero, negative or not a number; several numbers in a voxel.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file: check the path")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(
            f"{path}: not a NIfTI file by its name, expected .nii or .nii.gz "
            "(or the folder, for DICOM): convert it first"
        )
    try:
        with _opened(path) as stream:
            return _read_stream(stream, path)
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path}: may not be read: give yourself the right to read it") from error
    except MemoryError as error:
        raise InputError(
            f"{path}: too large for this machine's memory: use another, or crop the scan"
        ) from error
    except _READ_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path}: truncated or damaged ({reason}), expected a whole NIfTI file: copy it afresh"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(0)
        if not start:
            raise InputError(f"{path}: an empty file, expected NIfTI: copy it afresh")
        gzipped = path.name.endswith(".gz")
        if gzipped != (start == b"\x1f\x8b"):
            raise InputError(
                f"{path}: not a NIfTI file of that name: its content is "
                f"{'not ' if gzipped else ''}gzip-compressed: rename it, or write it afresh"
            )
        if not gzipped:
            yield file
        else:
            with gzip.open(file, "rb") as stream:
                yield stream  # type: ignore[misc]  # GzipFile reads, seeks and tells


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Without its remarks on padding and offsets: what matters is checked here and raised."""
    before, nibabel_logger.disabled = nibabel_logger.disabled, True
    try:
        yield
    finally:
        nibabel_logger.disabled = before


def _read_stream(stream: IO[bytes], path: Path) -> Source:
    start = stream.read(352)
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    image_class = nib.Nifti2Image if 540 in sizes else nib.Nifti1Image
    magic = start[4:8] if 540 in sizes else start[344:348]
    if not sizes & {348, 540} or magic not in (b"n+1\0", b"n+2\0"):
        raise InputError(f"{path}: not a NIfTI file by its content: convert it to NIfTI first")

    stream.seek(0)
    # Unchecked: nibabel would mend a bad voxel size silently, into one that is made up.
    header = image_class.header_class.from_fileobj(stream, check=False)
    shape = _shape_3d(header, path)
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        shown = " × ".join(f"{size:g}" for size in pixdim)
        raise InputError(
            f"{path}: its header says voxels of {shown} mm, expected positive numbers: "
            "correct the header"
        )
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: its voxels are of type {dtype}, expected one number in each")
    # Before nibabel asks for that much memory.
    promised = math.prod(shape) * dtype.itemsize
    most = path.stat().st_size * (_GZIP_LARGEST_RATIO if path.suffix == ".gz" else 1)
    if promised > most:
        raise InputError(
            f"{path}: truncated or damaged (its header promises {promised} bytes, it can hold "
            f"{most} at most), expected a whole NIfTI file: copy it afresh"
        )

    stream.seek(0)
    with _quiet_nibabel():
        image = image_class.from_stream(stream)  # type: ignore[arg-type]
        proxy = cast(ArrayProxy, image.dataobj)
        voxels = np.asarray(proxy.get_unscaled()).reshape(shape, order="F")
        if isinstance(voxels, np.memmap):
            voxels = np.array(voxels)
        affine = np.asarray(image.affine, np.float64)
    slope, intercept = float(proxy.slope), float(proxy.inter)
    while stream.read(1 << 20):  # gzip compares its checksum at the end only
        pass
    return Source(voxels, slope, intercept, affine, _geometry(image.header))


def _shape_3d(header: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in header.get_data_shape())
    spatial, rest = shape[:3], shape[3:]
    if len(spatial) < 3 or any(n != 1 for n in rest):
        raise InputError(
            f"{path}: a {len(shape)}D volume of shape {shape}, expected 3D: "
            "give one volume, split from the series"
        )
    if min(spatial) < 1:
        raise InputError(f"{path}: its shape is {spatial}, expected at least 1 in each axis")
    return _xyz(spatial)


def _geometry(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """A fresh header with the geometry fields alone.

    The source's display range and intent would mislead viewers of a mask, its free text and
    extensions may name the patient.
    """
    fresh = type(header)()
    fresh["pixdim"][:4] = header["pixdim"][:4]
    for field in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"):
        fresh[field] = header[field]
    for field in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
        fresh[field] = header[field]
    fresh["xyzt_units"] = int(header["xyzt_units"]) & 7
    return fresh


def _xyz(shape: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = shape
    return x, y, z
