"""A split's figures on the scans' own grids, of a stand-in for a network."""

import dataclasses

import chests
import handful
import numpy as np
import pytest

from deepsc_jax.config import Config
from deepsc_jax.data import preparation
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.records import Contents
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.curve import CURVE_THRESHOLDS
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.phantoms.writing import write_phantoms


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
    curve = evaluate(Dense(), store, "test")[0]["curve"]
    assert curve["n"] == {"with_lesions": 2, "lesion_free": 1}
    for threshold in (0.3, 0.5, 0.7):
        metrics, _ = evaluate(Dense(threshold), store, "test")
        at = CURVE_THRESHOLDS.index(threshold)
        assert curve["dsc"][at] == pytest.approx(metrics["lesions"]["dsc"]["mean"])
        free = metrics["lesions"]["lesion_free"]["false_positive_ml"]["mean"]
        assert curve["false_ml"][at] == pytest.approx(free)
    assert 0 < curve["dsc"][CURVE_THRESHOLDS.index(0.5)] < 1


def test_evidence_is_scored_in_scans_with_lesions(store: Store) -> None:
    metrics, rows = evaluate(Dense(), store, "test")
    of_scans = [row["evidence"]["evidence_1"] for row in rows if "evidence" in row]
    assert len(of_scans) == 2
    for name, figure in metrics["evidence"]["evidence_1"].items():
        assert figure["mean"] == pytest.approx(np.mean([row[name] for row in of_scans]))
    assert metrics["evidence"]["evidence_1"]["auc"]["mean"] > 0.5  # chance; lesions are dense


def test_small_lesions_leave_masks_and_not_the_curve(store: Store) -> None:
    metrics, rows = evaluate(Dense(), store, "test", smallest_lesion_ml=1e4)
    assert metrics["curve"] == evaluate(Dense(), store, "test")[0]["curve"]
    assert [row["predicted_ml"] for row in rows] == [0.0, 0.0, 0.0]
