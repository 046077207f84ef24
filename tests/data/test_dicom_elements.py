"""Lengths of DICOM elements, written by hand after PS3.5 sections 7.1 and 7.5."""

import struct

import numpy as np
import pytest
from scan_files import ct, real, refused, write_series

from deepsc_jax.data.dicom_elements import misfit

IMPLICIT, EXPLICIT, BIG, DEFLATED = (
    "1.2.840.10008.1.2" + more for more in ("", ".1", ".2", ".1.99")
)


def explicit(group, element, vr, value, order="<", length=None):
    tag = struct.pack(f"{order}HH", group, element) + vr.encode()
    length = len(value) if length is None else length
    if vr in ("OB", "OW", "SQ", "UN"):
        return tag + struct.pack(f"{order}HI", 0, length) + value
    return tag + struct.pack(f"{order}H", length) + value


def implicit(group, element, value, order="<", length=None):
    length = len(value) if length is None else length
    return struct.pack(f"{order}HHI", group, element, length) + value


def item(value, order="<", length=None):
    return implicit(0xFFFE, 0xE000, value, order, length)


ITEM_END, SEQUENCE_END = implicit(0xFFFE, 0xE00D, b""), implicit(0xFFFE, 0xE0DD, b"")
UNDEFINED = 0xFFFFFFFF


def file_of(folder, syntax, *parts, preamble=True):
    meta = explicit(2, 0x0010, "UI", syntax.encode() + b"\0" * (len(syntax) % 2))
    meta = explicit(2, 0, "UL", struct.pack("<I", len(meta))) + meta
    path = folder / "a.dcm"
    path.write_bytes((bytes(128) + b"DICM" + meta if preamble else b"") + b"".join(parts))
    return path


NAME = explicit(0x10, 0x10, "PN", b"Doe^Jane")
PIXELS = explicit(0x7FE0, 0x10, "OW", bytes(32))


@pytest.mark.parametrize(
    ("syntax", "parts"),
    [
        (EXPLICIT, [NAME, PIXELS]),
        (EXPLICIT, [NAME, explicit(8, 0x1140, "SQ", item(NAME) + item(NAME)), PIXELS]),
        (EXPLICIT, [explicit(8, 0x1140, "SQ", b"")]),
        (
            EXPLICIT,
            [
                explicit(
                    8,
                    0x1140,
                    "SQ",
                    item(NAME, length=UNDEFINED) + ITEM_END + SEQUENCE_END,
                    length=UNDEFINED,
                ),
                PIXELS,
            ],
        ),
        (
            "1.2.840.10008.1.2.4.70",
            [
                explicit(
                    0x7FE0,
                    0x10,
                    "OB",
                    item(b"") + item(b"\xff\xd8\xff\xee" + bytes(60)) + SEQUENCE_END,
                    length=UNDEFINED,
                )
            ],
        ),
        (IMPLICIT, [implicit(0x10, 0x10, b"Doe^Jane"), implicit(0x7FE0, 0x10, bytes(64))]),
        (IMPLICIT, [implicit(8, 0x1140, item(implicit(8, 8, b"CT")))]),
        (BIG, [explicit(0x10, 0x10, "PN", b"Doe^Jane", ">"), explicit(9, 9, "OW", b"12", ">")]),
    ],
)
def test_whole_files_fit(tmp_path, syntax, parts):
    assert misfit(file_of(tmp_path, syntax, *parts)) is None


@pytest.mark.parametrize(
    ("syntax", "parts", "said"),
    [
        (EXPLICIT, [explicit(0x7FE0, 0x10, "OW", bytes(32), length=1 << 29)], "536870912 bytes"),
        (EXPLICIT, [explicit(0x10, 0x10, "PN", b"Jane", length=60000)], "has 60000 bytes"),
        (
            EXPLICIT,
            [explicit(8, 0x1140, "SQ", item(explicit(9, 9, "OB", b"", length=1 << 30)))],
            "1073741824 bytes",
        ),
        (IMPLICIT, [implicit(0x10, 0x10, b"Jane", length=0x20000004)], "536870916 bytes"),
        (BIG, [explicit(9, 9, "OW", b"12", ">", length=1 << 24)], "16777216 bytes"),
        (EXPLICIT, [NAME, PIXELS[:10]], "is cut"),
        (DEFLATED, [NAME], "are deflated"),
    ],
)
def test_lengths_beyond_the_file_are_told(tmp_path, syntax, parts, said):
    assert said in str(misfit(file_of(tmp_path, syntax, *parts)))


def test_files_without_a_preamble_are_dicom_if_they_fit(tmp_path):
    path = file_of(tmp_path, IMPLICIT, implicit(0x10, 0x10, b"Doe^Jane"), preamble=False)
    assert misfit(path) is None
    (tmp_path / "text.dcm").write_text("made for a test, of some words\n" * 9)
    assert misfit(tmp_path / "text.dcm") == "not DICOM"
    (tmp_path / "empty.dcm").touch()
    assert misfit(tmp_path / "empty.dcm") == "not DICOM"


def test_a_damaged_slice_is_named_and_not_left_out(tmp_path):
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    victim = sorted(folder.iterdir())[-1]
    victim.write_bytes(victim.read_bytes()[:-80])
    refused(folder, rf"{victim.name}: damaged .its element at byte \d+ has 220 bytes")


def test_real_slices_of_jpeg_lossless_fit():
    folder = real("covid-ct-md", "P001_dicom")
    assert {misfit(path) for path in folder.iterdir()} == {None}


def test_what_simpleitk_writes_fits(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.zeros((1, 16, 16), np.int16))
    for packed in (False, True):
        sitk.WriteImage(image, str(tmp_path / "a.dcm"), useCompression=packed)
        assert misfit(tmp_path / "a.dcm") is None
