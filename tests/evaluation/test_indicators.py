"""Figures of indicators, and their baselines, on numbers that are made for it."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import stored
from smallest_cnncf import PATCHES

from deepsc_jax.data.records import StoredCase
from deepsc_jax.data.store import Store, write_index
from deepsc_jax.evaluation import indicators
from deepsc_jax.metrics.tables import table
from deepsc_jax.runtime.errors import InputError

DATA = dataclasses.replace(
    PATCHES,
    frame_size=(16, 16),
    working_size=(16, 16),
    tile=(1, 16, 16),
    indicators=("grey", "noise"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Forty cases for training and twenty for test; `grey` is what the oracle is told."""
    folder = tmp_path_factory.mktemp("store")
    scans = [stored.Scan("train" if i < 40 else "test", 0, 1 + i % 2) for i in range(60)]
    cases = stored.write(folder, DATA, scans).cases()
    rng = np.random.default_rng(0)
    grey, noise = rng.uniform(5, 9, 60), rng.normal(size=60)
    cases = [
        dataclasses.replace(case, targets=(float(g), float(x)))
        for case, g, x in zip(cases, grey, noise, strict=True)
    ]
    write_index(folder, DATA, cases, folder)
    facts = {case.name: {"told": case.targets[0]} for case in cases}
    (folder / "oracle.json").write_text(json.dumps(facts))
    return Store(folder, DATA)


def of(cases: list[StoredCase]) -> np.ndarray:
    return np.array([case.targets for case in cases])


def test_each_indicator_is_scored_as_shares_of_the_ends_of_training(store: Store) -> None:
    cases = store.cases("test")
    truth, train = of(cases), of(store.cases("train"))
    extent = train[:, 0].max() - train[:, 0].min()
    found = indicators.figures(store, cases, truth + np.array([1.0, 0.0]))
    assert found["each"]["grey"]["mae"] == pytest.approx(1 / extent)
    assert found["each"]["grey"]["r"] == pytest.approx(1)
    assert found["each"]["noise"]["mse"] == 0
    assert found["pooled"]["mae"] == pytest.approx(0.5 / extent)
    assert found["mean"]["mae"] == pytest.approx(0.5 / extent)
    assert found["constant"]["r2"] < 0.2
    json.dumps(found, allow_nan=False)


def test_intervals_are_of_patients(store: Store) -> None:
    """Each case twice tells no more than once."""
    cases = store.cases("test")
    values = of(cases) + np.random.default_rng(1).normal(size=(20, 2))
    once = indicators.figures(store, cases, values)["each"]["grey"]
    twice = indicators.figures(store, cases * 2, np.tile(values, (2, 1)))["each"]["grey"]
    assert once["r_low"] < once["r"] < once["r_high"]
    assert twice["r_low"] == pytest.approx(once["r_low"], abs=1e-9)


def test_the_constant_prediction_has_no_r_of_its_own_and_one_pooled(store: Store) -> None:
    cases = store.cases("test")
    values = np.tile(of(store.cases("train")).mean(axis=0), (len(cases), 1))
    found = indicators.figures(store, cases, values)
    assert [one["r"] for one in found["each"].values()] == [None, None]
    assert found["pooled"] == found["constant"]
    lines = table({"indicators": found}).splitlines()
    assert lines[0].split()[:2] == ["indicator", "(n=20)"]
    assert [line.split()[0] for line in lines[2:]] == [
        "grey",
        "noise",
        "mean",
        "all",
        "constant,",
        "of",
    ]


def test_the_oracle_finds_what_it_is_told_and_ridge_does_not(
    store: Store, tmp_path: pathlib.Path
) -> None:
    found = indicators.baselines(store, pathlib.Path(store.path), "test")
    assert list(found) == ["constant", "ridge", "oracle"]
    assert found["oracle"]["each"]["grey"]["r"] > 0.999
    assert abs(found["oracle"]["each"]["noise"]["r"] or 0) < 0.6  # 3 deviations of 20 cases
    assert abs(found["ridge"]["each"]["grey"]["r"] or 0) < 0.6
    lines = indicators.table(found).splitlines()
    assert len(lines) == 4
    assert "what the indicators of phantoms are made of" in lines[-1]
    assert list(indicators.baselines(store, tmp_path, "test")) == ["constant", "ridge"]


def test_too_few_cases_for_baselines_are_refused(tmp_path: pathlib.Path) -> None:
    small = stored.write(tmp_path, DATA, [stored.Scan("train", 0, 1)] * 2)
    with pytest.raises(InputError, match="has 2 cases with 2 indicators; they are fitted on it"):
        indicators.require_baselines(small)
