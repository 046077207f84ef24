import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension
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
    (tmp_path / "scan.txt").write_bytes(b"\x89PNG")
    refused(tmp_path / "scan.txt", "not a scan by its name, expected .nii")
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


# What two readers take differently


def with_forms(path, sform, sform_code, qform, qform_code):
    image = nib.Nifti1Image(ct(), None)
    image.header.set_xyzt_units("mm")
    image.set_qform(qform, qform_code)
    image.set_sform(sform, sform_code)
    nib.save(image, path)
    return path


def itk_reads(path):
    """Spacing, and the world of the last voxel in RAS, as ITK has them."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(path))
    last = image.TransformIndexToPhysicalPoint([n - 1 for n in image.GetSize()])
    return image.GetSpacing(), np.array(last) * (-1, -1, 1)


def test_an_sform_and_a_qform_apart_are_noted_with_the_distance(tmp_path):
    moved = affine_of()
    moved[:3, 3] += (0, 0, 40)
    for code, itk, said in ((1, affine_of(), "as ITK does too"), (2, moved, "ITK reads the qform")):
        path = with_forms(tmp_path / "apart.nii", affine_of(), code, moved, 2)
        scan = load_scan(path)
        (note,) = scan.notes
        assert "place it up to 40.0 mm apart: the sform is read" in note
        assert said in note
        np.testing.assert_allclose(scan.affine, affine_of(), rtol=1e-6)
        last = itk @ (9, 10, 11, 1)
        np.testing.assert_allclose(itk_reads(path)[1], last[:3], atol=1e-4)


def test_a_mirrored_form_is_noted_with_both_axes(tmp_path):
    mirrored = affine_of(signs=(1, -1, 1))
    (note,) = load_scan(with_forms(tmp_path / "m.nii", affine_of(), 1, mirrored, 1)).notes
    assert "(axes LPS and RPS)" in note


def test_forms_that_differ_by_rounding_are_one(tmp_path):
    rounded = affine_of()
    rounded[:3, 3] += 0.01
    assert load_scan(with_forms(tmp_path / "r.nii", affine_of(), 1, rounded, 1)).notes == ()


def test_voxel_sizes_recorded_twice_and_differently_are_refused_unless_allowed(tmp_path):
    path = with_forms(tmp_path / "z.nii", affine_of(), 1, affine_of(spacing=(0.7, 0.9, 1.25)), 1)
    refused(path, r"sform says voxels of 0.7 × 0.9 × 2.5 mm, its pixdim of 0.7 × 0.9 × 1.25 mm")
    assert itk_reads(path)[0] == pytest.approx((0.7, 0.9, 1.25))
    scan = load_scan(path, allow={"voxels"})
    assert scan.spacing_mm == pytest.approx((2.5, 0.9, 0.7))
    assert "its pixdim of" in scan.notes[0]
    alone = write(tmp_path / "pixdim.nii", ct())
    edit_header(alone, "pixdim", [1, 0.7, 0.9, 5.6, 1, 1, 1, 1])
    refused(alone, "its pixdim of 0.7 × 0.9 × 5.6 mm.*--allow=voxels")
    edit_header(alone, "pixdim", [1, 0.7, 0.9, 2.51, 1, 1, 1, 1])
    assert "nibabel reads the first, ITK the second" in load_scan(alone).notes[0]


def test_no_form_at_all_is_noted_since_itk_turns_it_over(tmp_path):
    scan = load_scan(with_forms(tmp_path / "none.nii", affine_of(), 0, affine_of(), 0))
    assert "records no orientation" in scan.notes[0]
    np.testing.assert_array_equal(scan.values, ct().T[:, ::-1])


def test_a_form_that_nothing_defines_is_refused(tmp_path):
    path = write(tmp_path / "case.nii", ct())
    refused(edit_header(path, "sform_code", 77), "sform_code is 77, expected 0 to 5")
    edit_header(path, "sform_code", 0)
    edit_header(path, "qform_code", 1)
    refused(edit_header(path, "quatern_b", 3.0), "its qform gives no orientation")


def test_a_qfac_of_0_stands_for_1_and_is_written_so(tmp_path):
    path = with_forms(tmp_path / "q.nii", affine_of(), 0, affine_of(), 1)
    expected = load_scan(path).affine
    edit_header(path, "pixdim", [0, 0.7, 0.9, 2.5, 1, 1, 1, 1])
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.affine, expected)
    save_like(scan.values, scan, tmp_path / "back.nii", np.int16)
    np.testing.assert_array_equal(stored(tmp_path / "back.nii").affine, expected)


@pytest.mark.parametrize(("unit", "sizes"), [(1, (0.0007, 0.0009, 0.0025)), (3, (700, 900, 2500))])
def test_metres_and_microns_are_read_as_itk_reads_them(tmp_path, unit, sizes):
    path = write(tmp_path / "case.nii", ct(), affine_of(spacing=sizes), xyzt_units=unit)
    scan = load_scan(path)
    assert scan.spacing_mm == pytest.approx((2.5, 0.9, 0.7))
    assert itk_reads(path)[0] == pytest.approx((0.7, 0.9, 2.5))
    assert "as ITK reads it too, but not nibabel" in scan.notes[0]


@pytest.mark.parametrize(("unit", "shown"), [(1, "700 × 900 × 2500"), (3, "0.0007 × 0.0009")])
def test_mm_that_a_header_calls_metres_or_microns_are_refused(tmp_path, unit, shown):
    path = write(tmp_path / "case.nii", ct(), xyzt_units=unit)
    refused(path, f"voxels measure {shown}.*expected 0.1 to 25 each.*--allow=voxels")
    assert load_scan(path, intensity="hu", allow={"voxels"}).notes[-1].endswith("allowed")


def test_voxel_sizes_of_images_without_hu_are_not_judged(tmp_path):
    unit = np.abs(ct()) % 256
    path = write(tmp_path / "unit.nii", unit.astype(np.uint8), affine_of(spacing=(40, 40, 40)))
    assert load_scan(path, intensity="unit").notes == ()


@pytest.mark.parametrize("offset", [0, 348, 350, 352.5, -16, np.nan, 1e30])
def test_voxels_that_would_begin_within_the_header_are_refused(tmp_path, offset):
    path = write(tmp_path / "case.nii", ct())
    refused(edit_header(path, "vox_offset", offset), "begin at byte .* expected 352 or")


def test_voxels_after_an_extension_are_read(tmp_path):
    image = nib.Nifti1Image(ct(), affine_of())
    image.header.extensions.append(Nifti1Extension(6, b"a remark" * 20))
    nib.save(image, tmp_path / "case.nii.gz")
    np.testing.assert_array_equal(load_scan(tmp_path / "case.nii.gz").values, ct().T)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_more_slices_than_the_header_says_are_refused_and_padding_is_not(tmp_path, suffix):
    write(tmp_path / "case.nii", ct())
    edit_header(tmp_path / "case.nii", "dim", [3, 10, 11, 9, 1, 1, 1, 1])
    whole = (tmp_path / "case.nii").read_bytes()
    pack = gzip.compress if suffix.endswith("gz") else bytes
    (tmp_path / f"few{suffix}").write_bytes(pack(whole))
    refused(tmp_path / f"few{suffix}", "more voxels follow the 1980 bytes")
    (tmp_path / f"padded{suffix}").write_bytes(pack(whole[: 352 + 1980 + 100]))
    np.testing.assert_array_equal(load_scan(tmp_path / f"padded{suffix}").values, ct().T[:9])


@pytest.mark.parametrize(
    ("slope", "intercept", "said"),
    [
        (0, -1024, "nibabel leaves such voxels as they are, ITK adds -1024"),
        (1, np.nan, "scales voxels by scl_slope 1 and scl_inter nan"),
        (2, np.inf, "scales voxels by scl_slope 2 and scl_inter inf"),
        (1e38, 0, "NaN or infinite in"),
    ],
)
def test_scaling_that_cannot_be_meant_is_refused(tmp_path, slope, intercept, said):
    path = write(tmp_path / "case.nii", ct())
    edit_header(path, "scl_slope", slope)
    refused(edit_header(path, "scl_inter", intercept), said)


def test_a_slope_of_nothing_leaves_voxels_as_they_are(tmp_path):
    path = write(tmp_path / "case.nii", ct())
    edit_header(path, "scl_slope", 0)
    assert load_scan(path).notes == ()
    scan = load_scan(edit_header(path, "scl_slope", np.nan))
    np.testing.assert_array_equal(scan.values, ct().T)
    assert "scl_slope nan" in scan.notes[0]


def test_types_of_several_numbers_and_unknown_ones_are_refused(tmp_path):
    path = write(tmp_path / "complex.nii", ct().astype(np.complex64))
    refused(path, "type complex64, expected one number in each")
    refused(edit_header(path, "datatype", 777), "the unknown type 777")
    refused(edit_header(path, "dim", [0] * 8), "its header says 0 axes")
    refused(edit_header(path, "dim", [3, 10, -11, 12, 1, 1, 1, 1]), "expected at least 1")


# Names and pairs


@pytest.mark.parametrize("name", ["A.NII", "B.Nii.Gz", "C.NII.GZ"])
def test_names_are_read_in_any_case_of_letters(tmp_path, name):
    write(tmp_path / name.lower(), ct())
    (tmp_path / name.lower()).rename(tmp_path / name)
    scan = load_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.values, ct().T)
    assert scan.name == name[0]


@pytest.mark.parametrize("upper", [False, True])
def test_a_pair_is_read_by_either_name(tmp_path, upper):
    nib.save(nib.Nifti1Pair(ct(), affine_of()), tmp_path / "case.img")
    names = ["case.img", "case.hdr"]
    if upper:
        for name in names:
            (tmp_path / name).rename(tmp_path / name.replace("case", "CASE").upper())
        names = [name.upper() for name in names]
    for name in names:
        scan = load_scan(tmp_path / name)
        np.testing.assert_array_equal(scan.values, ct().T)
        assert scan.name.lower() == "case"
    (tmp_path / names[1]).unlink()
    refused(tmp_path / names[0], "half of a pair")


def test_analyze_is_refused_since_it_records_no_orientation(tmp_path):
    image = nib.AnalyzeImage(ct(), np.eye(4))
    nib.save(image, tmp_path / "case.img")
    refused(tmp_path / "case.img", "Analyze 7.5, whose orientation is not recorded")


@pytest.mark.parametrize("field", ["quatern_b", "qoffset_x"])
def test_a_qform_that_is_not_finite_is_said_to_be_none(tmp_path, field):
    path = edit_header(write(tmp_path / "case.nii", ct(), qform_code=1), field, np.nan)
    assert load_scan(path).notes == ("its qform gives no orientation: the sform is read",)
    refused(edit_header(path, "sform_code", 0), "its qform gives no orientation .*not finite")
