"""Texts of DICOM tags, and names of folders and files, get into nothing that is written or said."""

import csv
import gzip
import pathlib
import signal
import stat
import types
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from chests import NETWORK, compute
from dicom_files import write_series

from deepsc_jax import predict
from deepsc_jax.config import DataConfig
from deepsc_jax.data import dicom_objects, preparation
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.scans import load_scan
from deepsc_jax.inference import ensemble, identifiers, privacy, requests, results, writing
from deepsc_jax.inference.identity import read_result
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.pages import addresses
from deepsc_jax.inference.results import attempt
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.report.viewer import Viewer

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
pytest.importorskip("SimpleITK")

TEXTS = [f"ZQ{index:02}SMITHJOHN" for index in range(20)]
DATES = [f"1931{month:02}{day:02}" for month, day in zip(range(1, 11), range(17, 27), strict=True)]
PLANTED = [*TEXTS, *DATES]
PATHS = ["DOEJANE", "ROEMARY", "LUNGSOFDOE"]
"""In names of folders and files."""
DATE_KINDS = ("DA", "DT")
TEXT_KINDS = ("AE", "AS", "CS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT")
READING = {
    "Modality",  # else it is no CT
    "ImageType",  # planted below, behind the words that are read
    "PhotometricInterpretation",  # the following say how pixels are stored
    "SpecificCharacterSet",
    "PixelPresentation",
}


class Computes:
    """Stands in for a trained network."""

    network = NETWORK

    def __call__(self, volume: np.ndarray, /) -> Prediction:
        return compute(volume)


def planted() -> dict[str, str]:
    """Each keyword of a text, a name or a date, and one of the strings."""
    words: dict[str, str] = {}
    for tag, (kind, many, _, _, keyword) in sorted(pydicom.datadict.DicomDictionary.items()):
        usual = 0x0008 <= tag >> 16 < 0x7FE0  # a data set's, and no command's
        if not (usual and keyword and keyword not in READING and many in ("1", "1-n")):
            continue
        if kind in TEXT_KINDS:
            words[keyword] = TEXTS[len(words) % len(TEXTS)]
        elif kind in DATE_KINDS:
            words[keyword] = DATES[len(words) % len(DATES)]
    return words


def plant(folder: pathlib.Path) -> None:
    """Put a string into every text of every file: nested, private and behind other words too."""
    words = planted()
    assert set(words.values()) == set(PLANTED)
    with pydicom.config.disable_value_validation():
        extra, nested = pydicom.Dataset(), pydicom.Dataset()
        for keyword, text in words.items():
            setattr(extra, keyword, text)
        nested.PatientID, nested.ScheduledProcedureStepDescription = TEXTS[:2]
        extra.OtherPatientIDsSequence = extra.RequestAttributesSequence = [nested]
        extra.private_block(0x0011, "MAKER", create=True).add_new(0x10, "LO", TEXTS[2])
        extra.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", TEXTS[3]]
        for file in folder.iterdir():
            data = pydicom.dcmread(file)
            data.update(extra)
            data.save_as(file, enforce_file_format=True)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Exports: a good series beside another modality's, and one with a slice missing."""
    folder = tmp_path_factory.mktemp("made")
    (case,) = write_phantoms((0, 0, 1), folder, seed=0, size=48, workers=1)
    scan = load_scan(case.scan)
    depth_mm, height_mm, width_mm = scan.spacing_mm
    there = folder / "export"
    hu, step = np.round(scan.values).astype(np.int16), depth_mm / 2.5
    for name, values in (("DOEJANE", hu), ("ROEMARY", hu[:9])):
        series = there / name / "1"
        write_series(series, values, spacing=(height_mm, width_mm), step=step)
        plant(series)
        for file in list(series.iterdir()):
            file.rename(file.with_name(f"{name}{file.name}"))
    others = write_series(folder / "others", np.zeros((2, 9, 9), np.int16), uid="1.2.3.5")
    plant(others)
    for file in others.iterdir():
        data = pydicom.dcmread(file)
        with pydicom.config.disable_value_validation():
            data.Modality = TEXTS[4]
            data.save_as(there / "DOEJANE" / "1" / f"DOEJANE-PT-{file.name}")
    (there / "DOEJANE" / "1" / "DOEJANE.txt").write_text(f"letter on {TEXTS[5]}")
    sorted((there / "ROEMARY" / "1").iterdir())[4].unlink()
    return there


def found(folder: pathlib.Path, strings: list[str]) -> list[tuple[str, str]]:
    """Where below a folder a string is: in a name, in bytes, in what they unpack to."""
    hits = []
    for path in sorted(folder.rglob("*")):
        contents = [str(path.relative_to(folder)).encode()]
        if path.is_file():
            content = path.read_bytes()
            contents.append(content)
            if path.suffix == ".gz":
                contents.append(gzip.decompress(content))
            if path.suffix == ".png":
                contents += unpacked(content)
        for string in strings:
            for spelling in (string.encode(), string.encode("utf-16-le")):
                if any(spelling.lower() in content.lower() for content in contents):
                    hits.append((path.name, string))
    return hits


def unpacked(png: bytes) -> list[bytes]:
    """The compressed texts of a PNG file."""
    texts, place = [], 8
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        if kind in (b"zTXt", b"iTXt"):
            texts.append(zlib.decompress(data.split(b"\0", 2)[-1]))
        place += 12 + length
    return texts


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What pictures and pages are titled, whose letters are pixels."""
    seen: list[str] = []
    picture = writing.scan_picture

    def noting(*arguments, title: str, **options):
        seen.append(title)
        return picture(*arguments, title=title, **options)

    monkeypatch.setattr(writing, "scan_picture", noting)
    monkeypatch.setattr(
        results, "installed", lambda: Viewer("globalThis.N = class {};\n", "a licence", "a viewer")
    )
    before = signal.getsignal(signal.SIGTERM)
    yield seen
    signal.signal(signal.SIGTERM, before)


def run(
    monkeypatch: pytest.MonkeyPatch, out: pathlib.Path, *, keep: bool = False, **options: object
) -> int:
    """The command, with a stand-in for the network."""
    values: dict[str, object] = {
        "scan": [],
        "scans": None,
        "share": None,
        "lung_mask": [],
        "lesion_mask": [],
        "boxes": [],
        "out": str(out),
        "overwrite": False,
        "allow": ["lungs", "voxels"],
        "workers": 0,
        "conv_form": "auto",
        "checkpoint": [str(out / "none")],
        "stage": None,
        "keep_identifiers": keep,
    }
    monkeypatch.setattr(predict.flags, "FLAGS", types.SimpleNamespace(**(values | options)))
    monkeypatch.setattr(predict, "from_flags", lambda: None)
    monkeypatch.setattr(ensemble, "load", lambda *_: Computes())
    return predict.main()


def test_no_planted_text_is_in_anything_that_is_written_or_said(
    export: pathlib.Path,
    titles: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(set(PLANTED)) == 30
    assert len(found(export, TEXTS)) > 30 * 20  # so what is looked for can be found
    assert run(monkeypatch, tmp_path, scans=str(export)) == 1  # a slice is missing of one
    said = "".join([*capfd.readouterr(), caplog.text])
    (result,) = [path.parent for path in tmp_path.rglob("result.json")]
    names = {path.name for path in result.iterdir()}
    assert {"segmentation.dcm", "report.dcm", "evidence_1.dcm", "picture.png"} <= names
    assert "report.html" in names
    assert "slices lie" in said  # the line about the other is there
    assert (tmp_path / "predictions.csv").is_file()
    assert found(tmp_path, [*PLANTED, *PATHS]) == []
    assert [text for text in [*PLANTED, *PATHS] if text in said] == []
    assert titles == [result.name]
    document = read_result(result)
    assert document is not None
    assert document["scan"].startswith("dicom-")
    scans = {"c1": export / "DOEJANE" / "1", "c2": export / "ROEMARY" / "1"}
    assert addresses(tmp_path, scans, tmp_path) == {"c1": f"{result.name}/report.html"}
    assert any("is read; left out: 2 slices of another modality" in n for n in document["notes"])


def test_objects_have_uids_and_a_blank_patient_module(
    export: pathlib.Path, titles: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    assert run(monkeypatch, tmp_path, scan=[str(export / "DOEJANE" / "1")]) == 0
    source = pydicom.dcmread(export / "DOEJANE" / "1" / "DOEJANEIM0000", stop_before_pixels=True)
    made = sorted(tmp_path.rglob("*.dcm"))
    assert len(made) == 5
    for path in made:
        data = pydicom.dcmread(path)
        assert data.StudyInstanceUID == source.StudyInstanceUID
        for word in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"):
            assert str(data[word].value or "") == ""
        for word in ("AccessionNumber", "StudyID", "StudyDate", "ReferringPhysicianName"):
            assert str(data[word].value or "") == ""
    assert not list(tmp_path.rglob("identifiers*"))


def test_keep_identifiers_copies_the_patient_module_and_writes_a_map(
    tmp_path: pathlib.Path, titles: list[str], monkeypatch: pytest.MonkeyPatch, export: pathlib.Path
) -> None:
    series, out = tmp_path / "DOEJANE", tmp_path / "out"
    series.mkdir()
    words = {
        "PatientName": "Döe^Jane",
        "PatientID": "4711",
        "PatientBirthDate": "19310117",
        "PatientSex": "F",
        "InstitutionName": TEXTS[0],
        "StudyDescription": TEXTS[1],
    }
    for file in (export / "DOEJANE" / "1").glob("DOEJANEIM*"):
        data = pydicom.dcmread(file)
        for word in planted():
            delattr(data, word)
        data.SpecificCharacterSet = "ISO_IR 100"
        for word, text in words.items():
            setattr(data, word, text)
        data.save_as(series / file.name)
    assert run(monkeypatch, out, scan=[str(series)], keep=True) == 0
    made = sorted(out.rglob("*.dcm"))
    assert len(made) == 5
    for path in made:
        data = pydicom.dcmread(path)
        assert [str(data[word].value) for word in list(words)[:4]] == list(words.values())[:4]
    assert found(out, [TEXTS[0], TEXTS[1]]) == []  # of the patient module, and no other
    (name,) = [path.name for path in out.iterdir() if path.is_dir()]
    local_map = out / "identifiers.csv"
    assert stat.S_IMODE(local_map.stat().st_mode) == 0o600
    with local_map.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "name": name,
        "scan": str(series),
        "PatientName": "Döe^Jane",
        "PatientID": "4711",
    }
    # Only the objects and the map say who it is.
    said = found(out, ["4711", "DOEJANE"])
    assert {file for file, _ in said} <= {path.name for path in made} | {"identifiers.csv"}

    before = {path: path.read_bytes() for path in made}
    assert run(monkeypatch, out, scan=[str(series)], keep=True) == 0  # there is nothing to do
    assert {path: path.read_bytes() for path in made} == before
    assert run(monkeypatch, out, scan=[str(series)]) == 0  # without them it is another result
    assert all(str(pydicom.dcmread(path).PatientID or "") == "" for path in made)


def test_the_map_keeps_the_rows_of_earlier_runs(
    export: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    both = requests.below(export, tmp_path / "out").requests
    for request in both:
        identifiers.write_map([request], tmp_path / "identifiers.csv")
    with (tmp_path / "identifiers.csv").open(encoding="utf-8") as file:
        rows = {row["name"]: row["scan"] for row in csv.DictReader(file)}
    assert rows == {request.name: str(request.path) for request in both}


def test_an_error_of_a_library_is_told_without_its_words(
    export: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def quotes(*_: object) -> None:
        raise ValueError(f"Value {TEXTS[7]} is not valid in {export / PATHS[0] / '1'}")

    monkeypatch.setattr(dicom_objects, "segmentation", quotes)
    (request,) = requests.of_paths([export / PATHS[0] / "1"], [])
    outcome = attempt(
        request, tmp_path, NETWORK, compute, overwrite=False, allow=("lungs", "voxels")
    )
    assert outcome.error is not None
    assert outcome.error.startswith(f"{request.name}: RuntimeError: ValueError, whose words")
    (log,) = tmp_path.glob("error-*.log")
    assert "in quotes" in log.read_text()  # where it was is told
    assert found(tmp_path, [*PLANTED, *PATHS]) == []
    assert [text for text in [*PLANTED, *PATHS] if text in outcome.error] == []


def test_paths_and_names_of_files_are_taken_out_of_a_text(tmp_path: pathlib.Path) -> None:
    series = tmp_path / "DOEJANE"
    series.mkdir()
    for name in ("1", "DOEJANE-1.dcm", "IM"):
        (series / name).write_bytes(b"")
    text = f"{series}: {series}/DOEJANE-1.dcm and 1 of 9 slices (DOEJANE-1.dcm), {tmp_path}/L.nii"
    mask = tmp_path / "L.nii"
    assert (
        privacy.without_names(text, "dicom-0", series, {"its lung mask": mask})
        == "dicom-0: dicom-0 (file 2) and 1 of 9 slices (file 2), its lung mask"
    )


def test_a_store_of_dicom_has_no_planted_text(
    export: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(working_size=(48, 48), tile=(8, 24, 24), depth_bucket=8)
    case = Case("c1", "p1", "train", data.lesion_free_id, export / "DOEJANE" / "1")
    assert preparation.prepare([case], tmp_path / "data", data, workers=1) == []
    assert list((tmp_path / "data").rglob("index.json")) or any((tmp_path / "data").iterdir())
    said = "".join(capfd.readouterr())
    assert found(tmp_path / "data", PLANTED) == []
    assert [text for text in PLANTED if text in said] == []


def test_an_xray_of_dicom_is_named_by_a_hash_as_well(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(
        modality="xray",
        mask="none",
        working_size=(32, 48),
        tile=(1, 32, 48),
        depth_bucket=1,
        slices=1,
    )
    network = Network(data, "classification", 0.5, "X-rays", "digest", ("evidence_1",))
    levels = np.random.default_rng(0).integers(0, 255, (1, 64, 96)).astype(np.int16)
    folder = write_series(tmp_path / "DOEJANE", levels, modality="DX", texts=planted())
    (folder / "IM0000").rename(folder / "ROEMARY")
    titles = []
    drawn = results.xray_picture.xray_picture
    monkeypatch.setattr(
        results.xray_picture,
        "xray_picture",
        lambda *arguments, title, **options: (
            titles.append(title) or drawn(*arguments, title=title, **options)
        ),
    )
    (request,) = requests.below(folder, tmp_path / "out", "xray").requests
    answer = Prediction(
        classes=np.array([0.2, 0.7, 0.1], np.float32),
        evidence={"evidence_1": np.ones((1, 32, 48), np.float32)},
    )
    outcome = attempt(request, tmp_path / "out", network, lambda _: answer, overwrite=False)
    assert outcome.error is None, outcome.error
    assert titles == [request.name]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [request.name]
    assert found(tmp_path / "out", [*PLANTED, *PATHS]) == []
