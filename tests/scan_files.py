"""Scan files that tests write, NIfTI with any field and DICOM series, and where real CT is."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pytest

from deepsc_jax.data.scans import load_scan
from deepsc_jax.runtime.errors import InputError

SPACING = (0.7, 0.9, 2.5)


def ct(shape=(10, 11, 12), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def affine_of(axes=(0, 1, 2), signs=(-1, -1, 1), spacing=SPACING, origin=(10.0, -20.0, 30.0)):
    """Voxel axis i runs along world axis axes[i] (RAS+), backwards where signs[i] is -1."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = sign * spacing[column]
    affine[:3, 3] = origin
    return affine


def write(path: Path, voxels: np.ndarray, affine=None, image_class=nib.Nifti1Image, **fields):
    image = image_class(voxels, affine_of() if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def stored(path: Path) -> nib.Nifti1Image:
    return cast(nib.Nifti1Image, nib.load(path))


def edit_header(path: Path, field: str, value) -> Path:
    """Overwrite a field of an uncompressed NIfTI-1 file, as nibabel itself would refuse to."""
    with open(path, "rb") as file:
        header = nib.Nifti1Header.from_fileobj(file, check=False)
    header[field] = value
    with open(path, "r+b") as file:
        file.write(header.binaryblock)
    return path


def refused(path, pattern: str, **options) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        load_scan(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


REAL_DATA = Path(os.environ.get("DEEPSC_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real(*parts: str) -> Path:
    """A file of the real CT, or a skip that says where it is looked for."""
    path = REAL_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real CT: {path} is absent (DEEPSC_REAL_DATA names the folder)")
    return path


def write_series(
    folder: Path,
    hu: np.ndarray,
    uid: str = "1.2.3.4",
    z=None,
    modality: str = "CT",
    names=None,
    edit: Callable[[int, dict[str, str]], None] | None = None,
) -> Path:
    """Slices of (D, H, W) HU as DICOM, stored with intercept -1024; z in mm.

    `edit` may change the tags of a slice; SimpleITK's writer adds some that it holds necessary.
    """
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    z = 2.5 * np.arange(len(hu)) if z is None else z
    for index, (plane, height) in enumerate(zip(hu, z, strict=True)):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((0.7, 0.9))
        place = height if isinstance(height, str) else f"{height:g}"
        tags = {
            "0008|0060": modality,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{index + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(index),
            "0020|0032": f"-100\\-150\\{place}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        if edit is not None:
            edit(index, tags)
        for key, value in tags.items():
            image.SetMetaData(key, value)
        name = names[index] if names else f"{uid}_{index:03}"
        writer.SetFileName(str(folder / f"{name}.dcm"))
        writer.Execute(image)
    return folder


def elements(data: bytes) -> list[tuple[int, int, int]]:
    """Tag, beginning and end of each element of a DICOM file as `write_series` writes it.

    That is implicit little endian after the group 0002, whose length is its first value.
    """
    place = 144 + int.from_bytes(data[140:144], "little")
    found = []
    while place < len(data):
        group, element, length = struct.unpack_from("<HHI", data, place)
        found.append((group << 16 | element, place, place + 8 + length))
        place += 8 + length
    return found


def set_tag(path: Path, tag: int, text: str | None) -> None:
    """Write, or with None take out, an element of a DICOM file, such as 0x00200032."""
    data = path.read_bytes()
    begin = next((begin for other, begin, _ in elements(data) if other >= tag), len(data))
    end = next((end for other, _, end in elements(data) if other == tag), begin)
    new = b""
    if text is not None:
        value = text.encode() + b" " * (len(text) % 2)
        new = struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value
    path.write_bytes(data[:begin] + new + data[end:])
