import nibabel as nib
import numpy as np
import pytest
from scan_files import affine_of, ct, edit_header, write

from deepsc_jax.data.scans import load_mask, load_scan
from deepsc_jax.runtime.errors import InputError


@pytest.fixture
def scan(tmp_path):
    return load_scan(write(tmp_path / "case.nii.gz", ct()))


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


def test_what_readers_take_differently_in_a_mask_is_noted_or_refused(tmp_path, scan):
    mask = (ct() > 0).astype(np.uint8)
    image = nib.Nifti1Image(mask, affine_of())
    image.set_qform(affine_of(signs=(1, -1, 1)), 1)
    image.set_sform(affine_of(), 2)
    nib.save(image, tmp_path / "mirrored.nii")
    notes: list[str] = []
    np.testing.assert_array_equal(load_mask(tmp_path / "mirrored.nii", scan, notes=notes), mask.T)
    (note,) = notes
    assert note.startswith("lesion mask: its sform and its qform place it up to ")
    thick = edit_header(write(tmp_path / "thick.nii", mask), "pixdim", [1, 0.7, 0.9, 5, 1, 1, 1, 1])
    with pytest.raises(InputError, match=r"thick.nii: its sform says voxels of .*--allow=voxels"):
        load_mask(thick, scan)
    load_mask(thick, scan, "lung mask", {"voxels"}, notes)
    assert notes[1].endswith(": allowed")
    own = load_scan(thick, allow={"voxels", "intensity"})
    load_mask(thick, own, "lung mask", {"voxels"}, notes)
    assert len(notes) == 2  # the scan's notes have it


def test_a_mask_in_another_unit_is_compared_in_mm(tmp_path, scan):
    mask = (ct() > 0).astype(np.uint8)
    metres = affine_of()
    metres[:3] /= 1000
    path = edit_header(write(tmp_path / "metres.nii", mask, metres), "xyzt_units", 1)
    np.testing.assert_array_equal(load_mask(path, scan), mask.T)
    path = edit_header(write(tmp_path / "unit.nii", mask), "xyzt_units", 1)
    with pytest.raises(InputError, match=r"unit.nii: by the units .* 1000 times .*--allow=voxels"):
        load_mask(path, scan)
    np.testing.assert_array_equal(load_mask(path, scan, allow={"voxels"}), mask.T)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_mask_that_is_not_finite_is_refused_without_a_warning(tmp_path, scan, value):
    path = write(tmp_path / "mask.nii", np.where(ct() > 0, value, 0).astype(np.float32))
    with pytest.raises(InputError, match=r"lesion mask holds .* beside 0 and 1"):
        load_mask(path, scan)


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


@pytest.mark.parametrize("labels", [(1, 2), (1, 2, 3, 4, 5), (255,), (257, 513)])
def test_what_is_not_0_in_a_lung_mask_is_lung(tmp_path, scan, labels):
    """Sides, lobes, 255, or codes of regions."""
    mask = np.resize(np.array((0, *labels), np.uint16), (10, 11, 12))
    path = write(tmp_path / "m.nii", mask)
    np.testing.assert_array_equal(load_mask(path, scan, "lung mask"), mask.T > 0)
    if labels != (1,):
        with pytest.raises(InputError, match="beside 0 and 1"):
            load_mask(path, scan, "lesion mask")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, 0.25, 1], "lung mask holds 0.25, expected 0 .background. and whole numbers"),
        ([0, -1000, 40], "lung mask holds -1000, expected"),
        ([0, np.nan], "lung mask holds nan, expected"),
        (list(range(60)), "lung mask holds more than 32 labels"),
    ],
)
def test_a_lung_mask_that_is_an_image_is_refused(tmp_path, scan, values, said):
    path = write(tmp_path / "m.nii", np.resize(np.array(values, np.float32), (10, 11, 12)))
    with pytest.raises(InputError, match=said):
        load_mask(path, scan, "lung mask")
