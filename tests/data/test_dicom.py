import os
import sys

import numpy as np
import pytest
from scan_files import ct, real, refused, set_tag, write_series

from deepsc_jax.data.scans import load_scan, save_like
from deepsc_jax.runtime.errors import InputError


def test_dicom_slices_are_ordered_by_position_not_by_name(tmp_path):
    hu = ct((9, 10, 11))
    names = [f"{(7 * index) % 9}" for index in range(9)]
    scan = load_scan(write_series(tmp_path / "P9", hu, names=names))
    np.testing.assert_array_equal(scan.values, hu)
    assert scan.spacing_mm == pytest.approx((2.5, 0.9, 0.7), rel=1e-6)
    assert scan.name == "P9"

    save_like(scan.values, scan, tmp_path / "P9.nii.gz", np.int16)
    sitk = pytest.importorskip("SimpleITK")
    written = sitk.ReadImage(str(tmp_path / "P9.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(written), hu)
    np.testing.assert_allclose(written.GetOrigin(), (-100, -150, 0))
    np.testing.assert_allclose(written.GetDirection(), np.eye(3).ravel(), atol=1e-7)
    again = load_scan(tmp_path / "P9.nii.gz")
    np.testing.assert_array_equal(again.affine, scan.affine)


def test_the_series_with_most_slices_is_taken(tmp_path):
    folder = write_series(tmp_path / "two", ct((8, 10, 11), seed=1), uid="1.2.3.9")
    long = ct((12, 10, 11), seed=2)
    write_series(folder, long, uid="1.2.3.4")
    np.testing.assert_array_equal(load_scan(folder).values, long)


def test_unusable_dicom_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "without a DICOM series")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no images here")
    refused(tmp_path / "notes", "without a DICOM series")
    refused(write_series(tmp_path / "three", ct((3, 10, 11))), "scan of 3 slices")
    refused(write_series(tmp_path / "mr", ct((9, 10, 11)), modality="MR"), "modality is 9 MR")
    gap = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9]) * 2.5
    refused(write_series(tmp_path / "gap", ct((9, 10, 11)), z=gap), "a slice is missing")
    cut = write_series(tmp_path / "cut", ct((9, 10, 11)))
    victim = sorted(cut.iterdir())[4]
    victim.write_bytes(victim.read_bytes()[:-80])
    refused(cut, "damaged .*, one of 1 such file among 9")


def test_dicom_without_simpleitk_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"pip install 'deepsc_jax\[dicom\]'"):
        load_scan(tmp_path)


def test_jpeg_lossless_series_agrees_with_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    folder = real("covid-ct-md", "P001_dicom")
    scan = load_scan(folder)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(files)
    np.testing.assert_array_equal(scan.values, sitk.GetArrayViewFromImage(image))
    sitk.WriteImage(image, str(tmp_path / "theirs.nii"))
    np.testing.assert_allclose(scan.affine, load_scan(tmp_path / "theirs.nii").affine, atol=1e-4)


# What a folder holds beside the series


def test_the_longest_ct_series_is_read_whatever_lies_beside_it(tmp_path):
    hu = ct((9, 10, 11))

    def described(index, tags):
        tags["0008|103e"] = "Thorax of John Smith"

    folder = write_series(tmp_path / "mixed", hu, uid="1.2.840.99.4444", edit=described)
    write_series(folder, ct((14, 10, 11)), uid="1.2.3.5", modality="PT")
    write_series(folder, ct((8, 10, 11)), uid="1.2.3.6")

    def localizer(index, tags):
        tags["0008|0008"] = "ORIGINAL\\PRIMARY\\LOCALIZER"
        tags["0020|0037"] = "1\\0\\0\\0\\0\\-1"

    write_series(folder, ct((12, 20, 21)), uid="1.2.3.7", edit=localizer)

    def screenshot(index, tags):
        tags["0008|0016"] = "1.2.840.10008.5.1.4.1.1.7"

    write_series(folder, ct((11, 30, 31)), uid="1.2.3.8", edit=screenshot)
    (folder / "readme.txt").write_text("made for a test")
    (folder / "DICOMDIR").write_bytes(b"an index")
    scan = load_scan(folder)
    np.testing.assert_array_equal(scan.values, hu)
    (note,) = scan.notes
    assert "DICOM series ….840.99.4444 (9 slices) is read; left out: " in note
    for part in (
        "14 slices of PT",
        "8 slices of CT",
        "12 slices of localizer or",
        "11 slices of loc",
    ):
        assert part in note
    assert note.endswith("1 file without a DICOM image")


def test_a_localizer_of_the_series_itself_is_left_out(tmp_path):
    hu = ct((10, 10, 11))

    def first_is_localizer(index, tags):
        if index == 0:
            tags["0008|0008"] = "ORIGINAL\\PRIMARY\\LOCALIZER"

    scan = load_scan(write_series(tmp_path / "s", hu, edit=first_is_localizer))
    np.testing.assert_array_equal(scan.values, hu[1:])
    assert "left out: 1 slice of localizer or" in scan.notes[0]


def test_one_series_alone_needs_no_note(tmp_path):
    assert load_scan(write_series(tmp_path / "s", ct((9, 10, 11)))).notes == ()


# Positions and spacing


def without_positions(folder, step=None, thickness=None):
    for file in write_series(folder, ct((9, 10, 11))).iterdir():
        set_tag(file, 0x00200032, None)
        set_tag(file, 0x00180088, step)
        set_tag(file, 0x00180050, thickness)
    return folder


def test_slices_without_positions_are_refused_with_the_distance_that_is_recorded(tmp_path):
    folder = without_positions(tmp_path / "s", thickness="5.61")
    refused(folder, r"no ImagePositionPatient.*5.61 mm apart.*--allow=voxels")
    scan = load_scan(folder, allow={"voxels"})
    assert scan.spacing_mm == pytest.approx((5.61, 0.9, 0.7), rel=1e-6)
    np.testing.assert_array_equal(scan.values, ct((9, 10, 11)))
    assert scan.notes[0].endswith("5.61 mm apart: allowed")


def test_spacing_between_slices_goes_before_thickness(tmp_path):
    folder = without_positions(tmp_path / "s", step="2.5", thickness="5")
    assert load_scan(folder, allow={"voxels"}).spacing_mm[0] == pytest.approx(2.5)


def test_neither_positions_nor_a_distance_is_refused_even_if_allowed(tmp_path):
    folder = without_positions(tmp_path / "s")
    with pytest.raises(InputError, match="neither one SpacingBetweenSlices nor one SliceThickness"):
        load_scan(folder, allow={"voxels"})


def test_one_slice_without_a_position_is_named(tmp_path):
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    victim = sorted(folder.iterdir())[4]
    set_tag(victim, 0x00200032, None)
    refused(folder, rf"1 of 9 slices \({victim.name}\) have no ImagePositionPatient")


@pytest.mark.parametrize("step", [0.625, 1.25, 0.75])
def test_positions_rounded_to_a_tenth_are_no_gaps(tmp_path, step):
    z = [f"{value:.1f}" for value in step * np.arange(40)]
    scan = load_scan(write_series(tmp_path / "s", ct((40, 8, 8)), z=z))
    assert scan.spacing_mm[0] == pytest.approx(step, abs=0.1 / 39)
    missing = [value for index, value in enumerate(z) if index != 20]
    refused(write_series(tmp_path / "gap", ct((39, 8, 8)), z=missing), "a slice is missing")


def test_a_missing_slice_is_a_gap_where_positions_are_exact(tmp_path):
    z = np.delete(0.5 * np.arange(12), 5)
    refused(write_series(tmp_path / "s", ct((11, 8, 8)), z=z), r"apart \(the latter beside")


def test_a_file_that_lies_there_twice_is_named(tmp_path):
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    (folder / "copy.dcm").write_bytes((folder / "1.2.3.4_003.dcm").read_bytes())
    refused(folder, r"1\.2\.3\.4_003\.dcm and copy\.dcm lie at one position")


def test_slices_unlike_the_others_are_named(tmp_path):
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    write_series(folder, ct((1, 20, 21)), z=[25], names=["other"])
    refused(folder, r"other\.dcm: its image is 21, 20, that of .* 11, 10")


def test_tags_without_which_itk_takes_1_mm_or_no_turn_are_asked_for(tmp_path):
    folder = write_series(tmp_path / "spacing", ct((9, 10, 11)))
    for file in folder.iterdir():
        set_tag(file, 0x00280030, None)
    refused(folder, "its PixelSpacing is absent or no number, expected two positive")
    folder = write_series(tmp_path / "turn", ct((9, 10, 11)))
    for file in folder.iterdir():
        set_tag(file, 0x00200037, None)
    refused(folder, "no ImageOrientationPatient; taken would be axial slices.*--allow=voxels")


def test_a_rescale_that_some_slices_lack_is_refused(tmp_path):
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    set_tag(sorted(folder.iterdir())[2], 0x00281052, None)
    refused(folder, "its RescaleSlope is 1, its RescaleIntercept absent or no number, expected a")
    set_tag(sorted(folder.iterdir())[2], 0x00281053, None)
    refused(folder, "1 of 9 slices .* have no RescaleSlope and RescaleIntercept")


@pytest.mark.parametrize("slope", ["0", "1,0", "nan", "1\\2"])
def test_a_rescale_that_gdcm_would_guess_is_refused(tmp_path, slope):
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    for file in folder.iterdir():
        set_tag(file, 0x00281053, slope)
    refused(folder, "expected a number other than 0 and a number")


def test_slices_of_several_types_keep_their_numbers(tmp_path):
    """Read as the first slice's type, unsigned, air of the others would be above 64,000."""
    hu = ct((9, 10, 11))
    folder = write_series(tmp_path / "s", hu)
    unsigned = np.abs(hu).astype(np.uint16)
    write_series(tmp_path / "u", unsigned, edit=lambda _, tags: tags.update({"0028|1052": "0"}))
    first = sorted(folder.iterdir())[0]
    first.write_bytes((tmp_path / "u" / first.name).read_bytes())
    hu[0] = unsigned[0]
    np.testing.assert_array_equal(load_scan(folder).values, hu)


def test_positions_beyond_any_scanner_are_refused(tmp_path):
    edit = lambda i, tags: tags.update({"0020|0032": f"0\\0\\{i}e300"})  # noqa: E731
    refused(
        write_series(tmp_path / "s", ct((9, 10, 11)), edit=edit), "mm from the origin, expected"
    )


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    folder = tmp_path / "s"

    def tilted(index, tags):
        tags["0020|0032"] = f"-100\\{-150 + 0.2 * index:g}\\{2.5 * index:g}"

    scan = load_scan(write_series(folder, ct((9, 10, 11)), edit=tilted))
    np.testing.assert_allclose(scan.affine[:3, 2], (0, -0.2, 2.5), atol=1e-6)


def test_folders_and_files_with_names_that_are_not_utf8_are_read(tmp_path):
    hu = ct((9, 10, 11))
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    for file in write_series(tmp_path / "s", hu).iterdir():
        file.rename(folder / os.fsdecode(b"\xe9" + os.fsencode(file.name)))
    np.testing.assert_array_equal(load_scan(folder).values, hu)


def test_slices_without_a_preamble_are_read(tmp_path):
    hu = ct((9, 10, 11))
    folder = write_series(tmp_path / "bare", hu)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    np.testing.assert_array_equal(load_scan(folder).values, hu)
