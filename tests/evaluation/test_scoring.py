"""A split's figures on the scans' own grids, of a stand-in for a network."""

import dataclasses
import json
import pathlib
from typing import Any

import chests
import handful
import numpy as np
import pytest

from deepsc_jax.config import Config
from deepsc_jax.data import preparation
from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.preprocess import to_source
from deepsc_jax.data.records import Contents
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.against import against_path, digest_of, read_evaluation
from deepsc_jax.evaluation.curve import CURVE_THRESHOLDS
from deepsc_jax.evaluation.explanation import Studies, is_right, summarised
from deepsc_jax.evaluation.scoring import Settings, evaluate
from deepsc_jax.evaluation.sources import source_case
from deepsc_jax.evaluation.tuning import require_tuning, tune
from deepsc_jax.metrics.intervals import Resampling
from deepsc_jax.metrics.paired import paired
from deepsc_jax.metrics.tables import table
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import InputError

FEW = Settings(resampling=Resampling(resamples=5))


@dataclasses.dataclass
class Dense:
    """Calls what is dense a lesion, and points at it."""

    threshold: float = 0.5
    config: Config = handful.CONFIG

    def __call__(self, volume: np.ndarray) -> Prediction:
        return dataclasses.replace(
            chests.compute(volume), volumes={"lesion": volume}, evidence={"evidence_1": volume}
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("data")
    cases = write_phantoms((0, 0, 3), folder, seed=0, size=48, workers=1)
    data = handful.CONFIG.data
    assert (
        preparation.prepare(cases, folder, data, workers=1, contents=Contents(phantoms=True)) == []
    )
    return Store(folder / "store", data)


def test_the_curve_has_what_an_evaluation_at_each_threshold_says(store: Store) -> None:
    curve = evaluate(Dense(), store, "test", FEW)[0]["curve"]
    assert curve["n"] == {"with_lesions": 2, "lesion_free": 1}
    for threshold in (0.3, 0.5, 0.7):
        metrics, _ = evaluate(Dense(threshold), store, "test", FEW)
        at = CURVE_THRESHOLDS.index(threshold)
        assert curve["dsc"][at] == pytest.approx(metrics["lesions"]["dsc"]["mean"])
        free = metrics["lesions"]["lesion_free"]["false_positive_ml"]["mean"]
        assert curve["false_ml"][at] == pytest.approx(free)
    assert 0 < curve["dsc"][CURVE_THRESHOLDS.index(0.5)] < 1


def test_evidence_is_scored_in_scans_with_lesions(store: Store) -> None:
    metrics, rows = evaluate(Dense(), store, "test", FEW)
    of_scans = [row["evidence"]["evidence_1"] for row in rows if "evidence" in row]
    assert len(of_scans) == 2
    figures = metrics["evidence"]["evidence_1"]
    by_class = figures.pop("by_class")
    assert [each["auc"]["n"] for each in by_class.values()] == [1, 1]
    for name, figure in figures.items():
        assert figure["mean"] == pytest.approx(np.mean([row[name] for row in of_scans]))
    assert figures["auc"]["mean"] > 0.5  # chance; lesions are dense


def test_small_lesions_leave_masks_and_not_the_curve(store: Store) -> None:
    metrics, rows = evaluate(
        Dense(), store, "test", dataclasses.replace(FEW, smallest_lesion_ml=1e4)
    )
    assert metrics["curve"] == evaluate(Dense(), store, "test", FEW)[0]["curve"]
    assert [row["predicted_ml"] for row in rows] == [0.0, 0.0, 0.0]


@dataclasses.dataclass
class Alike(Dense):
    """Says of every scan, and of none of its lesions, what the first class is."""

    def __call__(self, volume: np.ndarray) -> Prediction:
        return dataclasses.replace(
            super().__call__(volume), classes=np.array([0.5, 0.2, 0.3], np.float32)
        )


def test_evidence_is_measured_in_every_way(store: Store) -> None:
    studies = Studies({"evidence_1": 0.5}, curves=True, broken={"blind": Alike()})
    metrics, rows = evaluate(Dense(), store, "test", dataclasses.replace(FEW, studies=studies))
    evidence = metrics["evidence"]["evidence_1"]
    # The map is the lesion probability, brought to the scan with the zeros beside the lungs.
    scores = []
    for case in store.cases("test"):
        truth = source_case(store, case, "hu")
        if truth.lesion.any():
            heat = Dense()(store.read(case.name, "volume")).evidence["evidence_1"]
            mask = (to_source(heat, case.grid) >= 0.5) & truth.lung
            scores.append(2 * (mask & truth.lesion).sum() / (mask.sum() + truth.lesion.sum()))
    assert evidence["dice"]["mean"] == pytest.approx(np.mean(scores))
    agreement = metrics["agreement"]["evidence_1"]
    assert agreement.keys() >= {"right", "wrong"}
    assert agreement["right"]["energy"]["n"] == sum(map(is_right, rows))
    assert 0.6 < agreement["wrong"]["dice"]["mean"] < 1  # of the predicted lesions
    curves = metrics["perturbation"]["evidence_1"]
    assert curves.keys() == {"deletion", "insertion", "random"}
    assert curves["deletion"]["n"] == 3
    broken = metrics["sanity"]["blind"]
    assert broken["evidence_1"]["likeness"]["mean"] == pytest.approx(1)  # it points as before
    assert broken["probability"]["n"] == 3
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    text = table(metrics)
    for name in ("energy in lesions", "DSC at its threshold", "insertion", "likeness, blind"):
        assert name in text


def test_evidence_is_compared_between_right_and_wrong_answers() -> None:
    rows = [
        {
            "label": "a",
            "probabilities": {"a": p, "b": 1 - p},
            "agreement": {"m": {"energy": p / 2 + i / 100}},
        }
        for i, p in enumerate((0.9, 0.8, 0.9, 0.8, 0.7, 0.1, 0.2, 0.2, 0.1, 0.3))
    ]
    names = [str(i) for i in range(10)]
    how = Resampling(resamples=300)
    found = summarised(rows, names, ("a", "b"), how)["agreement"]["m"]
    assert (found["right"]["energy"]["n"], found["wrong"]["energy"]["n"]) == (5, 5)
    difference = found["difference"]["energy"]
    assert difference["value"] == pytest.approx(
        found["right"]["energy"]["mean"] - found["wrong"]["energy"]["mean"]
    )
    assert difference["low"] > 0
    assert difference["p"] < 0.05


def test_what_validation_chooses_is_applied_to_the_test_split(
    tmp_path: pathlib.Path,
) -> None:
    cases = write_phantoms((0, 3, 3), tmp_path, seed=0, size=48, workers=1)
    assert preparation.prepare(cases, tmp_path, handful.CONFIG.data, workers=1) == []
    store = Store(tmp_path / "store", handful.CONFIG.data)
    tuned = tune(Dense(), store)
    assert tuned.scans == 3
    assert tuned.evidence["evidence_1"] in CURVE_THRESHOLDS
    assert tuned.temperature is not None
    studies = Studies(tuned.evidence)
    metrics, _ = evaluate(
        Dense(), store, "test", dataclasses.replace(FEW, tuned=tuned, studies=studies)
    )
    scaled = metrics["classes"]["temperature"]
    assert scaled["temperature"] == metrics["tuned"]["temperature"] == tuned.temperature
    assert scaled["brier"] != metrics["classes"]["brier"]["mean"]
    assert f"at a temperature of {tuned.temperature:.2f}" in table(metrics)
    with pytest.raises(InputError, match="--split=validation is to be evaluated"):
        require_tuning(store, "validation")
    with pytest.raises(InputError, match=r"split validation of .* has no case"):
        require_tuning(Store(_only_test(tmp_path)), "test")


def _only_test(folder: pathlib.Path) -> pathlib.Path:
    """A store of the test split alone, of the same phantoms."""
    cases = [case for case in read_cases(folder / "cases.csv") if case.split == "test"]
    other = folder / "other"
    other.mkdir()
    assert preparation.prepare(cases, other, handful.CONFIG.data, workers=1) == []
    return other / "store"


def write(
    folder: pathlib.Path, metrics: dict[str, Any], rows: list[dict[str, Any]]
) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "scans.json").write_text(json.dumps(rows))
    return folder


def test_an_evaluation_is_compared_with_one_of_the_same_scans(
    store: Store, tmp_path: pathlib.Path
) -> None:
    metrics, rows = evaluate(Dense(0.3), store, "test", FEW)
    folder = write(tmp_path / "e", metrics, rows[::-1])
    assert against_path(str(folder)) == folder
    cases, classes = store.cases("test"), store.data.classes
    _, others = read_evaluation(folder, cases, classes)
    _, ours = evaluate(Dense(0.5), store, "test", FEW)
    patients = [case.patient for case in cases]
    found = paired(ours, others, patients, classes, FEW.resampling)
    dsc = found["rows"][0]
    assert dsc["figure"] == "DSC"
    assert dsc["other"] == pytest.approx(metrics["lesions"]["dsc"]["mean"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scans_sha256": "0"}, "is of other scans, truth or labels"),
        ({"scans_sha256": None}, "does not say of which scans"),
        ({"classes": {"classes": ["a", "b"]}}, "has the classes a,b"),
    ],
)
def test_evaluations_of_other_scans_are_refused(
    store: Store, tmp_path: pathlib.Path, change: dict[str, Any], said: str
) -> None:
    metrics, rows = evaluate(Dense(), store, "test", FEW)
    folder = write(tmp_path / "e", metrics | change, rows)
    with pytest.raises(InputError, match=said):
        read_evaluation(folder, store.cases("test"), store.data.classes)


def test_what_is_no_evaluation_is_refused(store: Store, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"neither metrics.json and scans.json nor config.json"):
        against_path(str(tmp_path))
    folder = write(tmp_path / "e", {}, [])
    (folder / "scans.json").write_text("{")
    with pytest.raises(InputError, match="not what `evaluate` wrote"):
        read_evaluation(folder, store.cases("test"), store.data.classes)


def test_the_digest_is_of_sources_and_labels_not_of_their_order(store: Store) -> None:
    cases = store.cases("test")
    assert digest_of(cases[::-1]) == digest_of(cases)
    changed = [dataclasses.replace(cases[0], sums={"scan": "0"}), *cases[1:]]
    assert digest_of(changed) != digest_of(cases)
    assert digest_of(cases[1:]) != digest_of(cases)
