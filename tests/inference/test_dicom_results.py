"""A DICOM series' result as DICOM lies where its NIfTI files lie."""

import dataclasses
import pathlib

import numpy as np
import pytest
from chests import NETWORK, compute
from dicom_files import overlays, write_series

from deepsc_jax.data import dicom_source
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.scans import Scan, load_mask, load_scan, save_like
from deepsc_jax.inference import requests
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.results import Compute, Outcome, attempt

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
pytest.importorskip("SimpleITK")

SERIES: dict[str, dict] = {
    "as it is": {},
    "reversed": {"reverse": True},
    "tilted by 8°": {"tilt": 8},
    "tilted by 8°, reversed": {"tilt": 8, "reverse": True},
}


def write_chest(folder: pathlib.Path, **options) -> tuple[pathlib.Path, pathlib.Path]:
    """A series of a box of lungs in a box of tissue, and its lung mask."""
    lung = np.zeros((16, 24, 24), bool)
    lung[2:14, 4:20, 3:21] = True
    lung[:, :, 11:13] = False
    noise = np.random.default_rng(0).normal(0, 30, lung.shape)
    hu = (np.where(lung, -850, 20) + noise).astype(np.int16)
    series = write_series(folder / "series", hu, spacing=(9, 9), step=8 / 2.5, **options)
    mask = folder / "lungs.nii.gz"
    save_like(lung, load_scan(series), mask, np.uint8)
    return series, mask


def predict(
    folder: pathlib.Path,
    series: pathlib.Path,
    masks: list[pathlib.Path],
    network: Network = NETWORK,
    answers: Compute = compute,
) -> tuple[Outcome, pathlib.Path]:
    (request,) = requests.of_paths([series], masks)
    outcome = attempt(
        request, folder / "out", network, answers, overwrite=False, allow=("lungs", "voxels")
    )
    assert outcome.error is None, outcome.error
    return outcome, folder / "out" / request.name


def segments(result: pathlib.Path, series: pathlib.Path, scan: Scan) -> dict[str, np.ndarray]:
    """The segments on the scan's grid, by their labels."""
    path = result / "segmentation.dcm"
    data = pydicom.dcmread(path)
    labels = {item.SegmentNumber: item.SegmentLabel for item in data.SegmentSequence}
    there = overlays(path, series, scan, data.pixel_array)
    return {labels[number]: segment for number, segment in there.items()}


def scattered(volume: np.ndarray) -> Prediction:
    """Lesions that no turn and no other order of slices leaves where they are."""
    return Prediction({"lesion": np.random.default_rng(1).random(volume.shape, np.float32)})


@pytest.mark.parametrize("kind", SERIES)
def test_the_segmentation_lies_where_the_lesion_mask_does(
    kind: str, tmp_path: pathlib.Path
) -> None:
    series, lungs = write_chest(tmp_path, **SERIES[kind])
    _, result = predict(tmp_path, series, [lungs], answers=scattered)
    scan = load_scan(series)
    mask = load_mask(result / "lesion_mask.nii.gz", scan)
    assert 0 < mask.sum() < load_mask(lungs, scan).sum()
    there = segments(result, series, scan)
    np.testing.assert_array_equal(there["Lesion"], mask)
    np.testing.assert_array_equal(there["Lungs"], load_mask(lungs, scan))


def test_a_network_that_finds_each_lung_has_a_segment_of_each(tmp_path: pathlib.Path) -> None:
    def finds(volume: np.ndarray) -> Prediction:
        left, right = np.zeros_like(volume), np.zeros_like(volume)
        left[..., : volume.shape[-1] // 2] = 1
        right[..., volume.shape[-1] // 2 :] = 1
        return Prediction({"lesion": 1 - volume, "left_lung": left, "right_lung": right})

    network = dataclasses.replace(NETWORK, volumes=("lesion", "left_lung", "right_lung"))
    series, lungs = write_chest(tmp_path)
    _, result = predict(tmp_path, series, [lungs], network, finds)
    scan = load_scan(series)
    there = segments(result, series, scan)
    assert there.keys() == {"Lungs", "Lesion", "Left lung", "Right lung"}
    for label, name in (("Left lung", "left_lung"), ("Right lung", "right_lung")):
        np.testing.assert_array_equal(there[label], load_mask(result / f"{name}.nii.gz", scan))


def test_what_cannot_be_written_as_dicom_is_a_note_and_costs_nothing_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series, lungs = write_chest(tmp_path, texts={"FrameOfReferenceUID": ""})
    outcome, result = predict(tmp_path, series, [lungs])
    assert outcome.result is not None
    assert (
        "no DICOM objects: its slices have no FrameOfReferenceUID that is a UID"
        in (outcome.result["notes"])
    )
    assert (result / "lesion_mask.nii.gz").is_file()
    assert not list(result.glob("*.dcm"))

    monkeypatch.setattr(dicom_source, "installed", lambda: False)
    series, lungs = write_chest(tmp_path)
    outcome, result = predict(tmp_path / "again", series, [lungs])
    assert outcome.result is not None
    (note,) = [note for note in outcome.result["notes"] if "no DICOM objects" in note]
    assert "pip install 'deepsc_jax[dicom]'" in note
    assert not list(result.glob("*.dcm"))
