import os
import sys

import numpy as np
import pytest
from scan_files import affine_of, ct, real, refused, write

from deepsc_jax.data.scans import load_mask, load_scan, save_like

sitk = pytest.importorskip("SimpleITK")

NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "10 11 12",
    "space directions": "(0.7,0,0) (0,0.9,0) (0,0,2.5)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-10,20,30)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-10 20 30",
    "ElementSpacing": "0.7 0.9 2.5",
    "DimSize": "10 11 12",
    "ElementType": "MET_SHORT",
}


def nrrd(path, data=None, **changes):
    """An NRRD file; a field changed to None is left out."""
    fields = NRRD | {name.replace("_", " "): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    text = "\n".join(["NRRD0004", *lines, "", ""]).encode()
    path.write_bytes(text + (ct().tobytes("F") if data is None else data))
    return path


def meta(path, data=None, **changes):
    fields = META | changes | {"ElementDataFile": changes.get("ElementDataFile", "LOCAL")}
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    text = "\n".join([*lines, ""]).encode()
    path.write_bytes(text + (ct().tobytes("F") if data is None else data))
    return path


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".NRRD", ".Mha"])
@pytest.mark.parametrize("packed", [False, True])
def test_formats_of_itk_agree_with_nifti(tmp_path, suffix, packed):
    expected = load_scan(write(tmp_path / "case.nii", ct()))
    image = sitk.ReadImage(str(tmp_path / "case.nii"))
    path = tmp_path / f"case{suffix.lower()}"
    sitk.WriteImage(image, str(path), useCompression=packed)
    path = path.rename(path.with_suffix(suffix))
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.values, expected.values)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-5)
    assert scan.spacing_mm == pytest.approx(expected.spacing_mm)
    assert (scan.name, scan.notes) == ("case", ())
    save_like(scan.values, scan, tmp_path / "back.nii.gz", np.int16)
    np.testing.assert_allclose(
        load_scan(tmp_path / "back.nii.gz").affine, expected.affine, atol=1e-5
    )


def test_a_scan_and_its_mask_may_be_of_two_formats(tmp_path):
    scan = load_scan(meta(tmp_path / "case.mha"))
    mask = ct() > 0
    expected = load_mask(write(tmp_path / "mask.nii", mask.astype(np.uint8)), scan)
    path = nrrd(tmp_path / "mask.nrrd", mask.astype(np.uint8).tobytes("F"), type="uchar")
    np.testing.assert_array_equal(load_mask(path, scan), expected)


def test_a_right_anterior_superior_space_is_turned(tmp_path):
    scan = load_scan(nrrd(tmp_path / "ras.nrrd", space="right-anterior-superior"))
    expected = load_scan(write(tmp_path / "ras.nii", ct(), affine_of(signs=(1, 1, 1))))
    np.testing.assert_array_equal(scan.values, expected.values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": "10 11 1200"}, "promises 264000 bytes, it holds 2640"),
        ({"sizes": "10 11 9"}, "more voxels follow the 1980 bytes"),
        ({"sizes": "60000 60000 60000"}, "expected at most 2147483648"),
        ({"encoding": "bzip2"}, "encoded as bzip2, expected raw or gzip"),
        ({"encoding": "gzip"}, "truncated or damaged"),
        ({"space": "scanner-xyz"}, "its space is scanner-xyz"),
        ({"space_units": '"cm" "cm" "cm"'}, "units are cm, expected mm"),
        ({"space_directions": None}, "no voxel size; taken would be 1 mm.*--allow=voxels"),
        (
            {
                "space": None,
                "space_origin": None,
                "space_directions": None,
                "spacings": "0.7 nan 2",
            },
            "no voxel size",
        ),
        ({"space_directions": "(0,0,0) (0,1,0) (0,0,1)"}, "case.nrrd: "),
        ({"space_directions": "(nan,0,0) (0,1,0) (0,0,1)"}, "no voxel size|cannot be read"),
        ({"space_directions": "none (0,1,0) (0,0,1)"}, "no voxel size; taken would be 1 mm"),
        ({"type": "nonsense"}, "cannot be read"),
        (
            {
                "dimension": "2",
                "sizes": "10 132",
                "space": None,
                "space_directions": None,
                "space_origin": None,
            },
            "a 2D volume",
        ),
        ({"data_file": "LIST"}, "lie in several files"),
        ({"data_file": "/dev/zero"}, "a device, expected a regular file"),
        ({"data_file": "absent.raw"}, "its voxels: .*absent.raw: no such file"),
    ],
)
def test_nrrd_that_itk_would_guess_or_choke_on_is_refused(tmp_path, changes, said):
    refused(nrrd(tmp_path / "case.nrrd", **changes), said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"DimSize": "10 11 1200"}, "promises 264000 bytes, it holds 2640"),
        ({"DimSize": "10 11 9"}, "more voxels follow the 1980 bytes"),
        ({"BinaryData": "False"}, "encoded as text, expected raw or gzip"),
        ({"CompressedData": "True"}, "truncated or damaged"),
        ({"DistanceUnits": "m"}, "DistanceUnits are m, expected mm"),
        ({"ElementSpacing": None}, "no voxel size; taken would be 1 mm.*--allow=voxels"),
        ({"ElementSpacing": "0 1 1"}, "ElementSpacing is '0 1 1', expected a positive number"),
        ({"ElementSpacing": "-0.7 0.9 2.5"}, "expected a positive number for each axis"),
        ({"ElementSpacing": "0.7 0.9"}, "expected a positive number for each axis"),
        ({"ElementSize": "0.7 x 2.5"}, "ElementSize is '0.7 x 2.5', expected a positive number"),
        ({"ElementToIntensityFunctionOffset": "-1024"}, "scales voxels"),
        ({"ElementNumberOfChannels": "3"}, "expected one number in each"),
        ({"ElementDataFile": "x%03d.raw"}, "lie in several files"),
        ({"ElementDataFile": "/dev/zero"}, "a device, expected a regular file"),
    ],
)
def test_metaimages_that_itk_would_guess_or_choke_on_are_refused(tmp_path, changes, said):
    refused(meta(tmp_path / "case.mha", **changes), said)


def test_what_itk_fills_in_is_noted(tmp_path):
    path = nrrd(
        tmp_path / "a.nrrd",
        space=None,
        space_directions=None,
        space_origin=None,
        spacings="0.7 0.9 2.5",
    )
    assert "records no orientation" in load_scan(path).notes[0]
    path = meta(tmp_path / "a.mha", TransformMatrix=None)
    assert "records no orientation" in load_scan(path).notes[0]
    path = meta(tmp_path / "b.mha", ElementSize="0.7 0.9 5")
    assert "its ElementSize 0.7 0.9 5: the first is read" in load_scan(path).notes[0]
    scan = load_scan(meta(tmp_path / "c.mha", ElementSpacing=None), allow={"voxels"})
    assert scan.spacing_mm == (1, 1, 1)
    assert "taken would be 1 mm: allowed" in scan.notes[0]


def test_a_name_that_is_not_utf8_is_read_and_ends_no_process(tmp_path):
    """SimpleITK aborts on such a name."""
    path = tmp_path / os.fsdecode(b"caf\xe9.nrrd")
    try:
        nrrd(path)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    np.testing.assert_array_equal(load_scan(path).values, ct().T)


def test_without_simpleitk_a_line_says_what_to_install(tmp_path, monkeypatch):
    path = nrrd(tmp_path / "case.nrrd")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    refused(path, r"pip install 'deepsc_jax\[dicom\]'")


def test_foreign_content_is_refused(tmp_path):
    for suffix in (".nrrd", ".mha"):
        path = tmp_path / f"text{suffix}"
        path.write_text("no image\n" * 99)
        refused(path, "not an? .* file by its content")


def test_a_real_nrrd_and_its_label_map_are_read():
    scan = load_scan(real("cip", "ct-64.nrrd"))
    assert scan.values.shape == (79, 64, 64)
    assert scan.spacing_mm == pytest.approx((3.98734, 4.17187, 4.17187), rel=1e-5)
    lungs = load_mask(real("cip", "wholeLung-64.nrrd"), scan, "lung mask")
    litres = lungs.sum() * np.prod(scan.spacing_mm) / 1e6
    assert 4 < litres < 5  # 4.55
    assert -900 < scan.values[lungs].mean() < -800
