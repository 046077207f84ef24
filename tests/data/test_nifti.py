import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_files import affine_of, ct, edit_header, refused, stored, write

from deepsc_jax.data.scans import load_scan, save_like
from deepsc_jax.runtime.errors import InputError


def test_slope_and_intercept_are_applied_as_nibabel_does(tmp_path):
    unsigned = (ct().astype(np.int32) + 1024).astype(np.uint16)
    image = nib.Nifti1Image(unsigned, affine_of())
    image.header.set_slope_inter(1.5, -1024)
    nib.save(image, tmp_path / "case.nii.gz")
    expected = stored(tmp_path / "case.nii.gz").get_fdata().transpose(2, 1, 0)
    scan = load_scan(tmp_path / "case.nii.gz")
    assert scan.values.dtype == np.float32
    np.testing.assert_array_equal(scan.values, expected.astype(np.float32))


def test_spacing_is_in_millimetres_whatever_the_header_counts_in(tmp_path):
    path = write(tmp_path / "case.nii", ct(), affine_of(spacing=(700, 900, 2500)), xyzt_units=3)
    assert load_scan(path).spacing_mm == pytest.approx((2.5, 0.9, 0.7))
    path = write(tmp_path / "unknown.nii", ct(), xyzt_units=4)
    assert load_scan(path).spacing_mm == pytest.approx((2.5, 0.9, 0.7))


@pytest.mark.parametrize("dtype", [">i2", "<f4", ">f8", "<i4", "<u2"])
def test_byte_orders_types_and_nifti2_are_read(tmp_path, dtype):
    voxels = ct()
    if dtype == "<u2":
        voxels = np.clip(voxels, 0, None)
    header = nib.Nifti2Header(endianness=dtype[0])
    image = nib.Nifti2Image(voxels.astype(dtype), affine_of(), header)
    image.header.set_data_dtype(dtype)
    nib.save(image, tmp_path / "case.nii")
    if dtype == "<u2":
        with pytest.raises(InputError, match="rescale them to HU"):
            load_scan(tmp_path / "case.nii")
        return
    scan = load_scan(tmp_path / "case.nii")
    np.testing.assert_array_equal(scan.values, voxels.T)
    save_like(scan.values, scan, tmp_path / "back.nii", np.int16)
    assert isinstance(stored(tmp_path / "back.nii"), nib.Nifti2Image)


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "none.nii.gz", "no such file")
    (tmp_path / "empty.nii.gz").touch()
    refused(tmp_path / "empty.nii.gz", "an empty file")
    (tmp_path / "short.nii").write_bytes(b"\x5c\x01\0\0")
    refused(tmp_path / "short.nii", "not a NIfTI file")
    (tmp_path / "text.nii").write_text("not an image\n" * 100)
    refused(tmp_path / "text.nii", "not a NIfTI file")
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"not an image\n" * 100))
    refused(tmp_path / "text.nii.gz", "not a NIfTI file")
    (tmp_path / "scan.png").write_bytes(b"\x89PNG")
    refused(tmp_path / "scan.png", "not a scan by its name, expected .nii")
    write(tmp_path / "plain.nii", ct())
    (tmp_path / "plain.nii").rename(tmp_path / "plain.nii.gz")
    refused(tmp_path / "plain.nii.gz", "its content is not gzip-compressed")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, suffix, kept):
    path = write(tmp_path / f"case{suffix}", ct((30, 30, 30)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path, "truncated or damaged")


def test_a_header_that_promises_more_than_the_file_holds_is_refused_before_reading(tmp_path):
    path = write(tmp_path / "case.nii", ct())
    edit_header(path, "dim", [3, 30000, 30000, 30000, 1, 1, 1, 1])
    refused(path, "its header says 30000 × 30000 × 30000 voxels, expected at most")
    edit_header(path, "dim", [3, 10, 11, 30000, 1, 1, 1, 1])
    refused(path, "its header promises 6600352 bytes, it holds 2992")


def test_a_flipped_byte_in_a_compressed_file_is_noticed(tmp_path):
    path = write(tmp_path / "case.nii.gz", ct((30, 30, 30)))
    whole = bytearray(path.read_bytes())
    whole[-6] ^= 1  # the checksum, which nibabel alone never reads
    path.write_bytes(whole)
    refused(path, "truncated or damaged")


def test_wrong_dimensions_are_refused(tmp_path):
    refused(write(tmp_path / "4d.nii", np.zeros((9, 9, 9, 2), np.int16)), "a 4D volume")
    refused(write(tmp_path / "2d.nii", np.zeros((9, 9), np.int16)), "a 2D volume")
    refused(write(tmp_path / "3.nii", ct((64, 64, 3))), "scan of 3 slices, expected at least 8")
    refused(write(tmp_path / "7.nii", ct((3, 64, 64))), "its slices are 64×3")
    rgb = np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(write(tmp_path / "rgb.nii", rgb), "expected one number in each")


@pytest.mark.parametrize("size", [0.0, -0.7, np.nan, np.inf])
def test_bad_voxel_size_in_the_header_is_refused_not_mended(tmp_path, size, caplog):
    path = write(tmp_path / "case.nii", ct())
    edit_header(path, "pixdim", [1, size, 0.9, 2.5, 1, 1, 1, 1])
    refused(path, "expected positive numbers")
    assert not caplog.records


def test_affine_that_cannot_be_inverted_is_refused(tmp_path):
    path = write(tmp_path / "case.nii", ct())
    refused(edit_header(path, "srow_x", [0, 0, 0, 0]), "affine")
    refused(edit_header(path, "srow_x", [np.nan, 0, 0, 0]), "affine")
    edit_header(path, "srow_x", [1, 0, 0, 0])
    refused(edit_header(path, "srow_y", [1, 0, 0, 0]), "affine")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 351), value=st.integers(0, 255))
def test_any_damaged_header_byte_gives_a_scan_or_one_line(tmp_path_factory, position, value):
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    if not path.exists():
        write(path, ct())
    whole = bytearray(path.read_bytes())
    before, whole[position] = whole[position], value
    path.write_bytes(whole)
    message = ""
    try:
        load_scan(path)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    whole[position] = before
    path.write_bytes(whole)
