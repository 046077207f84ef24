"""Phantoms through NIfTI, `prepare` and a store: what `analyze` measures and writes of them."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import handful
import numpy as np
import pytest

from deepsc_jax.config import DataConfig
from deepsc_jax.data import preparation
from deepsc_jax.data.records import Contents
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.analysis import MeasuredScan, Options, cohorts, document, measured
from deepsc_jax.metrics.cohort import FIGURES
from deepsc_jax.metrics.findings import scan_findings
from deepsc_jax.phantoms.lesions import make_phantom
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Six phantoms, two of each class, in two splits."""
    folder = tmp_path_factory.mktemp("data")
    cases = write_phantoms((0, 3, 3), folder, seed=0, size=48, workers=1)
    contents = Contents(phantoms=True)
    assert (
        preparation.prepare(cases, folder, handful.CONFIG.data, workers=1, contents=contents) == []
    )
    return folder


def analyze(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepsc_jax.analyze", "--workers=1", "--resamples=20"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        check=False,
    )


def test_the_command_writes_figures_a_row_a_scan_and_a_page(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = analyze(f"--data_dir={data}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "lesions a scan" in done.stdout
    assert "non-pneumonia: 2 scans without a lesion" in done.stdout
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert [found["classes"][name]["scans"] for name in found["classes"]] == [2, 2, 0]
    assert len(found["comparisons"]) == len(FIGURES)
    assert found["analysed"] == "phantoms"
    rows = list(csv.DictReader((tmp_path / "lesions.csv").open()))
    assert [row["class"] for row in rows] == ["covid-19", "cap", "non-pneumonia"] * 2
    for name, of_class in found["classes"].items():
        counts = [int(row["lesions"]) for row in rows if row["class"] == name]
        if of_class["scans"]:
            assert of_class["figures"]["count"]["value"] == np.mean(counts)
        else:
            assert counts == [0, 0]
    assert rows[2]["plr_10_mm"] == ""  # without a lesion there is no ratio
    page = (tmp_path / "analysis.html").read_text("utf-8")
    assert page.count('<img src="data:image/svg+xml;base64,') == 6
    assert all(f">{number}<" in page for number in ("0.143", "0.044", "86.0", "15.6"))
    assert "://" not in page
    (tmp_path / "lesions.csv").write_text("mine")
    done = analyze(f"--data_dir={data}", f"--out={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "lesions.csv" in done.stderr
    assert "not overwritten" in done.stderr


def test_what_is_measured_is_the_phantom(data: pathlib.Path) -> None:
    rows, failures = measured(Store(data / "store"), Options(split="validation"))
    assert (len(rows), failures) == (3, [])
    phantom = make_phantom(1, 0, size=48)  # seed 0 of the validation split
    lesion, lung = phantom.lesion_mask, phantom.lung_mask
    direct = scan_findings(lesion, lung, phantom.hu.astype(float), phantom.spacing_mm)
    found = rows[0].findings
    assert found.count == direct.count
    assert found.lesion_ml == pytest.approx(direct.lesion_ml)
    np.testing.assert_allclose(found.sizes_mm, direct.sizes_mm, rtol=1e-5)
    assert found.hu_ml is not None
    assert direct.hu_ml is not None
    np.testing.assert_allclose(found.hu_ml, direct.hu_ml)


def test_a_source_that_is_gone_is_named_and_the_others_are_done(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    scan = data / "scans" / "phantom-test-0001.nii.gz"
    scan.rename(tmp_path / "away")
    try:
        rows, failures = measured(Store(data / "store"), Options())
    finally:
        (tmp_path / "away").rename(scan)
    assert len(rows) == 5
    (line,) = failures
    assert "phantom-test-0001: its scan" in line
    assert "is gone" in line


def test_what_cannot_be_analysed_is_refused(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    store = Store(data / "store")
    with pytest.raises(InputError, match="no scan of split train has a known lesion"):
        measured(store, Options(split="train"))
    store.data = DataConfig(
        modality="xray", mask="none", slices=1, tile=(1, 64, 64), depth_bucket=1
    )
    with pytest.raises(InputError, match="made with --modality=xray: whole CT scans"):
        measured(store, Options())


def phantoms(count: int, size: int) -> list[MeasuredScan]:
    """Phantoms of COVID-19 and CAP, measured without files."""
    rows = []
    for index in (i for i in range(3 * count) if i % 3 < 2):
        made = make_phantom(0, index, size)
        found = scan_findings(made.lesion_mask, made.lung_mask, made.hu, made.spacing_mm)
        rows.append(
            MeasuredScan(str(index), str(index), "test", ("covid-19", "cap")[index % 3], found)
        )
    return rows


def require_signs(rows: list[MeasuredScan], store: Store, level: float) -> None:
    """Every difference has the paper's sign, and those of all scans are no chance."""
    found = document(store, rows, Options())
    by_figure = {row["figure"]: row for row in found["comparisons"]}
    signed = {key for key, figure in FIGURES.items() if figure.sign}
    for key in signed:
        if by_figure[key]["difference"] is not None:  # few have an LVR from 0.04 to 0.06
            assert by_figure[key]["as_in_paper"], by_figure[key]
    for key in ("count", "lvr", "dense", "spread", "plr"):
        assert by_figure[key]["p_holm"] < level, by_figure[key]
    peaks = [len(found["classes"][name]["hu_peaks"]) for name in ("covid-19", "cap")]
    assert peaks == [1, 2]


@pytest.mark.slow
def test_thirty_phantoms_a_class_have_the_signs_of_the_papers_findings(data: pathlib.Path) -> None:
    require_signs(phantoms(30, 64), Store(data / "store"), 0.05)


@pytest.mark.slow
def test_two_hundred_phantoms_a_class_have_the_papers_numbers(
    tmp_path: pathlib.Path,
) -> None:
    """Through NIfTI, `prepare` and a store, within the tolerances of the phantoms' own table."""
    cases = write_phantoms((0, 0, 600), tmp_path, seed=0, size=96, workers=2)
    data, contents = handful.CONFIG.data, Contents(phantoms=True)
    assert preparation.prepare(cases, tmp_path, data, workers=2, contents=contents) == []
    store = Store(tmp_path / "store")
    rows, failures = measured(store, Options(), workers=2)
    assert failures == []
    require_signs(rows, store, 0.02)
    covid, cap = cohorts(rows, store.data.classes).values()
    assert covid.counts.mean() == pytest.approx(4.4, abs=0.15)
    assert cap.counts.mean() == pytest.approx(1.7, abs=0.08)
    # Half of the lung masks are found ones, which differ from those that lesions were drawn for.
    assert covid.lvr.mean() == pytest.approx(0.143, abs=0.008)
    assert cap.lvr.mean() == pytest.approx(0.044, abs=0.006)
    plr = {name: FIGURES["plr"].of(one, one.every) for name, one in (("a", covid), ("b", cap))}
    assert plr["a"] == pytest.approx(0.624, abs=0.04)
    assert plr["b"] == pytest.approx(0.245, abs=0.04)
    assert FIGURES["glass"].of(covid, covid.every) > 0.7
    assert FIGURES["cap_bands"].of(cap, cap.every) > 0.75
