import sys

import numpy as np
import pytest
from scan_files import ct, real, refused, write_series

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
    refused(cut, "cannot be read as one series|a slice is missing")


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
