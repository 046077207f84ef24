"""What goes wrong with a scan costs that scan and is one line."""

import csv
import errno
import json
import os
import pathlib
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from chests import NETWORK, compute, write_chest

from deepsc_jax.data import scans
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference import requests, results
from deepsc_jax.inference.failures import explained
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import Outcome, attempt
from deepsc_jax.inference.workers import BatchInference
from deepsc_jax.predict import summary, twins, write_table
from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import InputError

NAMES = {
    "größe.nii".encode("latin-1"): r"gr\xf6\xdfe",
    "病人.nii".encode(): "病人",
    b"$_$.nii": "$_$",
    b"=cmd|' calc'!A0.nii": "'=cmd|' calc'!A0",
    b"\x1b[2J.nii": r"\x1b[2J",
    b"a\nb.nii": r"a\nb",
    b"-1.nii": "'-1",
}


def predict(folder: pathlib.Path, fails_with: BaseException | None = None) -> Outcome:
    def fails(volume: np.ndarray) -> Any:
        if fails_with is not None:
            raise fails_with
        return compute(volume)

    request = Request("ct", folder / "ct.nii", write_chest(folder / "ct.nii"))
    return attempt(request, folder / "out", NETWORK, fails, overwrite=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "No space left on device: /x/y"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error: check the disk"),
        (OSError("odd"), "odd: check the disk"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 GiB"),
            "device lacks memory",
        ),
        (InputError("a\nb"), r"a\nb"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_no_log(
    tmp_path: pathlib.Path, error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = predict(tmp_path, error)
    assert outcome.error is not None
    assert message in outcome.error
    assert len(outcome.error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def test_the_traceback_of_a_defect_goes_to_a_file_once(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {predict(tmp_path, ValueError(f"broken {i}\nhere")).error for i in range(3)}
    (log,) = (tmp_path / "out").iterdir()
    assert said == {
        f"{tmp_path}/ct.nii: ValueError: broken {i}\\nhere: an error of this program: please "
        f"report it with {log}"
        for i in range(3)
    }
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "raise fails_with" in text
    assert capsys.readouterr() == ("", "")
    log.write_text("a user's own")
    predict(tmp_path, ValueError("again"))
    assert log.read_text() == "a user's own"


def test_a_log_that_cannot_be_written_is_not_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    line = explained(ValueError("x"), tmp_path / "a.nii", tmp_path / "file")
    assert line.endswith("please report it")


def test_a_full_disk_leaves_nothing_behind_and_the_next_scan_is_predicted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = scans.save_like

    def full(array: np.ndarray, scan: scans.Scan, path: pathlib.Path, dtype: Any) -> None:
        save(array, scan, path, dtype)
        if path.name == "evidence_2.nii.gz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(results.scans, "save_like", full)
    outcome = predict(tmp_path)
    assert outcome.error is not None
    assert outcome.error.startswith(f"{tmp_path}/ct.nii: No space left on device: ")
    assert outcome.error.endswith("free some space, then start again")
    assert outcome.code == exit_codes.FILE_SYSTEM
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    assert predict(tmp_path).error is None


class Computes:
    network = NETWORK

    def __call__(self, volume: np.ndarray, /) -> Prediction:
        return compute(volume)


def test_scans_of_any_name_are_predicted_shown_and_tabulated(tmp_path: pathlib.Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    mask = None
    for seed, name in enumerate(NAMES):
        mask = write_chest(folder / os.fsdecode(name), seed=seed)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    assert mask is not None
    wanted = requests.of_paths(paths, [mask] * len(paths))
    batch = BatchInference(Computes(), out, workers=1, overwrite=False)
    outcomes = list(batch.outcomes(wanted))
    assert [outcome.error for outcome in outcomes] == [None] * len(NAMES)
    for outcome in outcomes:
        result = outcome.result
        assert result is not None
        assert result["scan"] == str(outcome.request.path)
        assert (out / outcome.request.name / "picture.png").stat().st_size > 0
    assert all(outcome.skipped for outcome in batch.outcomes(wanted))

    write_table(outcomes, out / "predictions.csv")
    content = (out / "predictions.csv").read_text("utf-8")
    assert len(content.splitlines()) == len(NAMES) + 1
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == set(NAMES.values())
    assert all(row["class"] in NETWORK.data.classes for row in rows)
    assert all(float(row["lesion_ml"]) >= 0 for row in rows)


def test_a_table_that_is_a_users_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    table = tmp_path / "predictions.csv"
    outcome = Outcome(Request("a", pathlib.Path("a.nii")), error="=1+1")
    write_table([outcome], table)
    write_table([outcome], table)
    assert table.read_text().splitlines()[1].endswith(",'=1+1")
    table.write_text("my remarks")
    with pytest.raises(InputError, match=r"predictions\.csv: was not written here"):
        write_table([outcome], table)
    assert table.read_text() == "my remarks"


def test_a_file_that_was_copied_is_named(tmp_path: pathlib.Path) -> None:
    outcomes = [
        Outcome(Request(name, pathlib.Path(f"{name}.nii")), {"sha256": content})
        for name, content in (("c", "1"), ("a", "1"), ("b", "2"), ("d", "1"), ("e", "2"))
    ]
    outcomes.append(Outcome(Request("f", pathlib.Path("f.nii")), error="unreadable"))
    assert twins(outcomes) == [
        "a.nii and c.nii, and 1 more, have the same content",
        "b.nii and e.nii have the same content",
    ]


def test_what_is_doubtful_is_refused_or_allowed_with_a_note(tmp_path: pathlib.Path) -> None:
    mask = write_chest(tmp_path / "ct.nii")
    image = nib.Nifti1Image.from_filename(mask)
    few = np.asarray(image.dataobj).copy()
    few[:, :, 4:] = 0
    few[:, 6:] = 0
    nib.Nifti1Image(few, image.affine, image.header).to_filename(mask)
    request = Request("ct", tmp_path / "ct.nii", mask)
    refused = attempt(request, tmp_path / "out", NETWORK, compute, overwrite=False)
    assert refused.result is None
    assert "--allow=lungs" in str(refused.error)
    batch = BatchInference(
        Computes(), tmp_path / "out", workers=0, overwrite=False, allow=["lungs"]
    )
    (allowed,) = batch.outcomes([request])
    assert allowed.result is not None, allowed.error
    assert any("its lungs have" in note for note in allowed.result["notes"])
    assert allowed.result == json.loads((tmp_path / "out" / "ct" / "result.json").read_text())
    write_table([allowed], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["notes"] == "; ".join(allowed.result["notes"])
    assert ", 1 with notes in 9 s" in summary([allowed], 1, seconds=9, busy=1)


def test_evidence_and_values_are_written_whether_or_not_there_are_classes(
    tmp_path: pathlib.Path,
) -> None:
    def regresses(volume: np.ndarray) -> Prediction:
        values = {"crp": np.float32(12.5), "ldh": float("nan")}
        return Prediction(evidence={"evidence_1": volume}, values=values)

    scan = tmp_path / "ct.nii"
    request = Request("ct", scan, write_chest(scan))
    outcome = attempt(request, tmp_path / "out", NETWORK, regresses, overwrite=False)
    assert outcome.error is None
    result = json.loads((tmp_path / "out" / "ct" / "result.json").read_text())
    assert result["values"] == {"crp": 12.5, "ldh": None}
    assert result["evidence_share_in_lung"] == pytest.approx([1], abs=0.2)
    assert "class" not in result
    assert (tmp_path / "out" / "ct" / "evidence_1.nii.gz").is_file()
