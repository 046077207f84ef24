"""Pages of scans: written with a result, and found by the scan that a result is of."""

import json
import os
import pathlib

import pytest
from chests import NETWORK, compute, write_chest

from deepsc_jax.inference import results
from deepsc_jax.inference.pages import addresses
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import attempt
from deepsc_jax.predict import without_page
from deepsc_jax.report.viewer import Viewer

VIEWER = Viewer("globalThis.Niivue = class {};\n", "a licence", "a viewer")


@pytest.fixture
def viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "installed", lambda: VIEWER)


def predict(folder: pathlib.Path, name: str = "ct", *, overwrite: bool = False) -> results.Outcome:
    scan = folder / f"{name}.nii"
    lungs = folder / "lungs" / "lungs.nii.gz"
    if not scan.exists():
        write_chest(scan)
    request = Request(name, scan, lungs)
    return attempt(request, folder / "out", NETWORK, compute, overwrite=overwrite)


def test_a_page_is_one_of_the_results_files_and_stays_where_it_was_changed(
    viewer: None, tmp_path: pathlib.Path
) -> None:
    made = predict(tmp_path)
    assert made.result is not None, made.error
    page = tmp_path / "out" / "ct" / "report.html"
    assert made.result["files"]["report.html"]["size"] == page.stat().st_size
    assert without_page([made]) == []
    page.write_text("a user's own")
    refused = predict(tmp_path, overwrite=True)
    assert refused.error is not None
    assert "report.html: has changed since it was written" in refused.error
    assert page.read_text("utf-8") == "a user's own"


def test_without_the_viewer_a_result_has_its_picture_and_a_line_says_how_to_get_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(results, "installed", lambda: None)
    monkeypatch.setattr("deepsc_jax.predict.installed", lambda: None)
    made = predict(tmp_path)
    assert made.result is not None
    assert {"picture.png"} <= made.result["files"].keys()
    assert "report.html" not in made.result["files"]
    (line,) = without_page([made])
    assert "pip install 'deepsc_jax[report]'" in line
    assert line.endswith("--overwrite")
    monkeypatch.setattr(results, "installed", lambda: VIEWER)
    again = predict(tmp_path, overwrite=True)
    assert again.result is not None
    assert "report.html" in again.result["files"]


def test_a_scan_named_as_a_script_does_nothing(viewer: None, tmp_path: pathlib.Path) -> None:
    made = predict(tmp_path, "<script>alert(1)<script>")
    assert made.result is not None, made.error
    page = (tmp_path / "out" / made.request.name / "report.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "<h1>&lt;script&gt;alert(1)&lt;script&gt;</h1>" in page


def test_pages_are_found_by_the_scan_and_not_by_a_name(
    viewer: None, tmp_path: pathlib.Path
) -> None:
    for name in ("a b", "c"):
        assert predict(tmp_path, name).result is not None
    os.symlink(tmp_path / "a b.nii", tmp_path / "link.nii")
    scans = {"one": tmp_path / "link.nii", "c": tmp_path / "other" / "c.nii"}
    found = addresses(tmp_path / "out", scans, tmp_path / "evaluation")
    assert found == {"one": "../out/a%20b/report.html"}
    (tmp_path / "out" / "a b" / "report.html").unlink()
    assert addresses(tmp_path / "out", scans, tmp_path / "evaluation") == {}
    result = json.loads((tmp_path / "out" / "c" / "result.json").read_text("utf-8"))
    assert result["scan"].endswith("c.nii")
