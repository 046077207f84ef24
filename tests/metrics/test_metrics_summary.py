"""From scans to metrics.json and the printed table."""

import json
from typing import Any

import numpy as np
import pytest

from deepsc_jax.metrics import per_scan, summarise, table
from deepsc_jax.metrics.intervals import Resampling
from deepsc_jax.metrics.scan_figures import SEGMENTATION
from deepsc_jax.metrics.summary import CLASSIFICATION

SPACING = (2.0, 1.0, 1.0)
CLASSES = ("covid-19", "cap", "non-pneumonia")
FEW = Resampling(resamples=20)


@pytest.fixture
def scan():
    """(truth, lung): a 2x2x2 lesion in a 4x6x6 lung in an 8x8x8 scan."""
    truth, lung = np.zeros((2, 8, 8, 8), bool)
    lung[2:6, 1:7, 1:7] = True
    truth[3:5, 3:5, 3:5] = True
    return truth, lung


def row(label, dsc, *, missed=False, given=None):
    figures = dict.fromkeys(SEGMENTATION, 2.0) | dict.fromkeys(("dsc", "sensitivity", "nsd"), dsc)
    figures |= {"specificity": 0.9, "specificity_scan": 0.99, "false_positive_ml": 0.5}
    figures |= {"rmsd_mm": None if missed else 2.0, "has_lesion": True, "missed": missed}
    one = {"truth_ml": [5.0], "iou": [0.0 if missed else 0.75], "unpaired_ml": [0.5]}
    return figures | {"label": label, "single_lesions": one} | classified(given)


def free(false_positive_ml, given=None):
    figures = dict.fromkeys(SEGMENTATION) | {"specificity": 0.95, "specificity_scan": 0.99}
    flags = {"label": "non-pneumonia", "has_lesion": False, "missed": False}
    false = [false_positive_ml] if false_positive_ml else []
    none = {"single_lesions": {"truth_ml": [], "iou": [], "unpaired_ml": false}}
    figures |= flags | none | {"false_positive_ml": false_positive_ml}
    return figures | classified(given)


def classified(given):
    if given is None:
        return {}
    return {"probabilities": {name: 0.8 if name == given else 0.1 for name in CLASSES}}


def diagnosis(labels, given):
    names = zip(labels, given, strict=True)
    return [{"label": label} | classified(name) for label, name in names]


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


def test_distances_and_errors_of_volume_by_hand(scan):
    truth, lung = scan
    pred = truth.copy()
    pred[2] = pred[3]
    figures: dict[str, Any] = {**per_scan(pred, truth, lung, SPACING)}
    assert figures["volume_error_ml"] == figures["volume_error_abs_ml"] == pytest.approx(0.008)
    assert figures["lvr_error"] == pytest.approx(4 / 144)
    # The far face is 2 mm off: all within 2 mm, not all within 1.
    assert figures["nsd_1_mm"] < figures["nsd_2_mm"] == figures["nsd_5_mm"] == 1
    assert 0 < figures["assd_mm"] < figures["hd95_mm"] == pytest.approx(2)
    small = per_scan(truth & (np.arange(8) == 3), truth, lung, SPACING)
    assert small["volume_error_ml"] == pytest.approx(-0.008)
    assert small["volume_error_abs_ml"] == pytest.approx(0.008)
    assert small["single_lesions"] == {"truth_ml": [], "iou": [], "unpaired_ml": []}  # 0.016 ml


def test_summary_keeps_classes_misses_and_lesion_free_scans_apart():
    rows = [
        row("covid-19", 0.8),
        row("covid-19", 0.6),
        row("cap", 0.0, missed=True),
        free(0.0),
        free(1.5),
    ]
    segmentation = summarise(rows, resampling=FEW)["lesions"]
    assert segmentation["dsc"]["mean"] == pytest.approx((0.8 + 0.6 + 0) / 3)
    assert segmentation["dsc"]["sd"] == pytest.approx(np.std([0.8, 0.6, 0], ddof=1))
    assert segmentation["dsc"]["n"] == 3
    assert segmentation["rmsd_mm"] == {"mean": 2.0, "sd": 0.0, "n": 2, "low": 2.0, "high": 2.0}
    assert segmentation["missed"] == 1
    assert segmentation["covid-19"]["dsc"]["mean"] == pytest.approx(0.7)
    assert segmentation["covid-19"]["missed"] == 0
    none = {"mean": None, "sd": None, "n": 0, "low": None, "high": None}
    assert segmentation["cap"]["rmsd_mm"] == none
    lesion_free = segmentation["lesion_free"]
    assert (lesion_free["n"], lesion_free["with_false_positives"]) == (2, 1)
    assert lesion_free["share"] == 0.5
    assert lesion_free["false_positive_ml"]["mean"] == 0.75


def test_single_lesions_are_of_all_scans_together():
    rows = [row("covid-19", 0.8), row("cap", 0.0, missed=True), free(0.0), free(1.5)]
    found = summarise(rows, resampling=FEW)["lesions"]["detection"]
    assert (found["found"], found["missed"], found["false_positives"]) == (1, 1, 3)
    assert found["sensitivity"]["value"] == 0.5
    assert found["false_positives_a_scan"]["value"] == 0.75
    assert found["f1"]["value"] == pytest.approx(2 / (2 + 1 + 3))
    assert found["panoptic_quality"]["value"] == pytest.approx(2 * 0.75 / 6)
    sizes = {(size["from"], size["to"]): size for size in found["by_size_ml"]}
    assert sizes.keys() == {(0, 1), (1, 10), (10, None)}
    assert (sizes[1, 10]["found"], sizes[1, 10]["false_positives"]) == (1, 1)
    assert sizes[10, None]["sensitivity"] is None


def test_intervals_are_over_patients_and_say_how():
    rows = [row("cap", x) for x in (0.2, 0.4, 0.6, 0.8)]
    alone = summarise(rows, resampling=Resampling(resamples=200))
    assert alone["intervals"] == {
        "level": 0.95,
        "method": "percentile",
        "resamples": 200,
        "seed": 0,
        "over": "patients",
        "patients": 4,
    }
    low, high = (alone["lesions"]["dsc"][end] for end in ("low", "high"))
    assert 0.2 <= low < 0.5 < high <= 0.8
    two = summarise(rows, patients=["a", "b", "a", "b"], resampling=Resampling(resamples=200))
    # Each patient has two scans, of means 0.4 and 0.6.
    assert two["lesions"]["dsc"]["low"] == pytest.approx(0.4)
    assert two["lesions"]["dsc"]["high"] == pytest.approx(0.6)
    same = summarise([row("cap", 0.5)] * 3, resampling=Resampling(method="bca", resamples=20))
    assert same["lesions"]["dsc"]["method"] == "percentile"  # of constants there is no BCa


def test_classification_has_no_spread_over_scans():
    rows = diagnosis(
        ["covid-19", "covid-19", "cap", "non-pneumonia"],
        ["covid-19", "cap", "cap", "non-pneumonia"],
    )
    figures = summarise(rows, resampling=FEW)["classes"]
    assert figures["accuracy"].items() >= {"mean": 0.75, "sd": None, "n": 4}.items()
    assert figures["accuracy"]["low"] <= 0.75 <= figures["accuracy"]["high"]
    assert figures["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert figures["classes"] == list(CLASSES)
    assert figures.keys() >= CLASSIFICATION.keys()
    assert figures["by_class"]["covid-19"]["auc"]["method"] == "delong"
    assert "method" not in figures["by_class"]["cap"]["auc"]  # one scan: no error by DeLong


def test_undefined_figures_are_null_in_strict_json():
    rows = [row("cap", 0.0, missed=True, given="cap")]
    document = summarise(rows, resampling=FEW)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["classes"]["auc"]["mean"] is None


def test_a_run_of_one_task_has_only_its_own_part():
    assert summarise([row("cap", 0.5)], resampling=FEW).keys() == {"lesions", "intervals"}
    rows = diagnosis(["covid-19", "cap"], ["covid-19", "cap"])
    assert summarise(rows, resampling=FEW).keys() == {"classes", "intervals"}
    assert summarise([]) == {}


def test_table_shows_every_figure_in_aligned_columns():
    rows = [
        row("covid-19", 0.8, given="covid-19"),
        row("covid-19", 0.6, given="cap"),
        row("cap", 0.0, missed=True, given="cap"),
        free(1.5, given="non-pneumonia"),
    ]
    text = table(summarise(rows, resampling=FEW))
    lines = text.splitlines()
    heads = ["lesions", "all", "(n=3)", "interval", "covid-19", "(n=2)", "cap", "(n=1)"]
    assert lines[0].split() == heads
    dsc = lines[2].split()
    assert dsc[:4] == ["DSC", "0.467", "±", "0.416"]
    assert dsc[-4:] == ["0.700", "±", "0.141", "0.000"]
    assert len({len(line) for line in lines[: 3 + len(SEGMENTATION)]}) == 1
    rmsd = next(line for line in lines if line.startswith("RMSD"))
    assert "2.0 ± 0.0 (of 2)" in rmsd
    assert "1 of 1 with false positives, 1.5 ml a scan" in text
    assert "NSD at 3 mm" in text
    assert "mean ± standard deviation over scans" in text
    assert "lesions found" in text
    assert [line.split()[0] for line in lines if "macro" in line][-3:] == ["F1,", "AUC,", "AUPRC,"]
    assert "intervals: 95 %, percentile, 20 resamples of 4 patients" in text
    assert "is cap" in text


def test_table_of_a_segmentation_run_without_lesion_free_scans():
    text = table(summarise([row("cap", 0.5)], resampling=FEW))
    assert "no lesion-free scans" in text
    assert "diagnosis" not in text
