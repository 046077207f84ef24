"""NIfTI files as they are stored: checked for damage and for geometry that cannot be meant.

nibabel reads a header leniently (it mends a voxel size of 0 to 1 mm), a gzip stream no further than
it must (so a flipped byte passes), and takes the memory that a header asks for. All three matter
here, so nibabel interprets the header alone: its fields are checked before, and the voxels are read
here, to the stream's end, where gzip compares its checksum.

Where nibabel and ITK read a header differently, nibabel's reading is taken and the source says so.
Compared with nibabel 5.4.2 and SimpleITK 2.5.7.
"""

import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from deepsc_jax.data.source import (
    Affine,
    Doubt,
    Shape,
    Source,
    require_bounded,
    require_regular,
)
from deepsc_jax.runtime.errors import InputError

SUFFIXES = (".nii", ".nii.gz", ".img")
"""A pair .img and .hdr goes by the first name."""

SAME_VOXELS = 0.1
"""Two placements are one where no corner is further apart, in voxels. Headers store float32
matrices or quaternions, whose rounding stays below 0.01 voxel; half a voxel is another grid."""
SAME_SIZE = 1e-3
"""Relative difference of two voxel sizes that is rounding: 0.7 for 0.7031 is not."""
DOUBTFUL_SIZE = 0.01
"""Beyond: which of the two is right decides on volumes. Refused unless it is allowed."""

_CHUNK = 1 << 20
_LARGEST_OFFSET = 1 << 26  # extensions lie before it
_CODES = range(6)
_UNITS = {0: "no unit", 1: "metres", 2: "mm", 3: "microns"}
MM_PER_UNIT = {1: 1e3, 2: 1.0, 3: 1e-3}
"""By NIfTI's code for metre, millimetre and micron; a scan without one is taken to be in mm."""


def read_nifti(path: Path) -> Source:
    """Read a 3D NIfTI-1 or NIfTI-2 file (.nii, .nii.gz; .img with its .hdr, by either name).

    Trailing axes of length 1 are dropped. Of the voxels nothing is read before `voxels()`.

    Raises:
        InputError: missing, unreadable, empty, truncated, damaged or non-NIfTI file, or no regular
            file; Analyze 7.5, which records no orientation; not 3D, or too large; voxel size that
            is zero, negative or not a number; several numbers in a voxel; form codes, scaling or
            an offset of the voxels that readers take differently.
    """
    header_path, voxels_path = _files(path)
    with _described(path):
        size = require_regular(header_path)
        with _opened(header_path) as stream:
            header = _read_header(stream, path, single=header_path == voxels_path)
        shape = _shape_3d(header, path)
        require_bounded(path, shape)
        dtype = _dtype(header, path)
        offset = _offset(header, path, single=header_path == voxels_path)
        slope, intercept, notes = _scaling(header, path)
        affine, geometry_notes, doubts = _geometry(header, path, shape)
        if voxels_path != header_path:
            size = require_regular(voxels_path)

    unpacked = math.prod(shape) * dtype.itemsize
    if not _gzipped(voxels_path) and size < offset + unpacked:
        raise _truncated(path, offset + unpacked, size)

    def voxels() -> np.ndarray:
        with _described(path), _opened(voxels_path) as stream:
            raw = _read_voxels(stream, path, offset, unpacked, _slice_bytes(shape, dtype))
        return np.frombuffer(raw, dtype).reshape(shape, order="F")

    return Source(
        shape=shape,
        slope=slope,
        intercept=intercept,
        affine=affine,
        header=_geometry_alone(header),
        voxels=voxels,
        packed=size,
        unpacked=unpacked,
        notes=notes + geometry_notes,
        doubts=doubts,
    )


def _files(path: Path) -> tuple[Path, Path]:
    """The files of header and voxels: one, or the two of a pair."""
    suffix = path.suffix.lower()
    if suffix not in (".hdr", ".img"):
        return path, path
    other = {".hdr": ".img", ".img": ".hdr"}[suffix]
    spellings = [other.upper(), other] if path.suffix.isupper() else [other, other.upper()]
    partners = [path.with_suffix(spelling) for spelling in spellings]
    partner = next((file for file in partners if file.exists()), None)
    if partner is None:
        raise InputError(
            f"{path}: half of a pair, and {partners[0].name} is not beside it: give both files"
        )
    return (path, partner) if suffix == ".hdr" else (partner, path)


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Whatever reading raises, as one line."""
    try:
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path}: may not be read: give yourself the right to read it") from error
    except MemoryError as error:
        raise InputError(
            f"{path}: too large for this machine's memory: use another, or crop the scan"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path}: truncated or damaged ({reason}), expected a whole NIfTI file: copy it afresh"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(0)
        if _gzipped(path) != (start == b"\x1f\x8b"):
            raise InputError(
                f"{path}: not a NIfTI file of that name: its content is "
                f"{'not ' if _gzipped(path) else ''}gzip-compressed: rename it, or write it afresh"
            )
        if not _gzipped(path):
            yield file
        else:
            with gzip.open(file, "rb") as stream:
                yield cast(IO[bytes], stream)


def _read_header(stream: IO[bytes], path: Path, *, single: bool) -> nib.Nifti1Header:
    start = stream.read(540)
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    second = 540 in sizes
    magic = start[4:8] if second else start[344:348]
    if not sizes & {348, 540} or len(start) < (540 if second else 348):
        raise InputError(f"{path}: not a NIfTI file by its content: convert it to NIfTI first")
    if magic != (b"n" + (b"+" if single else b"i") + (b"2" if second else b"1") + b"\0"):
        kind = "Analyze 7.5, whose orientation is not recorded" if not magic.strip(b"\0") else magic
        raise InputError(
            f"{path}: not a NIfTI file by its content ({kind}), expected "
            f"{'one file' if single else 'a pair of files'}: convert it to NIfTI first"
        )
    # Unchecked: nibabel would mend a bad voxel size silently, into one that is made up.
    if second:
        return nib.Nifti2Header(start[:540], check=False)
    return nib.Nifti1Header(start[:348], check=False)


def _shape_3d(header: nib.Nifti1Header, path: Path) -> Shape:
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(f"{path}: its header says {axes} axes, expected 3: correct the header")
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    spatial, rest = shape[:3], shape[3:]
    if len(spatial) < 3 or any(n != 1 for n in rest):
        raise InputError(
            f"{path}: a {len(shape)}D volume of shape {shape}, expected 3D: "
            "give one volume, split from the series"
        )
    if min(spatial) < 1:
        raise InputError(
            f"{path}: its shape is {spatial}, expected at least 1 in each axis: correct the header"
        )
    x, y, z = spatial
    return x, y, z


def _dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = None
    if dtype is None or dtype.kind not in "iuf":
        shown = f"the unknown type {int(header['datatype'])}" if dtype is None else f"type {dtype}"
        raise InputError(
            f"{path}: its voxels are of {shown}, expected one number in each: write it as int16"
        )
    return dtype


def _offset(header: nib.Nifti1Header, path: Path, *, single: bool) -> int:
    """Where the voxels begin. Below the header's end nibabel reads the header as voxels."""
    offset = float(header["vox_offset"])
    least = header.single_vox_offset if single else 0
    if not (offset.is_integer() and least <= offset <= _LARGEST_OFFSET):
        raise InputError(
            f"{path}: its header says that voxels begin at byte {offset:g} (vox_offset), expected "
            f"{least} or a whole number up to {_LARGEST_OFFSET}: readers differ on where they are; "
            f"set vox_offset to {least}, or write the file afresh"
        )
    return int(offset)


def _scaling(header: nib.Nifti1Header, path: Path) -> tuple[float, float, tuple[str, ...]]:
    """Slope and intercept; 1 and 0 where the header has none (a slope of 0)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    shown = f"scl_slope {slope:g} and scl_inter {intercept:g}"
    if math.isfinite(slope) and slope != 0 and not math.isfinite(intercept):
        raise InputError(
            f"{path}: its header scales voxels by {shown}, expected numbers: correct the header"
        )
    if slope == 0 and math.isfinite(intercept) and intercept != 0:
        raise InputError(
            f"{path}: its header has {shown}: nibabel leaves such voxels as they are, ITK adds "
            f"{intercept:g}: set scl_slope to 1, or scl_inter to 0"
        )
    if slope == 0:
        return 1.0, 0.0, ()
    if not math.isfinite(slope):
        return 1.0, 0.0, (f"its header has {shown}: voxels are taken as they are stored",)
    return slope, intercept, ()


def _geometry(
    header: nib.Nifti1Header, path: Path, shape: Shape
) -> tuple[Affine, tuple[str, ...], tuple[Doubt, ...]]:
    """The affine that nibabel takes (sform before qform), notes, and doubts about voxel sizes."""
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise InputError(
            f"{path}: its header says voxels of {_times(pixdim)} mm, expected positive numbers: "
            "correct the header"
        )
    codes = {form: int(header[f"{form}_code"]) for form in ("sform", "qform")}
    for form, code in codes.items():
        if code not in _CODES:
            raise InputError(
                f"{path}: its {form}_code is {code}, expected 0 to 5: correct the header"
            )
    if float(header["pixdim"][0]) == 0:
        header["pixdim"][0] = 1  # NIfTI: 0 stands for 1
    qform = _qform(header, path, wanted=codes["qform"] > 0 and not codes["sform"])
    affine = qform if codes["qform"] and not codes["sform"] else header.get_best_affine()
    affine = np.asarray(affine, np.float64)

    notes, doubts = [], []
    unit = int(header["xyzt_units"]) & 7
    if unit not in _UNITS:
        notes.append(f"its header counts in an unknown unit ({unit}): mm are taken")
    elif unit in (1, 3):
        notes.append(f"its header counts in {_UNITS[unit]}, as ITK reads it too, but not nibabel")
    to_mm = MM_PER_UNIT.get(unit, 1.0)
    if not any(codes.values()):
        notes.append(
            "its header records no orientation (qform_code and sform_code are 0): its axes are "
            "taken to run left, forward and up, as nibabel does; ITK takes left, backward and up"
        )
    if codes["sform"]:
        with np.errstate(over="ignore", invalid="ignore"):
            columns = np.linalg.norm(affine[:3, :3], axis=0)
            difference = float(np.abs(columns / pixdim - 1).max())
        if not difference <= SAME_SIZE:
            line = (
                f"its sform says voxels of {_times(columns * to_mm)} mm, its pixdim of "
                f"{_times(pixdim * to_mm)} mm: nibabel reads the first, ITK the second"
            )
            if difference <= DOUBTFUL_SIZE:
                notes.append(line)
            else:
                doubts.append(Doubt("voxels", line, "correct the header"))
        elif codes["qform"]:
            notes += _disagreement(affine, qform, shape, to_mm, codes["sform"])
    return affine, tuple(notes), tuple(doubts)


def _qform(header: nib.Nifti1Header, path: Path, *, wanted: bool) -> Affine | None:
    """The qform's affine; None where its fields give none, which is refused if it is `wanted`."""
    try:
        qform = np.asarray(header.get_qform(), np.float64)
        if np.isfinite(qform).all():
            return qform
        raise ValueError("its numbers are not finite")
    except (ValueError, HeaderDataError) as error:
        if not wanted:
            return None
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: its qform gives no orientation ({reason}): correct the header"
        ) from error


def _disagreement(
    sform: Affine, qform: Affine | None, shape: Shape, to_mm: float, sform_code: int
) -> list[str]:
    """The line about an sform and a qform of equal voxel sizes that place the image differently."""
    if qform is None:
        return ["its qform gives no orientation: the sform is read"]
    with np.errstate(over="ignore", invalid="ignore"):
        apart = largest_corner_distance(sform, qform, shape)
        voxel = float(np.linalg.norm(sform[:3, :3], axis=0).min())
    if apart <= SAME_VOXELS * voxel:
        return []
    axes = [
        "".join(str(code) for code in nib.aff2axcodes(form) if code)
        for form in (sform, qform)
        if np.isfinite(form).all()
    ]
    turned = f" (axes {axes[0]} and {axes[1]})" if len(set(axes)) == 2 else ""
    itk = "as ITK does too" if sform_code == 1 else "ITK reads the qform"
    return [
        f"its sform and its qform place it up to {apart * to_mm:.1f} mm apart{turned}: "
        f"the sform is read, as nibabel does; {itk}"
    ]


def largest_corner_distance(a: Affine, b: Affine, shape: tuple[int, ...]) -> float:
    """Largest distance between the corners of two grids of one shape, in the affines' unit."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape]), -1).reshape(-1, 3)
    offsets = corners @ (a - b)[:3, :3].T + (a - b)[:3, 3]
    return float(np.linalg.norm(offsets, axis=1).max())


def _read_voxels(
    stream: IO[bytes], path: Path, offset: int, count: int, slice_bytes: int
) -> bytearray:
    """`count` bytes from `offset`, in memory that grows with what is there, not with the header."""
    _skip(stream, offset)
    data = bytearray()
    while len(data) < count:
        chunk = stream.read(min(_CHUNK, count - len(data)))
        if not chunk:
            raise _truncated(path, offset + count, offset + len(data))
        data += chunk
    beyond = 0
    while chunk := stream.read(min(_CHUNK, slice_bytes)):  # gzip compares its checksum at the end
        beyond += len(chunk)
        if beyond >= slice_bytes:
            raise InputError(
                f"{path}: more voxels follow the {count} bytes that its header promises, expected "
                "the file's end: its dimensions or their type are wrong; correct the header"
            )
    return data


def _skip(stream: IO[bytes], count: int) -> None:
    read: Callable[[int], bytes] = stream.read
    while count > 0 and (chunk := read(min(_CHUNK, count))):
        count -= len(chunk)


def _truncated(path: Path, promised: int, held: int) -> InputError:
    return InputError(
        f"{path}: truncated or damaged (its header promises {promised} bytes, it holds {held}), "
        "expected a whole NIfTI file: copy it afresh"
    )


def _slice_bytes(shape: Shape, dtype: np.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize


def _geometry_alone(header: nib.Nifti1Header) -> nib.Nifti1Header:
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


def _times(sizes: np.ndarray) -> str:
    return " × ".join(f"{size:g}" for size in sizes)
