"""What every reader of a file format gives: raw voxels on demand, how to scale them, and geometry.

A reader looks at a header first and at voxels later. So what a header says is held against what the
file can hold, and a mask against its scan, before memory is taken.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Num, Shaped
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    io_orientation,
    ornt_transform,
)

from deepsc_jax.runtime.errors import InputError

Affine = Float64[np.ndarray, "4 4"]
Shape = tuple[int, int, int]

MAX_VOXELS = 2**31
"""Of a volume: 8 GiB as float32. A chest of 512×512 voxels in 2,000 slices has a quarter of it."""
MAX_SLICES = 4096
"""Of a scan, and of its working grid. A whole body has 4,000 slices of 0.5 mm."""

UNPACKED_FREELY = 64 << 20
"""Bytes that a compressed file may unpack to, however small it is."""
LARGEST_RATIO = 100
"""Beyond `UNPACKED_FREELY`: bytes unpacked for a byte of the file. A CT's noise leaves about 2, a
CT that is 0 outside of its lungs about 20."""

KINDS = ("voxels", "lungs", "intensity")
"""Of doubts: voxel sizes and positions; volume of the lungs; values that are no HU."""

FORMATS = ".nii, .nii.gz, .img, .hdr, .nrrd, .nhdr, .mha or .mhd"


LPS = axcodes2ornt(("L", "P", "S"))
"""The canonical order's axes, as nibabel names where they lead."""


class Doubt(NamedTuple):
    """What is refused unless the user says that it is right; then it is a note."""

    kind: str
    """One of `KINDS`, by which it is allowed."""
    finding: str
    """What was found and what was expected."""
    advice: str


def settled(name: object, doubts: Iterable[Doubt], allow: Collection[str]) -> tuple[str, ...]:
    """The doubts as notes, where their kinds are in `allow`.

    Raises:
        InputError: of the first doubt that is not allowed.
    """
    notes = []
    for doubt in doubts:
        if doubt.kind not in allow:
            raise InputError(
                f"{name}: {doubt.finding}: {doubt.advice}; if it is right, --allow={doubt.kind}"
            )
        notes.append(f"{doubt.finding}: allowed")
    return tuple(notes)


@dataclass(frozen=True, eq=False)
class Source:
    """A file's header as read; its voxels are read by `voxels()`."""

    shape: Shape
    """In the file's axis order."""
    slope: float
    intercept: float
    affine: Affine
    """Voxel index to NIfTI's RAS+ world, in the header's unit (mm as a rule)."""
    header: nib.Nifti1Header
    """The geometry alone: forms and their codes, voxel sizes, units; no patient data."""
    voxels: Callable[[], Num[np.ndarray, "x y z"]]
    """Reads the raw voxels, in the file's axis order; raises InputError."""
    packed: int
    """Bytes of the files that hold the voxels."""
    unpacked: int
    """Bytes that the voxels have in memory."""
    notes: tuple[str, ...] = ()
    """What another reader would read differently, or what was left out: a line each."""
    doubts: tuple[Doubt, ...] = ()
    """What must not pass unless it is allowed."""
    files: tuple[Path, ...] = ()
    """Of DICOM: the file of each slice, in the order of the last axis."""

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """Some of the raw voxels with slope and intercept, in float64 as nibabel does."""
        if self.slope == 1 and self.intercept == 0:
            return raw
        return raw * np.float64(self.slope) + self.intercept


def to_source_axes(
    array: Shaped[np.ndarray, "depth height width"], affine: Affine
) -> Shaped[np.ndarray, "x y z"]:
    """A view of a canonical array in the axis order and directions of the source of that affine."""
    return apply_orientation(array.T, ornt_transform(LPS, io_orientation(affine)))


def require_regular(path: Path) -> int:
    """The size in bytes of the regular file at `path`, which is not opened.

    Raises:
        InputError: there is none; a FIFO, a socket or a device, which would hang or never end.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file: check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read ({reason}): check path and rights") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{path}: {kind}, expected a regular file: write the scan to a file first")
    if not status.st_size:
        raise InputError(f"{path}: an empty file, expected an image: copy it afresh")
    return status.st_size


def require_bounded(path: Path, shape: Shape) -> None:
    """Raise InputError where a volume is larger than this program reads."""
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > MAX_VOXELS or max(shape) > 1 << 16:
        shown = " × ".join(map(str, shape))
        raise InputError(
            f"{path}: its header says {shown} voxels, expected at most {MAX_VOXELS} in all and "
            f"{1 << 16} along an axis: correct the header, or crop the scan"
        )


def require_packed_plausibly(path: Path, unpacked: int, packed: int) -> None:
    """Raise InputError where so few bytes cannot be a CT of so many, before they are unpacked."""
    if unpacked > UNPACKED_FREELY + LARGEST_RATIO * packed:
        raise InputError(
            f"{path}: its header says {unpacked} bytes of voxels, compressed into {packed}, "
            f"expected at most {LARGEST_RATIO} for each of these and {UNPACKED_FREELY} more: a CT "
            "is never so uniform; check the file, or write it uncompressed"
        )


def scanner_header(path: Path, affine: Affine, shape: Shape) -> tuple[nib.Nifti1Header, Affine]:
    """A NIfTI header in mm for an image that came without one, and its affine as it holds it.

    The header holds float32: with the affine taken back from it, a written file agrees exactly.

    Raises:
        InputError: the affine is not finite, or cannot be inverted.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Beyond these float32 has no such numbers.
    if not (np.abs(affine).max() < 1e30 and sizes.min() > 1e-30 and np.linalg.det(affine)):
        shown = " × ".join(f"{size:g}" for size in sizes)
        raise InputError(
            f"{path}: its header gives voxels of {shown} mm, expected positive numbers and three "
            "axes: correct the header"
        )
    header = nib.Nifti1Header()
    header.set_data_shape([min(n, 32767) for n in shape])  # the file that is written has its own
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner", strip_shears=True)
    header.set_xyzt_units("mm")
    return header, np.asarray(header.get_sform(), np.float64)
