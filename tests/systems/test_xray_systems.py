"""CNNCF on X-rays of phantoms through the whole engine: prepare, train, evaluate, predict, plan."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data import preparation
from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.records import Contents
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation import image_baselines
from deepsc_jax.evaluation.scoring import evaluate, require_baselines, score_image_baselines
from deepsc_jax.inference import predictor, requests
from deepsc_jax.inference.workers import BatchInference
from deepsc_jax.models.cnncf import config as cnncf
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.planning import compiled
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

CONFIG = Config(
    data=DataConfig(
        modality="xray",
        mask="none",
        working_size=(32, 48),
        tile=(1, 32, 48),
        depth_bucket=1,
        slices=1,
        intensity_mean=0,
        intensity_sd=1,
    ),
    model=cnncf.Options(
        stem=2,
        stage1_widths=(2, 2, 4),
        stage2_widths=(2, 2, 2),
        gate_window=1,
        gate_sensitivity=0,
        gate_count=2,
        classification=cnncf.Training(steps=4, batch=2, warmup_steps=1, decay_every=3),
    ),
    train=TrainConfig(log_every=1, evaluate_every=4, checkpoint_every=4),
    platform=PlatformConfig(data_devices=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`data`: a store of two views of each phantom; `run`: a network trained on it."""
    folder = tmp_path_factory.mktemp("xrays")
    data = folder / "data"
    cases = write_phantoms((3, 2, 2), data, seed=0, size=48, workers=1, views=2, lesion_contrast=3)
    contents = Contents(phantoms=True, lesion_contrast=3)
    assert preparation.prepare(cases, data, CONFIG.data, workers=1, contents=contents) == []
    store = Store(data / "store", CONFIG.data)
    workdirs.begin(folder / "run", CONFIG, store)
    system = build(CONFIG, "cpu")
    assert loop.train(system, store, folder / "run", system.stages)
    return folder


def test_it_trains_and_its_gate_opens(folder: pathlib.Path) -> None:
    network = predictor.load(folder / "run")
    assert network.trained_on == "X-ray phantoms, lesion contrast 3"
    assert bool(network.variables["gate"]["open"])


def test_it_is_evaluated_with_what_it_looked_at(folder: pathlib.Path) -> None:
    store = Store(folder / "data" / "store", CONFIG.data)
    metrics, rows = evaluate(predictor.load(folder / "run"), store, "test")
    assert [row["case"] for row in rows] == [case.name for case in store.cases("test")]
    assert "lesions" not in metrics
    assert metrics["classes"]["accuracy"]["n"] == 4
    # Phantoms 0 and 1 have lesions.
    assert metrics["evidence"]["evidence_1"]["auc"]["n"] == 4
    boxes = sum(len(case.boxes) for case in store.cases("test"))
    pairs = metrics["centres"].get("pooled", {"n": 0})["n"] / 2
    assert metrics["centres"]["missed"] + pairs == boxes > 0


def test_it_stands_beside_baselines_of_images(folder: pathlib.Path) -> None:
    store = Store(folder / "data" / "store", CONFIG.data)
    figures = score_image_baselines(store, folder / "data", "test")
    assert list(figures) == ["majority", "nuisances", "histogram", "components", "true_lesions"]
    assert figures["majority"]["auc"] == 0.5
    lines = image_baselines.table(figures).splitlines()
    assert len(lines) == 6
    assert "the most frequent class of training" in lines[1]
    one = preparation.prepare(
        read_cases(folder / "data" / "cases.csv")[:2], folder / "one", CONFIG.data, workers=1
    )
    assert one == []
    with pytest.raises(InputError, match="has 1 classes, the rarest of 2 cases; they are fitted"):
        require_baselines(Store(folder / "one" / "store"), "test")


def test_it_predicts_files_as_the_store_has_them(folder: pathlib.Path) -> None:
    network, out = predictor.load(folder / "run"), folder / "out"
    store = Store(folder / "data" / "store", CONFIG.data)
    scans = folder / "data" / "scans"
    wanted = [
        request
        for request in requests.below(scans, out, "xray").requests
        if request.name.startswith("phantom-test") and "-l" not in request.name
    ]
    outcomes = list(BatchInference(network, out, workers=0, overwrite=False).outcomes(wanted))
    assert [outcome.error for outcome in outcomes] == [None] * 4
    for case in store.cases("test"):
        result = json.loads((out / case.name / "result.json").read_text())
        direct = network(store.read(case.name, "volume"))
        assert direct.classes is not None
        # The store rounds to levels of 1.5e-5, and the result to 1e-4.
        np.testing.assert_allclose(
            list(result["probabilities"].values()), direct.classes, atol=2e-4
        )
        assert result["notes"] == ["gate: open since step 3"]  # of four batches one has no positive
        assert result["trained_on"] == "X-ray phantoms, lesion contrast 3"
        assert sorted(result["files"]) == ["evidence_1.png", "picture.png"]


def test_evidence_is_a_map_of_the_image_with_a_largest_value_of_1(folder: pathlib.Path) -> None:
    network = predictor.load(folder / "run")
    volume = np.random.default_rng(0).uniform(size=(1, 32, 48)).astype(np.float32)
    heat = network(volume).evidence["evidence_1"]
    assert heat.shape == volume.shape
    assert heat.min() >= 0
    assert heat.max() in (0, 1)


def test_its_step_is_planned_whatever_the_depth_of_scans(folder: pathlib.Path) -> None:
    del folder
    system = build(CONFIG, "cpu")
    mesh = device_mesh.make_mesh(CONFIG.platform, jax.devices()[:1])
    one, many = (
        compiled.trace(system, system.stages[0].name, mesh, 2, depth).jaxpr for depth in (1, 304)
    )
    assert str(one) == str(many)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": "lungs"}, "mask is lungs and modality is xray: give none"),
        ({"slices": 3}, "slices is 3 and modality is xray: give 1"),
        ({"working_spacing_mm": (0, 1, 1)}, "working_spacing_mm is 0,1,1 and modality is xray"),
    ],
)
def test_what_is_of_volumes_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG.data, **changes)
