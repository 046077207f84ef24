"""Forty kinds of bad input, and the one line that each ends in.

A line names the file, says what was found and what was expected, and ends in what to do.
"""

import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scan_files import affine_of, ct, edit_header, set_tag, write, write_series

from deepsc_jax.data.scans import load_mask, load_scan
from deepsc_jax.runtime.errors import InputError

pytest.importorskip("SimpleITK")

ACTIONS = ("check", "copy", "convert", "correct", "give", "rename", "write", "rescale", "resample")
ACTIONS += ("export", "prepare and", "set", "crop", "remove")
SPACED_TWICE = (0.7, 0.9, 5.6)


def blob(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def nifti(voxels: np.ndarray | None = None, name: str = "case.nii", **options):
    return lambda folder: write(folder / name, ct() if voxels is None else voxels, **options)


def edited(field: str, value) -> Callable[[Path], Path]:
    return lambda folder: edit_header(write(folder / "case.nii", ct()), field, value)


def cut(name: str, share: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder / name, ct())
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        return path

    return make


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "case.nii")
    return folder / "case.nii"


def gzip_damaged(folder: Path) -> Path:
    path = write(folder / "case.nii.gz", ct())
    whole = bytearray(path.read_bytes())
    whole[-6] ^= 1
    path.write_bytes(whole)
    return path


def series(tag: int | None = None, text: str | None = None, only: int | None = None, **options):
    """A DICOM series, one tag of which is other in all slices or in one."""

    def make(folder: Path) -> Path:
        folder = write_series(folder / "series", ct((9, 10, 11)), **options)
        for index, file in enumerate(sorted(folder.iterdir())):
            if tag is not None and only in (None, index):
                set_tag(file, tag, text)
        return folder

    return make


def copied_slice(folder: Path) -> Path:
    path = series()(folder)
    (path / "copy.dcm").write_bytes((path / "1.2.3.4_003.dcm").read_bytes())
    return path


def holed(value: float) -> np.ndarray:
    voxels = ct().astype(np.float32)
    voxels[1:3, 4, 5] = value
    return voxels


SHEARED = affine_of()
SHEARED[1, 2] = 2.5
GAP = 2.5 * np.array([0, 1, 2, 3, 5, 6, 7, 8, 9])
NRRD = b"NRRD0004\ntype: short\ndimension: 3\nencoding: raw\nendian: little\n"
META = b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 10 11 12\n"
RGB = np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])

SCANS = {
    "no such file": (lambda folder: folder / "none.nii", "no such file"),
    "empty file": (blob("case.nii", b""), "an empty file, expected an image"),
    "FIFO": (fifo, "a FIFO, expected a regular file"),
    "another kind by its name": (blob("case.txt", b"\x89PNG"), "not a scan by its name, expected"),
    "text": (blob("case.nii", b"no image\n" * 99), "not a NIfTI file by its content"),
    "not packed": (blob("case.nii.gz", b"no image\n" * 99), "its content is not gzip-compressed"),
    "packed": (blob("case.nii", gzip.compress(b"x" * 999)), "its content is gzip-compressed"),
    "cut": (cut("case.nii", 0.5), "its header promises 2992 bytes, it holds 1496"),
    "cut, packed": (cut("case.nii.gz", 0.5), "truncated or damaged"),
    "damaged, packed": (gzip_damaged, "truncated or damaged .*CRC"),
    "half of a pair": (blob("case.img", bytes(99)), "half of a pair, and case.hdr is not beside"),
    "4D": (nifti(np.zeros((9, 9, 9, 2), np.int16)), r"a 4D volume of shape \(9, 9, 9, 2\)"),
    "2D": (nifti(np.zeros((9, 9), np.int16)), r"a 2D volume of shape \(9, 9\), expected 3D"),
    "too few slices": (nifti(ct((64, 64, 3))), "scan of 3 slices, expected at least 8"),
    "too many slices": (nifti(ct((8, 8, 4100))), "scan of 4100 slices, expected at most 4096"),
    "narrow slices": (nifti(ct((3, 64, 64))), "its slices are 64×3, expected at least 8×8"),
    "colour": (nifti(RGB), "expected one number in each"),
    "complex": (nifti(ct().astype(np.complex64)), "type complex64, expected one number in each"),
    "NaN": (nifti(holed(np.nan)), "NaN or infinite in 2 voxels, expected a number"),
    "infinite": (nifti(holed(np.inf)), "NaN or infinite in 2 voxels, expected a number"),
    "one value": (nifti(np.full((9, 9, 9), -1000, np.int16)), "every voxel is -1000, expected"),
    "8-bit": (nifti((ct() & 255).astype(np.uint8)), "within 0..255, expected HU"),
    "no offset": (nifti(ct() + 1024), "within 0..2522, expected HU with air near -1000"),
    "voxel of 0": (edited("pixdim", [1, 0, 1, 1, 1, 1, 1, 1]), "voxels of 0 × 1 × 1 mm, expected"),
    "voxel of NaN": (edited("pixdim", [1, np.nan, 1, 1, 1, 1, 1, 1]), "voxels of nan × 1 × 1 mm"),
    "two voxel sizes": (
        edited("pixdim", [1, *SPACED_TWICE, 1, 1, 1, 1]),
        "sform says voxels of 0.7 × 0.9 × 2.5 mm, its pixdim of 0.7 × 0.9 × 5.6 mm",
    ),
    "in metres": (edited("xyzt_units", 1), "voxels measure 700 × 900 × 2500 mm, expected 0.1 to"),
    "flat affine": (edited("srow_x", [0, 0, 0, 0]), "its affine gives voxels of 0 × .* expected"),
    "sheared": (nifti(affine=SHEARED), "sheared .a voxel has 71% of the volume.* at least 98%"),
    "form code": (edited("sform_code", 77), "its sform_code is 77, expected 0 to 5"),
    "offset": (edited("vox_offset", 0), "begin at byte 0 .vox_offset., expected 352"),
    "fewer dimensions": (edited("dim", [3, 10, 11, 8, 1, 1, 1, 1]), "more voxels follow the 1760"),
    "slope": (edited("scl_slope", 1e38), "NaN or infinite in"),
    "NRRD without sizes": (blob("case.nrrd", NRRD + b"\n"), "cannot be read"),
    "MetaImage without data": (blob("case.mha", META), "no ElementDataFile"),
    "no DICOM": (lambda folder: folder, "a folder without a DICOM series, expected one CT"),
    "MR": (series(modality="MR"), "its modality is 9 MR.*expected CT"),
    "slice missing": (series(z=GAP), "slices lie 2.50 to 5.00 mm apart .*expected even steps"),
    "slice twice": (copied_slice, r"1\.2\.3\.4_003\.dcm and copy\.dcm lie at one position"),
    "position missing": (series(0x00200032, None, 4), r"1 of 9 slices .*expected three numbers"),
    "no distance": (series(0x00200032, None), "no ImagePositionPatient"),
    "spacing missing": (
        series(0x00280030, None),
        "its PixelSpacing is absent or no number, expected two positive",
    ),
    "turn": (series(0x00200037, "1\\0\\0\\1\\0\\0"), "expected two unit vectors at a right angle"),
}


@pytest.mark.parametrize("kind", SCANS)
def test_a_bad_scan_ends_in_one_line_that_says_what_to_do(tmp_path, kind):
    make, said = SCANS[kind]
    path = make(tmp_path)
    check_line(lambda: load_scan(path), path, said)


MASKS = {
    "shape": (np.zeros((10, 11, 9)), None, r"lesion mask is \(10, 11, 9\), its scan case \(10, 11"),
    "place": (np.zeros((10, 11, 12)), affine_of(origin=(0, 0, 0)), "voxels away from its scan"),
    "values": (np.full((10, 11, 12), 7), None, "holds 7 beside 0 and 1, expected 0 and 1 alone"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_bad_mask_ends_in_one_line_that_says_what_to_do(tmp_path, kind):
    voxels, affine, said = MASKS[kind]
    scan = load_scan(write(tmp_path / "case.nii", ct()))
    path = write(tmp_path / "mask.nii", voxels.astype(np.uint8), affine)
    check_line(lambda: load_mask(path, scan), path, said)


def check_line(call: Callable[[], object], path: Path, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    clauses = re.split("[:;,] ", line)
    assert any(clause.startswith(ACTIONS) for clause in clauses), line


def test_there_are_forty_kinds():
    assert len(SCANS) + len(MASKS) >= 40
