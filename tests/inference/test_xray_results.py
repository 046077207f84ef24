"""X-rays through prediction: which files are found, what a result holds, what is refused."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from deepsc_jax.config import DataConfig
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference import requests
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import Outcome, attempt
from deepsc_jax.inference.workers import BatchInference
from deepsc_jax.runtime.errors import InputError

DATA = DataConfig(
    modality="xray", mask="none", working_size=(32, 48), tile=(1, 32, 48), depth_bucket=1, slices=1
)
NETWORK = Network(DATA, "classification", 0.5, "X-rays", "digest", ("evidence_1",))
DICOM = b"\0" * 128 + b"DICM"


class Computes:
    """Stands in for a network: it looks at the right upper quarter."""

    network = NETWORK

    def __call__(self, volume: np.ndarray, /) -> Prediction:
        assert volume.shape == (1, 32, 48)
        heat = np.zeros(volume.shape, np.float32)
        heat[:, :16, :24] = 1
        classes = np.array([0.2, 0.7, 0.1], np.float32)
        return Prediction(classes=classes, evidence={"evidence_1": heat}, notes=("gate: closed",))


def save(path: pathlib.Path, seed: int = 0, shape: tuple[int, int] = (64, 96)) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(levels).save(path)
    return path


def predict(path: pathlib.Path, out: pathlib.Path, mask: pathlib.Path | None = None) -> Outcome:
    request = Request("image", path, mask)
    return attempt(request, out, NETWORK, Computes(), overwrite=False)


def test_pictures_and_dicom_files_below_a_folder_are_found_each(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "in"
    save(folder / "a.png")
    save(folder / "b" / "c.JPG")
    for name in ("d.dcm", "IM0001", "DICOMDIR"):
        (folder / name).write_bytes(DICOM)
    (folder / "scan.nii").write_bytes(b"a scan")
    (folder / "notes.txt").write_text("no image")
    found = requests.below(folder, tmp_path / "out", "xray")
    paths = {str(request.path.relative_to(folder)): request.name for request in found.requests}
    assert paths.keys() == {"IM0001", "a.png", "b/c.JPG", "d.dcm"}
    assert (paths["a.png"], paths["b/c.JPG"]) == ("a", "b/c")
    assert all(re.fullmatch("dicom-[0-9a-f]{16}", paths[name]) for name in ("IM0001", "d.dcm"))
    (note,) = found.notes
    assert "3 left out, not scans by name: DICOMDIR, notes.txt, scan.nii" in note
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no X-ray, a file of .* or DICOM, below"):
        requests.below(tmp_path / "empty", tmp_path / "out", "xray")


def test_a_result_has_the_class_and_what_was_looked_at(tmp_path: pathlib.Path) -> None:
    path = save(tmp_path / "a.png")
    outcome = predict(path, tmp_path / "out")
    assert outcome.error is None
    folder = tmp_path / "out" / "image"
    result = json.loads((folder / "result.json").read_text())
    assert sorted(result["files"]) == ["evidence_1.png", "picture.png"]
    assert result["class"] == "cap"
    assert result["probabilities"] == {"covid-19": 0.2, "cap": 0.7, "non-pneumonia": 0.1}
    assert result["notes"] == ["gate: closed"]
    assert (result["scan"], result["trained_on"]) == (str(path), "X-rays")
    assert not {"lung_ml", "lesion_ml", "evidence_share_in_lung"} & result.keys()
    # A quarter of the image, whose middle is at a quarter of its sides.
    np.testing.assert_allclose(result["salient_centres"], [[0.25, 0.25]], atol=0.01)
    with Image.open(folder / "evidence_1.png") as picture:
        colours = np.asarray(picture).astype(int)
    image = np.asarray(Image.open(path)).astype(int)
    assert colours.shape == (64, 96, 3)
    # Half of the image and half of jet: dark red for 1, dark blue for 0.
    low, high = image.min(), image.max()
    grey = 255 * (image - low) / (high - low)
    red, blue = np.array([127.5, 0, 0]), np.array([0, 0, 127.5])
    for place, colour in (((5, 5), red), ((60, 90), blue)):
        np.testing.assert_allclose(colours[place], (grey[place] + colour) / 2, atol=1)
    again = predict(path, tmp_path / "out")
    assert again.skipped


def test_workers_predict_the_same(tmp_path: pathlib.Path) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", i)
    wanted = requests.below(tmp_path / "in", tmp_path / "out", "xray").requests
    for workers in (0, 2):
        batch = BatchInference(
            Computes(), tmp_path / f"out-{workers}", workers=workers, overwrite=False
        )
        assert [outcome.error for outcome in batch.outcomes(wanted)] == [None] * 3
    alone, beside = (
        sorted(path.read_bytes() for path in (tmp_path / f"out-{workers}").rglob("*.png"))
        for workers in (0, 2)
    )
    assert alone == beside


def test_what_is_no_x_ray_is_one_line(tmp_path: pathlib.Path) -> None:
    grey = np.asarray(Image.open(save(tmp_path / "grey.png")))
    Image.fromarray(np.stack([grey, grey, 255 - grey], -1)).save(tmp_path / "colour.png")
    save(tmp_path / "small.png", shape=(8, 8))
    (tmp_path / "scan.nii.gz").write_bytes(b"a scan")
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "a.dcm").write_bytes(DICOM)
    said = {
        "colour.png": "is a colour image, an X-ray in grey expected",
        "small.png": "an image of 8×8 pixels, at least 16 a side expected",
        "scan.nii.gz": "a CT scan by its name, the file of an X-ray expected",
        "series": "a folder, the file of an X-ray expected (PNG, JPEG or DICOM): CT is for",
    }
    for name, text in said.items():
        error = predict(tmp_path / name, tmp_path / "out").error
        assert error is not None
        assert text in error
        assert "\n" not in error
    error = predict(tmp_path / "grey.png", tmp_path / "out", tmp_path / "grey.png").error
    assert "is an X-ray for a network that needs none: leave it out" in (error or "")
    assert not (tmp_path / "out").exists()


def test_an_x_ray_for_a_network_of_ct_is_one_line(tmp_path: pathlib.Path) -> None:
    network = dataclasses.replace(NETWORK, data=DataConfig())
    request = Request("image", save(tmp_path / "a.png"))
    error = attempt(request, tmp_path / "out", network, Computes(), overwrite=False).error
    assert "a picture by its name, a CT scan expected: X-rays are for a model and a" in str(error)
