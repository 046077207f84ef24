"""The page of an evaluation, without a browser."""

import pathlib
from typing import Any

import pytest
from pages import HOSTILE, Parsed

from deepsc_jax.metrics.intervals import Resampling
from deepsc_jax.metrics.paired import HEAD, paired
from deepsc_jax.metrics.scan_figures import SEGMENTATION
from deepsc_jax.metrics.summary import summarise
from deepsc_jax.report.evaluation_page import badness, evaluation_page
from deepsc_jax.runtime.errors import InputError

CLASSES = ("covid-19", "cap", "non-pneumonia")


def row(
    case: str, label: str, given: str, dsc: float | None, false_ml: float = 0
) -> dict[str, Any]:
    figures = dict.fromkeys(SEGMENTATION)
    return {
        "case": case,
        "label": label,
        **figures,
        "dsc": dsc,
        "has_lesion": dsc is not None,
        "missed": dsc == 0,
        "single_lesions": {"truth_ml": [], "iou": [], "unpaired_ml": []},
        "lesion_ml": 10.0 if dsc is not None else 0.0,
        "predicted_ml": 5.0,
        "false_positive_ml": false_ml,
        "probabilities": {name: 0.8 if name == given else 0.1 for name in CLASSES},
    }


ROWS = [
    row("good", "cap", "cap", 0.9),
    row("clean", "non-pneumonia", "non-pneumonia", None, 0.5),
    row("marked", "non-pneumonia", "non-pneumonia", None, 20.0),
    row("poor", "covid-19", "covid-19", 0.2),
    row("wrong", "covid-19", "cap", 0.95),
]


def metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return summarise(rows, CLASSES, resampling=Resampling(resamples=5)) | {
        "trained_on": "phantoms",
        "evaluated_on": "phantoms",
    }


def test_the_worst_scans_come_first() -> None:
    order = [each["case"] for each in sorted(ROWS, key=badness)]
    assert order == ["wrong", "poor", "good", "marked", "clean"]


def test_the_page_has_every_scan_the_curves_and_links_where_there_are_pages(
    tmp_path: pathlib.Path,
) -> None:
    links = {"poor": "../p%20q/report.html"}
    evaluation_page(tmp_path / "report.html", metrics(ROWS), ROWS, links, title="Test")
    page = Parsed((tmp_path / "report.html").read_text("utf-8"))
    assert [a["href"] for t, a in page.tags if t == "a"] == ["../p%20q/report.html"]
    start = page.texts.index("Scan")
    names = [text for text in page.texts[start:] if text in {each["case"] for each in ROWS}]
    assert names == ["wrong", "poor", "good", "marked", "clean"]
    pictures = [a for t, a in page.tags if t == "img"]
    assert len(pictures) == 4
    assert all((a["src"] or "").startswith("data:image/svg+xml;base64,") for a in pictures)
    assert all(a["alt"] for a in pictures)
    assert page.texts.count("✗ wrong") == 1


def test_a_network_of_lesions_alone_has_a_page_without_classes(tmp_path: pathlib.Path) -> None:
    rows = [{k: v for k, v in each.items() if k != "probabilities"} for each in ROWS]
    figures = summarise(rows, resampling=Resampling(resamples=5)) | {
        "trained_on": "scans",
        "evaluated_on": "scans",
    }
    evaluation_page(tmp_path / "report.html", figures, rows, {}, title="Test")
    page = Parsed((tmp_path / "report.html").read_text("utf-8"))
    assert len([t for t, _ in page.tags if t == "img"]) == 1
    assert "Confusion" not in page.texts
    assert "Given" not in page.texts


def test_a_comparison_has_a_table(tmp_path: pathlib.Path) -> None:
    names, few = [each["case"] for each in ROWS], Resampling(resamples=5)
    against = {"name": HOSTILE, "other": {}, **paired(ROWS, ROWS, names, CLASSES, few)}
    evaluation_page(
        tmp_path / "report.html", metrics(ROWS) | {"against": against}, ROWS, {}, title="T"
    )
    page = Parsed((tmp_path / "report.html").read_text("utf-8"))
    assert [a for t, a in page.tags if t == "table" and a.get("id") == "against"]
    assert set(HEAD) <= set(page.texts)
    assert {"paired bootstrap", "exact McNemar"} <= set(page.texts)
    assert len(page.scripts) == 1


def test_names_neither_run_nor_lead_anywhere(tmp_path: pathlib.Path) -> None:
    rows = [*ROWS[1:], ROWS[0] | {"case": HOSTILE}]
    evaluation_page(tmp_path / "report.html", metrics(rows), rows, {}, title=HOSTILE)
    page = Parsed((tmp_path / "report.html").read_text("utf-8"))
    assert len(page.scripts) == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)


def test_a_page_that_was_changed_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.html"
    for _ in range(2):  # one of ours is replaced
        evaluation_page(path, metrics(ROWS), ROWS, {}, title="Test")
    path.write_text("mine")
    with pytest.raises(InputError, match="not overwritten"):
        evaluation_page(path, metrics(ROWS), ROWS, {}, title="Test")
    assert path.read_text("utf-8") == "mine"
