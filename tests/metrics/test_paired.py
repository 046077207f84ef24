"""Two evaluations of the same scans, compared: by hand, and where one is better."""

import numpy as np
import pytest

from deepsc_jax.metrics.comparison import delong_test
from deepsc_jax.metrics.intervals import Resampling
from deepsc_jax.metrics.paired import BOOTSTRAP, DELONG, MCNEMAR, paired, paired_table
from deepsc_jax.metrics.statistics import mcnemar

CLASSES = ("a", "b")
N = 30


def evaluation(better: float, seed: int) -> list[dict]:
    """Rows of 30 scans, half of each class, the better the larger `better` is."""
    shared, rng = np.random.default_rng(0).normal(size=N), np.random.default_rng(seed)
    rows = []
    for i in range(N):
        label = CLASSES[i % 2]
        right = 1 / (1 + np.exp(-(shared[i] + better * 3 + 0.3 * rng.normal())))
        probabilities = {name: float(right if name == label else 1 - right) for name in CLASSES}
        dsc = 0.5 + 0.1 * shared[i] + better + 0.01 * rng.normal() if i % 3 else None
        row = {"case": f"scan-{i}", "label": label, "probabilities": probabilities}
        energy = {"evidence": {"evidence_1": {"energy": 0.3 + better}}} if dsc else {}
        rows.append(row | {"dsc": dsc, "nsd": dsc} | energy)
    return rows


PATIENTS = [f"p{i}" for i in range(N)]
HOW = Resampling(resamples=300)


def test_every_figure_is_tested_and_corrected():
    one, other = evaluation(0.2, 1), evaluation(0.0, 2)
    found = paired(one, other, PATIENTS, CLASSES, HOW)
    tests = [(row["figure"], row["test"]) for row in found["rows"]]
    assert tests == [
        ("DSC", BOOTSTRAP),
        ("NSD at 3 mm", BOOTSTRAP),
        ("accuracy", BOOTSTRAP),
        ("AUC, macro", BOOTSTRAP),
        ("accuracy", MCNEMAR),
        ("AUC, a", DELONG),
        ("AUC, b", DELONG),
    ]
    rows = dict(zip(tests, found["rows"], strict=True))
    dsc = rows["DSC", BOOTSTRAP]
    known = [i for i in range(N) if one[i]["dsc"] is not None]
    differences = [one[i]["dsc"] - other[i]["dsc"] for i in known]
    assert (dsc["n"], dsc["difference"]) == (len(known), pytest.approx(np.mean(differences)))
    assert 0 < dsc["low"] < dsc["difference"] < dsc["high"]
    assert dsc["p"] <= dsc["p_holm"] < 0.05
    labels = np.array([row["label"] == "a" for row in one])
    scores = [np.array([row["probabilities"]["a"] for row in of]) for of in (one, other)]
    given = [(score > 0.5) == labels for score in scores]
    assert rows["accuracy", MCNEMAR]["p"] == mcnemar(np.ones(N, bool), *given)
    assert rows["accuracy", MCNEMAR]["right_alone"] == [
        int(np.sum(given[0] & ~given[1])),
        int(np.sum(given[1] & ~given[0])),
    ]
    assert rows["AUC, a", DELONG]["p"] == pytest.approx(delong_test(labels, scores[0], scores[1]).p)
    assert [row["figure"] for row in found["evidence"]] == ["energy of evidence_1"]
    text = paired_table(found)
    assert "exact McNemar" in text
    assert "energy of evidence_1" in text


def test_an_evaluation_does_not_differ_from_itself():
    rows = evaluation(0.1, 1)
    found = paired(rows, rows, PATIENTS, CLASSES, HOW)
    assert all(row["difference"] == 0 for row in found["rows"])
    assert all(row["p_holm"] == 1 for row in found["rows"])


def test_tests_of_single_scans_are_left_out_where_a_patient_has_several():
    patients = ["p0", *PATIENTS[:-1]]
    found = paired(evaluation(0.2, 1), evaluation(0.0, 2), patients, CLASSES, HOW)
    assert {row["test"] for row in found["rows"]} == {BOOTSTRAP}
    assert found["left_out"] == ["exact McNemar and DeLong: a patient has several scans"]
    assert "left out: exact McNemar" in paired_table(found)


def test_what_one_of_them_lacks_is_not_compared():
    one = evaluation(0.2, 1)
    lesions = [{k: v for k, v in row.items() if k in ("case", "label", "dsc")} for row in one]
    found = paired(one, lesions, PATIENTS, CLASSES, HOW)
    assert [row["figure"] for row in found["rows"]] == ["DSC"]
    assert (found["evidence"], found["left_out"]) == ([], [])
    neither = [{k: v for k, v in row.items() if k in ("case", "label")} for row in one]
    found = paired(one, neither, PATIENTS, CLASSES, HOW)
    assert (found["rows"], len(found["left_out"])) == ([], 1)
    assert paired_table(found) == "left out: all: there is no figure that both give"
    with pytest.raises(ValueError, match="different scans"):
        paired(one, one[::-1], PATIENTS, CLASSES, HOW)
