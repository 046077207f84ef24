"""From scans to metrics.json and the printed table."""

import json

import numpy as np
import pytest

from deepsc_jax.metrics import per_scan, summarise, table

SPACING = (2.0, 1.0, 1.0)


@pytest.fixture
def scan():
    """(truth, lung): a 2x2x2 lesion in a 4x6x6 lung in an 8x8x8 scan."""
    truth, lung = np.zeros((2, 8, 8, 8), bool)
    lung[2:6, 1:7, 1:7] = True
    truth[3:5, 3:5, 3:5] = True
    return truth, lung


def row(label, dsc, *, missed=False):
    figures = {"specificity": 0.9, "specificity_scan": 0.99, "false_positive_ml": 0.5}
    of_lesion = {"dsc": dsc, "sensitivity": dsc, "nsd": dsc, "rmsd_mm": None if missed else 2.0}
    return {"label": label, "has_lesion": True, "missed": missed, **figures, **of_lesion}


def free(false_positive_ml):
    of_lesion = dict.fromkeys(("dsc", "sensitivity", "nsd", "rmsd_mm"))
    figures = {"specificity": 0.95, "specificity_scan": 0.99}
    flags = {"label": "non-pneumonia", "has_lesion": False, "missed": False}
    return flags | of_lesion | figures | {"false_positive_ml": false_positive_ml}


def test_a_scan_by_hand(scan):
    truth, lung = scan
    pred = truth.copy()
    pred[2] = pred[3]  # one slice of four voxels too many, inside the lung
    figures = per_scan(pred, truth, lung, SPACING)
    assert figures["dsc"] == pytest.approx(2 * 8 / (12 + 8))
    assert figures["sensitivity"] == 1
    assert figures["specificity"] == pytest.approx((136 - 4) / 136)
    assert figures["specificity_scan"] == pytest.approx((504 - 4) / 504)
    assert figures["nsd"] == 1  # one slice of 2 mm is within 3 mm
    assert figures["lesion_ml"] == pytest.approx(0.016)
    assert figures["predicted_ml"] == pytest.approx(0.024)
    assert figures["false_positive_ml"] == pytest.approx(0.008)
    # of 12 and 8 border voxels, the 4 of the extra slice are 2 mm away
    assert figures["rmsd_mm"] == pytest.approx((4 * 2.0**2 / 20) ** 0.5)
    assert (figures["has_lesion"], figures["missed"]) == (True, False)


def test_a_missed_lesion_counts_zero_and_has_no_distance(scan):
    truth, lung = scan
    figures = per_scan(np.zeros_like(truth), truth, lung, SPACING)
    assert figures["missed"]
    assert (figures["dsc"], figures["nsd"], figures["sensitivity"]) == (0, 0, 0)
    assert figures["rmsd_mm"] is None


def test_a_lesion_free_scan_has_only_false_positives(scan):
    pred, lung = scan
    figures = per_scan(pred, np.zeros_like(pred), lung, SPACING)
    assert not figures["has_lesion"]
    assert not figures["missed"]
    assert {figures[key] for key in ("dsc", "sensitivity", "nsd", "rmsd_mm")} == {None}
    assert figures["false_positive_ml"] == pytest.approx(0.016)


def test_summary_keeps_classes_misses_and_lesion_free_scans_apart():
    rows = [
        row("covid-19", 0.8),
        row("covid-19", 0.6),
        row("cap", 0.0, missed=True),
        free(0.0),
        free(1.5),
    ]
    segmentation = summarise(rows)["lesions"]
    assert segmentation["dsc"]["mean"] == pytest.approx((0.8 + 0.6 + 0) / 3)
    assert segmentation["dsc"]["sd"] == pytest.approx(np.std([0.8, 0.6, 0], ddof=1))
    assert segmentation["dsc"]["n"] == 3
    assert segmentation["rmsd_mm"] == {"mean": 2.0, "sd": 0.0, "n": 2}
    assert segmentation["missed"] == 1
    assert segmentation["covid-19"]["dsc"]["mean"] == pytest.approx(0.7)
    assert segmentation["covid-19"]["missed"] == 0
    assert segmentation["cap"]["rmsd_mm"] == {"mean": None, "sd": None, "n": 0}
    lesion_free = segmentation["lesion_free"]
    assert (lesion_free["n"], lesion_free["with_false_positives"]) == (2, 1)
    assert lesion_free["share"] == 0.5
    assert lesion_free["false_positive_ml"]["mean"] == 0.75


def test_classification_has_no_spread_over_scans():
    labels = np.array([0, 0, 1, 2])
    figures = summarise(labels=labels, probabilities=np.eye(3)[[0, 1, 1, 2]])["classes"]
    assert figures["accuracy"] == {"mean": 0.75, "sd": None, "n": 4}
    assert figures["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert figures["classes"] == ["covid-19", "cap", "non-pneumonia"]
    assert {"sensitivity", "specificity", "f1", "auc"} <= figures.keys()


def test_undefined_figures_are_null_in_strict_json():
    rows = [row("cap", 0.0, missed=True)]
    document = summarise(rows, np.array([1]), np.array([[0.2, 0.5, 0.3]]))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["classes"]["auc"]["mean"] is None


def test_a_run_of_one_task_has_only_its_own_part():
    assert summarise([row("cap", 0.5)]).keys() == {"lesions"}
    diagnosis = summarise(labels=np.array([0, 1]), probabilities=np.eye(3)[:2])
    assert diagnosis.keys() == {"classes"}
    assert summarise() == {}


def test_table_shows_every_figure_in_aligned_columns():
    rows = [row("covid-19", 0.8), row("covid-19", 0.6), row("cap", 0.0, missed=True), free(1.5)]
    labels = np.array([0, 0, 1, 2])
    text = table(summarise(rows, labels, np.eye(3)[[0, 1, 1, 2]]))
    lines = text.splitlines()
    assert lines[0].split() == ["lesions", "all", "(n=3)", "covid-19", "(n=2)", "cap", "(n=1)"]
    assert lines[2].split() == ["DSC", "0.467", "±", "0.416", "0.700", "±", "0.141", "0.000"]
    assert len({len(line) for line in lines[:9]}) == 1
    assert "1 of 1 with false positives, 1.5 ml a scan" in text
    assert "NSD at 3 mm" in text
    assert "mean ± standard deviation over scans" in text
    assert [line.split()[0] for line in lines if "macro" in line][-2:] == ["F1,", "AUC,"]
    assert "%" not in text
    assert "is cap" in text


def test_table_of_a_segmentation_run_without_lesion_free_scans():
    text = table(summarise([row("cap", 0.5)]))
    assert "no lesion-free scans" in text
    assert "diagnosis" not in text
