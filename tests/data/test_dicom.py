import os
import sys
from pathlib import Path

import numpy as np
import pytest

from deepsc_jax.data.scans import convert_dicom, load_scan, save_like
from deepsc_jax.runtime.errors import InputError


def ct(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def refused(path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        load_scan(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


def write_series(folder: Path, hu: np.ndarray, uid="1.2.3.4", z=None, modality="CT", names=None):
    """Slices of (D, H, W) HU as DICOM, stored with intercept -1024; z in mm."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    z = 2.5 * np.arange(len(hu)) if z is None else z
    for index, (plane, height) in enumerate(zip(hu, z, strict=True)):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((0.7, 0.9))
        tags = {
            "0008|0060": modality,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{index + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(index),
            "0020|0032": f"-100\\-150\\{height:g}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        name = names[index] if names else f"{uid}_{index:03}"
        writer.SetFileName(str(folder / f"{name}.dcm"))
        writer.Execute(image)
    return folder


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
    np.testing.assert_array_equal(convert_dicom(folder).values, long)


def test_unusable_dicom_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "without a DICOM series")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no images here")
    refused(tmp_path / "notes", "without a DICOM series")
    refused(write_series(tmp_path / "three", ct((3, 10, 11))), "scan of 3 slices")
    refused(write_series(tmp_path / "mr", ct((9, 10, 11)), modality="MR"), "modality is MR")
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


# Real data: JPEG Lossless, as COVID-CT-MD ships it.

REAL_DATA = Path(os.environ.get("DEEPSC_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_jpeg_lossless_series_agrees_with_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    folder = REAL_DATA / "covid-ct-md" / "P001_dicom"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set DEEPSC_REAL_DATA to the folder of real scans")
    scan = load_scan(folder)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(files)
    np.testing.assert_array_equal(scan.values, sitk.GetArrayViewFromImage(image))
    sitk.WriteImage(image, str(tmp_path / "theirs.nii"))
    np.testing.assert_allclose(scan.affine, load_scan(tmp_path / "theirs.nii").affine, atol=1e-4)
