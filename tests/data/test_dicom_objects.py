"""DICOM objects of a series: read back by pydicom, SimpleITK and dcmqi, they lie on its frames."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from dicom_files import SOP, overlays, slices_by_uid, write_series
from scan_files import ct, real

from deepsc_jax.data import dicom_objects, dicom_report, dicom_source
from deepsc_jax.data.scans import Scan, load_scan
from deepsc_jax.data.source import to_source_axes
from deepsc_jax.runtime.errors import InputError

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
sitk = pytest.importorskip("SimpleITK")

DIGEST = "0123456789abcdef" * 4
SERIES: dict[str, Callable[[pathlib.Path, np.ndarray], pathlib.Path]] = {
    "as it is": write_series,
    "reversed": lambda folder, hu: write_series(folder, hu, reverse=True),
    "tilted by 8°": lambda folder, hu: write_series(folder, hu, tilt=8),
    "tilted by -8°, reversed": lambda folder, hu: write_series(folder, hu, tilt=-8, reverse=True),
    "with gaps in the numbers": lambda folder, hu: write_series(
        folder, hu, numbers=[3, 4, 7, 11, 12, 20, 21, 22, 40]
    ),
}


def masks_of(scan: Scan) -> dict[str, np.ndarray]:
    """Lungs and lesions that depend on the voxels, so that no other order or place passes."""
    lesion = scan.values > np.quantile(scan.values, 0.9)
    lesion[:2] = False  # slices without: they have no frame
    return {"lungs": scan.values > np.median(scan.values), "lesion": lesion}


def frames(array: np.ndarray, scan: Scan) -> np.ndarray:
    return np.ascontiguousarray(to_source_axes(array, scan.affine).T)


def written(folder: pathlib.Path, scan: Scan, masks: dict[str, np.ndarray]) -> pathlib.Path:
    images = dicom_source.source_images(scan.files)
    framed = {name: frames(mask, scan) for name, mask in masks.items()}
    path = folder / "segmentation.dcm"
    dicom_objects.segmentation(images, framed, DIGEST).save_as(path)
    return path


@pytest.mark.parametrize("kind", SERIES)
def test_a_segmentation_overlays_its_series_voxel_for_voxel(
    kind: str, tmp_path: pathlib.Path
) -> None:
    folder = SERIES[kind](tmp_path / "series", ct((9, 10, 11)))
    scan = load_scan(folder)
    masks = masks_of(scan)
    path = written(tmp_path, scan, masks)
    by_pydicom = pydicom.dcmread(path).pixel_array
    by_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    for pixels in (by_pydicom, by_itk):
        assert len(pixels) == 9 + 7  # of the lungs all, of the lesions those that have some
        segments = overlays(path, folder, scan, pixels)
        np.testing.assert_array_equal(segments[1], masks["lungs"])
        np.testing.assert_array_equal(segments[2], masks["lesion"])


def test_planes_of_a_tilted_gantry_are_as_far_apart_as_they_are(tmp_path: pathlib.Path) -> None:
    scan = load_scan(write_series(tmp_path / "s", ct((9, 10, 11)), tilt=8))
    images = dicom_source.source_images(scan.files)
    # Positions are 2.5 mm apart along the table, planes by the cosine of 8 degrees less.
    assert float(images[0].SpacingBetweenSlices) == pytest.approx(2.5 * 0.9902681, rel=1e-6)


def test_a_segmentation_without_a_lesion_is_read_back_empty(tmp_path: pathlib.Path) -> None:
    folder = write_series(tmp_path / "s", ct((9, 10, 11)))
    scan = load_scan(folder)
    nothing = np.zeros(scan.values.shape, bool)
    for lungs in (~nothing, nothing):
        path = written(tmp_path, scan, {"lungs": lungs, "lesion": nothing})
        data = pydicom.dcmread(path)
        assert [item.SegmentLabel for item in data.SegmentSequence] == ["Lungs", "Lesion"]
        segments = overlays(path, folder, scan, data.pixel_array)
        np.testing.assert_array_equal(segments[1], lungs)
        assert not segments[2].any()


def test_evidence_is_a_parametric_map_on_the_same_slices(tmp_path: pathlib.Path) -> None:
    folder = write_series(tmp_path / "s", ct((9, 10, 11)), tilt=8, reverse=True)
    scan = load_scan(folder)
    evidence = (scan.values - scan.values.min()) / np.ptp(scan.values)
    images = dicom_source.source_images(scan.files)
    made = dicom_objects.parametric_map(images, frames(evidence, scan), "evidence_1", 1003, DIGEST)
    made.save_as(tmp_path / "map.dcm")
    data, slices = pydicom.dcmread(tmp_path / "map.dcm"), slices_by_uid(folder)
    pixels = data.pixel_array
    mapping = data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert len(pixels) == 9
    for frame, groups in zip(pixels, data.PerFrameFunctionalGroupsSequence, strict=True):
        uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        values = slices[uid].pixel_array.astype(np.float64) - 1024
        expected = (values - scan.values.min()) / np.ptp(scan.values)
        shown = frame * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
        np.testing.assert_allclose(
            shown, expected, atol=1 / 131070 + 1e-6
        )  # half a step of 16 bits
        assert (
            groups.PlanePositionSequence[0].ImagePositionPatient == slices[uid].ImagePositionPatient
        )


def test_the_report_says_volumes_share_and_classes_of_the_segments(tmp_path: pathlib.Path) -> None:
    scan = load_scan(write_series(tmp_path / "s", ct((9, 10, 11))))
    images = dicom_source.source_images(scan.files)
    framed = {name: frames(mask, scan) for name, mask in masks_of(scan).items()}
    segmentation = dicom_objects.segmentation(images, framed, DIGEST)
    volumes, classes = {"lungs": 40.0, "lesion": 3.0}, {"COVID-19": 0.7, "CAP": 0.2, "none": 0.1}
    dicom_report.report(images, segmentation, volumes, classes, DIGEST).save_as(tmp_path / "sr.dcm")
    data = highdicom.sr.srread(tmp_path / "sr.dcm")
    groups = data.content.get_volumetric_roi_measurement_groups()
    said = {
        group.tracking_identifier: {
            m.name.meaning: float(m.value) for m in group.get_measurements()
        }
        for group in groups
    }
    assert said == {
        "lungs": {"Volume": 40.0},
        "lesion": {"Volume": 3.0, "Share of the lungs' volume": 7.5},
    }
    (of_scan,) = data.content.get_image_measurement_groups()
    assert {m.name.meaning: float(m.value) for m in of_scan.get_measurements()} == {
        "Probability of COVID-19": 0.7,
        "Probability of CAP": 0.2,
        "Probability of none": 0.1,
    }
    (answer,) = of_scan.get_qualitative_evaluations()
    assert (answer.name.meaning, answer.value.meaning) == ("Most probable class", "COVID-19")
    assert data.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    segments = [group.reference_type.meaning for group in groups]
    assert segments == ["Referenced Segment"] * 2
    evidence = data.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    uids = {item.SeriesInstanceUID for item in evidence}
    assert {SOP, segmentation.SeriesInstanceUID} == uids


def test_dcmqi_reads_segments_and_report(tmp_path: pathlib.Path) -> None:
    tools = {name: tool(name) for name in ("segimage2itkimage", "tid1500reader")}
    folder = write_series(tmp_path / "s", ct((9, 10, 11)), reverse=True)
    scan = load_scan(folder)
    masks = masks_of(scan)
    masks["lesion"][:] = scan.values > np.quantile(scan.values, 0.9)  # in each slice
    path = written(tmp_path, scan, masks)
    call = [tools["segimage2itkimage"], "--inputDICOM", path, "--outputDirectory", tmp_path]
    subprocess.run([*call, "-t", "nii"], check=True, capture_output=True)
    # As ITK has it: each voxel at its place in the patient, upwards or downwards.
    for number, name in enumerate(masks, 1):
        image = sitk.ReadImage(str(tmp_path / f"{number}.nii.gz"))
        theirs = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
        np.testing.assert_array_equal(theirs > 0, masks[name])
        np.testing.assert_allclose(
            sitk.DICOMOrient(image, "LPS").GetOrigin(), (-100, -150, 0), atol=1e-4
        )
    images = dicom_source.source_images(scan.files)
    made = dicom_report.report(
        images, pydicom.dcmread(path), {"lungs": 40.0, "lesion": 3.0}, {}, DIGEST
    )
    made.save_as(tmp_path / "sr.dcm")
    call = [tools["tid1500reader"], "--inputDICOM", tmp_path / "sr.dcm"]
    subprocess.run(
        [*call, "--outputMetadata", tmp_path / "sr.json"], check=True, capture_output=True
    )
    read = json.loads((tmp_path / "sr.json").read_text())["Measurements"]
    assert [group["measurementItems"][0]["value"] for group in read] == ["40.0", "3.0"]
    assert {group["SourceSeriesForImageSegmentation"] for group in read} == {SOP}


def tool(name: str) -> str:
    """A program of dcmqi, or a skip."""
    place = shutil.which(name, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(name)
    if place is None:
        pytest.skip(f"dcmqi's {name} is not installed")
    return place


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"FrameOfReferenceUID": ""}, "no FrameOfReferenceUID that is a UID"),
        ({"StudyInstanceUID": "SMITH"}, "no StudyInstanceUID that is a UID"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "no CT images"),
    ],
)
def test_slices_that_cannot_be_referred_to_are_said_without_their_texts(
    texts: dict[str, str], expected: str, tmp_path: pathlib.Path
) -> None:
    scan = load_scan(write_series(tmp_path / "s", ct((9, 10, 11)), texts=texts))
    with pytest.raises(InputError, match=expected) as refused:
        dicom_source.source_images(scan.files)
    assert "SMITH" not in str(refused.value)


def test_a_segmentation_of_a_real_series_overlays_it(tmp_path: pathlib.Path) -> None:
    folder = real("covid-ct-md", "P001_dicom")
    scan = load_scan(folder)
    masks = {"lungs": scan.values < -500, "lesion": (scan.values > -700) & (scan.values < -300)}
    path = written(tmp_path, scan, masks)
    data = pydicom.dcmread(path)
    pixels = data.pixel_array
    np.testing.assert_array_equal(pixels, sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0)
    names = ("lungs", "lesion")
    heights = {round(float(position), 3): index for index, position in enumerate(z_of(scan))}
    seen = 0
    for frame, groups in zip(pixels, data.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        z = round(float(groups.PlanePositionSequence[0].ImagePositionPatient[2]), 3)
        np.testing.assert_array_equal(frame > 0, masks[names[number - 1]][heights[z]])
        seen += 1
    assert seen == sum(int(mask.any(axis=(1, 2)).sum()) for mask in masks.values())


def z_of(scan: Scan) -> np.ndarray:
    """The height of each slice of a scan in canonical order, in mm, by its affine."""
    heights = scan.affine[2, 3] + scan.affine[2, 2] * np.arange(len(scan.values))
    return np.sort(heights)
