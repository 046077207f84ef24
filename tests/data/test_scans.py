import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scan_files import affine_of, ct, refused, stored, write

from deepsc_jax.data import nifti
from deepsc_jax.data.scans import load_scan, save_like


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


def test_a_fourth_axis_of_one_is_dropped(tmp_path):
    scan = load_scan(write(tmp_path / "case.nii.gz", ct()[..., None]))
    np.testing.assert_array_equal(scan.values, ct().T)
    save_like(scan.values, scan, tmp_path / "back.nii.gz", np.int16)
    assert stored(tmp_path / "back.nii.gz").shape == (10, 11, 12)


def test_slices_are_counted_along_the_canonical_axis(tmp_path):
    sagittal = affine_of(axes=(2, 0, 1), signs=(1, 1, 1))  # first axis runs upwards
    refused(write(tmp_path / "s.nii", ct((3, 64, 64)), sagittal), "scan of 3 slices")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_counted(tmp_path, value):
    voxels = ct().astype(np.float32)
    voxels[1:3, 4, 5] = value
    refused(write(tmp_path / "case.nii.gz", voxels), "NaN or infinite in 2 voxels")


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
    np.testing.assert_array_equal(source.voxels(), probability.T)
