"""Classes of scans and their differences: figures by hand, and signs as the paper has them."""

import dataclasses

import numpy as np
import pytest

from deepsc_jax.metrics.cohort import (
    FIGURES,
    cohort,
    comparisons,
    hu_peaks,
    hu_share,
    joined,
    spread_between,
    summary,
)
from deepsc_jax.metrics.findings import HU_EDGES, THICKNESSES_MM, ScanFindings


def scan(
    count: int, lvr: float, spread_mm: float = 0.0, plr: float = 0.5, hu: float = -700.0
) -> ScanFindings:
    """A scan whose lesions are cubes of 10 mm, 20 mm and so on, all of one HU."""
    sides = 10.0 * np.arange(1, count + 1)
    hu_ml = np.histogram([hu], HU_EDGES)[0] * lvr * 1000
    return ScanFindings(
        lesion_ml=lvr * 4000,
        lung_ml=4000.0,
        lvr=lvr,
        outside_lung=0.0,
        sizes_mm=np.repeat(sides[:, None], 3, axis=1),
        spread_mm=spread_mm,
        plr=np.minimum(np.array(THICKNESSES_MM) / 10 * plr, 1.0),
        hu_ml=hu_ml,
    )


COVID = [scan(4 + i % 3, 0.13 + i / 100, 80.0 + i, 0.6) for i in range(12)]
CAP = [
    scan(1 + i % 2, 0.03 + i / 1000, 10.0 + i, 0.25, -700.0 if i % 2 else 30.0) for i in range(12)
]


def names(letter: str) -> list[str]:
    return [f"{letter}{i}" for i in range(12)]


def test_figures_of_a_class_by_hand():
    scans = cohort([scan(1, 0.05), scan(4, 0.15, 20.0), scan(0, 0.0)], ["a", "b", "c"])
    assert scans.scans == 2  # the third has no lesion
    value = {key: figure.of(scans, scans.every) for key, figure in FIGURES.items()}
    assert value["count"] == 2.5
    assert (value["one_lesion"], value["four_lesions"], value["lvr_12"]) == (0.5, 0.5, 0.5)
    assert value["lvr"] == pytest.approx(0.1)
    # Of 10, 10, 20, 30, 40 mm, interpolated between order statistics.
    assert value["width_span"] == pytest.approx(38 - 10)
    assert value["spread"] == 10
    assert value["spread_4_6"] == 0
    assert value["plr"] == pytest.approx(0.5)
    assert value["glass"] == 1


def test_shares_of_hu_are_of_volume_and_cut_bins_count_in_proportion():
    scans = cohort([scan(1, 0.03), scan(1, 0.01, hu=30.0)], ["a", "b"])
    assert hu_share(scans, scans.every, (-960, -600)) == pytest.approx(0.75)
    assert hu_share(scans, scans.every, (-690, 100)) == pytest.approx(0.75 / 2 + 0.25)
    assert hu_peaks(scans) == [-690, 30]
    unknown = cohort([scan(1, 0.1), dataclasses.replace(scan(1, 0.1), hu_ml=None)], "ab")
    assert np.isnan(hu_share(unknown, unknown.every, (-960, -600)))
    assert hu_peaks(unknown) == []


def test_a_group_of_lvr_holds_its_lower_end():
    scans = cohort([scan(1, 0.04, 10.0), scan(2, 0.06, 50.0), scan(2, 0.05, 20.0)], "abc")
    assert spread_between(scans, scans.every, 4, 6) == 15
    assert np.isnan(spread_between(scans, scans.every, 8, 10))


def test_differences_have_the_papers_signs_and_small_p():
    classes = {"covid-19": cohort(COVID, names("a")), "cap": cohort(CAP, names("b"))}
    rows = {row["figure"]: row for row in comparisons(classes, resamples=400)}
    assert rows.keys() == FIGURES.keys()
    signed = {key for key, figure in FIGURES.items() if figure.sign}
    # Of COVID-19 no scan has an LVR from 0.04 to 0.06 here.
    assert {key for key, row in rows.items() if row["as_in_paper"]} == signed - {"spread_4_6"}
    assert rows["spread_4_6"]["p"] is rows["spread_4_6"]["as_in_paper"] is None
    assert rows["glass"]["as_in_paper"] is None
    for key in ("count", "lvr", "spread", "plr"):
        row = rows[key]
        assert row["p"] <= row["p_holm"] < 0.05
        assert row["low"] <= row["difference"] <= row["high"]
    mirrored = {
        row["figure"]: row for row in comparisons(dict(reversed(classes.items())), resamples=2)
    }
    assert mirrored["lvr"]["difference"] == pytest.approx(-rows["lvr"]["difference"])
    assert mirrored["lvr"]["as_in_paper"]


def test_two_halves_of_a_class_do_not_differ():
    rng = np.random.default_rng(0)
    small = []
    for _ in range(20):
        scans = [scan(int(rng.integers(1, 8)), rng.random() / 5) for _ in range(16)]
        halves = {"a": cohort(scans[:8], names("a")[:8]), "b": cohort(scans[8:], names("b")[:8])}
        rows = {row["figure"]: row for row in comparisons(halves, resamples=49)}
        assert rows["lvr"]["as_in_paper"] is None  # these are no classes of the paper
        small.append(rows["lvr"]["p"] <= 0.1)
    assert sum(small) <= 6  # a tenth of 20 in the mean; 7 or more have a chance of 0.2 %


def test_a_summary_has_intervals_and_curves():
    found = summary(cohort(COVID, names("a")), resamples=50)
    assert (found["scans"], found["patients"], found["lesions"]) == (12, 12, 60)
    lvr = found["figures"]["lvr"]
    assert lvr["low"] < lvr["value"] < lvr["high"]
    assert found["hu_peaks"] == [-690]
    curve = [point["value"] for point in found["plr_by_thickness_mm"]]
    assert len(curve) == 36
    assert np.all(np.diff(curve) >= 0)
    assert found["spread_by_lvr_percent"]["12-100"]["n"] == 12
    alone = summary(cohort([scan(2, 0.05, 20.0), scan(2, 0.2)], "ab"), resamples=50)
    group = {"value": 20, "low": None, "high": None, "n": 1}  # no interval of one scan
    assert alone["spread_by_lvr_percent"]["4-6"] == group
    assert found["spread_by_lvr_percent"]["4-6"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
    }


def test_classes_joined_keep_their_order():
    both = joined([cohort(COVID, names("a")), cohort(CAP, names("b"))])
    assert both.scans == 24
    assert both.lvr[12] == CAP[0].lvr
    assert len(both.sizes_mm[12]) == CAP[0].count


def test_a_class_without_lesions_is_none():
    with pytest.raises(ValueError, match="none of 1 scans has a lesion"):
        cohort([scan(0, 0.0)], ["a"])
