import gzip
import itertools
import os
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsc_jax.data import nifti
from deepsc_jax.data.scans import load_mask, load_scan, save_like
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


@pytest.fixture
def scan(tmp_path):
    return load_scan(write(tmp_path / "case.nii.gz", ct()))


ORIENTATIONS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_every_orientation_round_trips_to_the_voxel(tmp_path, axes, signs):
    sitk = pytest.importorskip("SimpleITK")
    voxels = ct((8, 9, 10))
    source = write(tmp_path / "source.nii", voxels, affine_of(axes, signs))

    scan = load_scan(source)
    image = sitk.ReadImage(str(source))
    lps = sitk.DICOMOrient(image, "LPS")
    np.testing.assert_array_equal(scan.values, sitk.GetArrayFromImage(lps))
    np.testing.assert_allclose(scan.spacing_mm, lps.GetSpacing()[::-1], rtol=1e-6)

    save_like(scan.values, scan, tmp_path / "back.nii.gz", np.int16)
    back = stored(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), voxels)
    np.testing.assert_array_equal(back.affine, stored(source).affine)
    back = sitk.ReadImage(str(tmp_path / "back.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(back), voxels.T)
    assert back.GetOrigin() == image.GetOrigin()
    assert back.GetSpacing() == image.GetSpacing()
    assert back.GetDirection() == image.GetDirection()


def test_axes_run_upwards_backwards_and_to_the_left(tmp_path):
    voxels = np.full((8, 9, 10), -1000, np.int16)
    voxels[1, 2, 3] = 500
    # Stored as LPS: x to the left, y backwards, z upwards.
    scan = load_scan(write(tmp_path / "lps.nii", voxels, affine_of(signs=(-1, -1, 1))))
    assert scan.values[3, 2, 1] == 500
    # Stored as RAS: x to the right, y forwards.
    scan = load_scan(write(tmp_path / "ras.nii", voxels, affine_of(signs=(1, 1, 1))))
    assert scan.values[3, 9 - 1 - 2, 8 - 1 - 1] == 500
    assert scan.spacing_mm == pytest.approx((2.5, 0.9, 0.7))
    assert scan.source_shape == (8, 9, 10)
    assert scan.name == "ras"


def test_oblique_scan_keeps_its_affine_and_takes_spacing_from_the_columns(tmp_path):
    angle = np.deg2rad(20)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = affine_of(axes=(1, 0, 2), signs=(1, -1, -1))
    affine[:3, :3] = turn @ affine[:3, :3]
    voxels = ct()
    source = write(tmp_path / "oblique.nii.gz", voxels, affine)
    scan = load_scan(source)
    assert scan.spacing_mm == pytest.approx((2.5, 0.7, 0.9), rel=1e-6)
    save_like(scan.values, scan, tmp_path / "back.nii.gz", np.int16)
    back = stored(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(back.affine, stored(source).affine)
    np.testing.assert_array_equal(np.asarray(back.dataobj), voxels)


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (2, 1), (0, 0), (4, 4)])
def test_forms_codes_and_units_are_written_as_they_were_read(tmp_path, sform, qform):
    image = nib.Nifti1Image(ct(), affine_of())
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine_of(), sform)
    image.set_qform(affine_of(), qform)
    nib.save(image, tmp_path / "case.nii")
    scan = load_scan(tmp_path / "case.nii")
    save_like(scan.values < 0, scan, tmp_path / "mask.nii", np.uint8)
    source = stored(tmp_path / "case.nii").header
    header = stored(tmp_path / "mask.nii").header
    assert header["sform_code"] == sform
    assert header["qform_code"] == qform
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(header.get_best_affine(), source.get_best_affine())
    np.testing.assert_array_equal(header["pixdim"][:4], source["pixdim"][:4])


def test_written_masks_carry_no_text_or_display_range_of_the_source(tmp_path):
    path = write(tmp_path / "case.nii", ct(), descrip=b"Jane Doe", cal_max=150, cal_min=-1350)
    scan = load_scan(path)
    save_like(scan.values < 0, scan, tmp_path / "mask.nii", np.uint8)
    header = stored(tmp_path / "mask.nii").header
    assert header["descrip"] == b""
    assert header["cal_max"] == header["cal_min"] == 0


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


def test_a_fourth_axis_of_one_is_dropped(tmp_path):
    scan = load_scan(write(tmp_path / "case.nii.gz", ct()[..., None]))
    np.testing.assert_array_equal(scan.values, ct().T)
    save_like(scan.values, scan, tmp_path / "back.nii.gz", np.int16)
    assert stored(tmp_path / "back.nii.gz").shape == (10, 11, 12)


# Masks


def test_mask_of_another_axis_order_is_accepted_when_it_covers_the_same_voxels(tmp_path, scan):
    mask = ct() > 0
    image = nib.Nifti1Image(mask.astype(np.uint8), affine_of())
    turned = image.as_reoriented([[2, -1], [0, 1], [1, 1]])
    nib.save(turned, tmp_path / "mask.nii.gz")
    loaded = load_mask(tmp_path / "mask.nii.gz", scan)
    assert loaded.dtype == np.bool_
    np.testing.assert_array_equal(loaded, mask.T)


def test_mask_of_another_shape_is_refused_with_both_shapes(tmp_path, scan):
    path = write(tmp_path / "m.nii.gz", np.zeros((10, 11, 9), np.uint8))
    with pytest.raises(
        InputError, match=r"m\.nii\.gz: lung mask is \(10, 11, 9\), its scan case \(10, 11, 12\)"
    ):
        load_mask(path, scan, kind="lung mask")


def test_mask_of_another_affine_is_refused_and_rounding_is_not(tmp_path, scan):
    empty = np.zeros((10, 11, 12), np.uint8)
    near = affine_of()
    near[:3, 3] += 0.01
    assert not load_mask(write(tmp_path / "near.nii", empty, near), scan).any()
    far = affine_of()
    far[:3, 3] += 0.4
    for affine in (far, affine_of(signs=(1, -1, 1)), affine_of(spacing=(0.7, 0.9, 2.6))):
        with pytest.raises(InputError, match=r"lesion mask lies up to .* voxels away"):
            load_mask(write(tmp_path / "far.nii", empty, affine), scan)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_a_mask_whose_header_scales_it_is_still_0_and_1(tmp_path, scan, dtype):
    mask = ct() > 0
    image = nib.Nifti1Image(mask.astype(np.float32), affine_of())
    image.set_data_dtype(dtype)  # nibabel then stores a slope, and 1 comes back as 1.00000006
    nib.save(image, tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.nii.gz", scan), mask.T)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0, 1, 2, 7], "holds 2, 7 beside"),
        ([0.0, 0.25, 1.0], "holds 0.25 beside"),
        ([0, 1, np.nan], "holds nan beside"),
        ([0, 255], "holds 255 beside"),
        (list(range(30)), "holds 2, 3, 4, 5, 6, … beside"),
    ],
)
def test_mask_values_other_than_0_and_1_are_named(tmp_path, scan, values, named):
    mask = np.resize(np.array(values, np.float32), (10, 11, 12))
    path = write(tmp_path / "m.nii", mask)
    with pytest.raises(InputError, match=named):
        load_mask(path, scan)


# Bad input: each ends in one line that names the file.


def refused(path, pattern: str, **options) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        load_scan(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


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
    refused(tmp_path / "scan.png", r"expected \.nii or \.nii\.gz")
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
    refused(path, "its header promises 54000000000000 bytes")


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


def test_slices_are_counted_along_the_canonical_axis(tmp_path):
    sagittal = affine_of(axes=(2, 0, 1), signs=(1, 1, 1))  # first axis runs upwards
    refused(write(tmp_path / "s.nii", ct((3, 64, 64)), sagittal), "scan of 3 slices")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_counted(tmp_path, value):
    voxels = ct().astype(np.float32)
    voxels[1:3, 4, 5] = value
    refused(write(tmp_path / "case.nii.gz", voxels), "2 voxels are NaN or infinite")


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


def test_a_tilted_gantry_is_accepted_as_far_as_millimetres_stay_right(tmp_path):
    for degrees, accepted in ((0, True), (10, True), (20, False)):
        affine = affine_of()
        affine[1, 2] = np.tan(np.deg2rad(degrees)) * affine[2, 2]
        path = write(tmp_path / f"tilt{degrees}.nii", ct(), affine)
        if accepted:
            assert load_scan(path).values.shape == ct().T.shape
        else:
            refused(path, "sheared .a voxel has 94% of the volume")


def test_values_that_contradict_the_intensity_are_refused(tmp_path):
    eight_bit = write(tmp_path / "8bit.nii", (ct() & 255).astype(np.uint8))
    refused(eight_bit, "--intensity=unit")
    assert load_scan(eight_bit, intensity="unit").values.max() == 255
    hu = write(tmp_path / "hu.nii", ct())
    refused(hu, "--intensity=hu", intensity="unit")
    refused(write(tmp_path / "flat.nii", np.full((9, 9, 9), -1000, np.int16)), "every voxel is")


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


# Writing


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, scan, monkeypatch):
    target = tmp_path / "out" / "mask.nii.gz"
    target.parent.mkdir()
    target.write_bytes(b"old")

    def full_disk(image, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_like(scan.values < 0, scan, target, np.uint8)
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == ["mask.nii.gz"]


def test_values_a_type_cannot_hold_are_not_written(tmp_path, scan):
    with pytest.raises(ValueError, match="do not fit uint8"):
        save_like(scan.values, scan, tmp_path / "x.nii", np.uint8)
    with pytest.raises(ValueError, match="array is"):
        save_like(scan.values[1:], scan, tmp_path / "x.nii", np.float32)
    with pytest.raises(ValueError, match=r"ends in \.nii"):
        save_like(scan.values, scan, tmp_path / "x.mha", np.float32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["case.nii.gz"]


def test_probabilities_survive_writing_exactly(tmp_path, scan):
    probability = np.random.default_rng(0).random(scan.values.shape, np.float32)
    save_like(probability, scan, tmp_path / "p.nii.gz", np.float32)
    source = nifti.read_nifti(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(source.voxels, probability.T)
