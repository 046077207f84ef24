"""CNNRF on patches of phantoms through the engine: prepare, train, evaluate, predict, plan."""

import dataclasses
import json
import pathlib
import re
import types
from typing import Any

import jax
import numpy as np
import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data import preparation
from deepsc_jax.data.records import Contents, StoredCase
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation import indicators
from deepsc_jax.evaluation.scoring import evaluate, require_baselines
from deepsc_jax.inference import predictor
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.workers import BatchInference
from deepsc_jax.models.cnncf import config as cnncf
from deepsc_jax.phantoms.indicators import CEILINGS
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.planning import compiled, flops
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import System, initial
from deepsc_jax.training import loop
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.step import make_train_step

XRAYS = Config(
    data=DataConfig(
        modality="xray",
        mask="none",
        patches="window",
        frame_size=(48, 48),
        working_size=(16, 16),
        tile=(1, 16, 16),
        depth_bucket=1,
        slices=3,
        classes=("covid-19", "cap"),
        lesion_free="",
        indicators=tuple(CEILINGS),
        intensity_mean=0,
        intensity_sd=1,
    ),
    model=cnncf.RegressorOptions(
        stem=2,
        widths=(2, 2, 4),
        hidden=(4, 3),
        regression=cnncf.RegressorTraining(steps=4, batch=2, warmup_steps=1, decay_every=3),
    ),
    train=TrainConfig(log_every=1, evaluate_every=2, checkpoint_every=2, keep="last"),
    platform=PlatformConfig(data_devices=1),
)
SCANS = dataclasses.replace(
    XRAYS,
    data=dataclasses.replace(
        XRAYS.data, modality="ct", working_spacing_mm=(8, 0, 0), hu_window=(-1600, 400)
    ),
)


def train(config: Config, store: Store, workdir: pathlib.Path) -> System:
    system = build(config, "cpu")
    workdirs.begin(workdir, config, store)
    assert loop.train(system, store, workdir, system.stages)
    return system


def prepared(config: Config, data: pathlib.Path) -> Store:
    """A store of six phantoms, as one X-ray or as a scan each."""
    cases = write_phantoms(
        (4, 2, 3),
        data,
        seed=0,
        size=48,
        workers=1,
        views=1 if config.data.modality == "xray" else 0,
        lesion_contrast=3,
        classes=config.data.classes,
        indicators=config.data.indicators,
    )
    contents = Contents(phantoms=True, lesion_contrast=3)
    assert preparation.prepare(cases, data, config.data, workers=1, contents=contents) == []
    return Store(data / "store", config.data)


@pytest.fixture(scope="module", params=["xray", "ct"])
def config(request: pytest.FixtureRequest) -> Config:
    return {"xray": XRAYS, "ct": SCANS}[request.param]


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`data`: a store; `run`: a network trained on it."""
    folder = tmp_path_factory.mktemp("patches")
    train(config, prepared(config, folder / "data"), folder / "run")
    return folder


def test_a_case_is_its_patches_and_its_indicators(folder: pathlib.Path, config: Config) -> None:
    store = Store(folder / "data" / "store", config.data)
    for case in store.cases():
        assert case.shape[0] >= 1
        assert case.shape[1:] == (16, 16)
        assert len(case.targets) == 5
        assert store.read(case.name, "lesion").any(axis=(1, 2)).all()  # each patch is of a lesion


def test_it_trains_and_knows_the_ends_of_each_indicator(
    folder: pathlib.Path, config: Config
) -> None:
    variables = predictor.load(folder / "run").variables
    targets = np.array([c.targets for c in Store(folder / "data" / "store").cases("train")])
    np.testing.assert_allclose(variables["scale"]["low"], targets.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(variables["scale"]["high"], targets.max(axis=0), rtol=1e-6)
    fresh = initial(build(config, "cpu"))
    assert variables.keys() == fresh.keys()
    record = json.loads((folder / "run" / "regression" / "4" / "validation.json").read_text())
    assert record["score"] == -record["mse"] < 0


def test_it_answers_in_the_indicators_units_with_the_mean_of_its_patches(
    folder: pathlib.Path, config: Config
) -> None:
    network, store = predictor.load(folder / "run"), Store(folder / "data" / "store")
    system = build(config, "cpu")
    case = max(store.cases(), key=lambda case: case.depth)
    volume = store.read(case.name, "volume")
    assert len(volume) > 1
    values = network(volume).values
    assert list(values) == list(config.data.indicators)
    each = np.mean([list(network(one[None]).values.values()) for one in volume], axis=0)
    np.testing.assert_allclose(list(values.values()), each, rtol=1e-6)
    # As a batch has it: more places than patches, of which those that repeat one do not count.
    places = np.arange(7) * len(volume) // 7
    batch: Any = {"slices": volume[places][None], "depth": np.array([len(volume)], np.int32)}
    shares = np.asarray(system.outputs(system.stages[0], network.variables, batch)["values"][0])
    low, high = (np.asarray(network.variables["scale"][name]) for name in ("low", "high"))
    np.testing.assert_allclose(low + (high - low) * shares, each, rtol=1e-5, atol=1e-6)


def test_weights_go_to_pytorch_and_back_by_the_same_bits(
    folder: pathlib.Path, config: Config, tmp_path: pathlib.Path
) -> None:
    interop = pytest.importorskip("deepsc_jax.interop.torch", reason="needs torch")
    network, system = predictor.load(folder / "run"), build(config, "cpu")
    weights = interop.variables_to_torch(system.exported(network.variables), system.torch_names)
    assert {"scale.low", "scale.high"} <= weights.keys()
    back = interop.run_variables(system, weights)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (back, network.variables))))
    interop.save_run(system, system.stages[0], back, 0.5, tmp_path / "run")
    assert predictor.load(tmp_path / "run").network.digest == network.network.digest


def test_its_step_is_planned() -> None:
    system = build(XRAYS, "cpu")
    mesh = device_mesh.make_mesh(XRAYS.platform, jax.devices()[:1])

    def products(cases: int) -> int:
        traced = compiled.trace(system, system.stages[0].name, mesh, cases, 1)
        return sum(flops.count(traced.jaxpr).values())

    assert products(4) == 2 * products(2) > 0


def test_an_indicator_that_is_the_same_in_all_training_cases_is_refused(
    folder: pathlib.Path, config: Config
) -> None:
    system = build(config, "cpu")
    cases = Store(folder / "data" / "store").cases("train")
    same = [dataclasses.replace(case, targets=(*case.targets[:4], 0.25)) for case in cases]
    with pytest.raises(InputError, match=r"noise is 0\.25 in each of the 4 training cases, two"):
        system.facts(system.stages[0], same)


def test_it_stands_beside_baselines(folder: pathlib.Path, config: Config) -> None:
    store = Store(folder / "data" / "store", config.data)
    metrics, rows = evaluate(predictor.load(folder / "run"), store, "test")
    assert list(metrics) == ["indicators", "split", "scans_sha256"]
    assert [row["targets"] for row in rows] == [
        dict(zip(CEILINGS, case.targets, strict=True)) for case in store.cases("test")
    ]
    assert list(metrics["indicators"]["each"]) == list(CEILINGS)
    require_baselines(store, "test")
    found = indicators.baselines(store, folder / "data", "test")
    assert list(found) == ["constant", "nuisances", "ridge", "oracle"]


def request_of(case: StoredCase, **changes: Any) -> Request:
    given = {"name": case.name, "path": case.scan, "lesion_mask": case.lesion_mask} | changes
    return Request(**given)


def test_it_predicts_files_as_the_store_has_them(
    folder: pathlib.Path, config: Config, tmp_path: pathlib.Path
) -> None:
    network = predictor.load(folder / "run")
    case = Store(folder / "data" / "store").cases("test")[0]
    request = request_of(case, boxes=case.boxes, lung_mask=None)
    if config.data.modality == "ct":
        request = request_of(case, lung_mask=case.lung_mask)
    (outcome,) = BatchInference(network, tmp_path, workers=0, overwrite=False).outcomes([request])
    assert outcome.error is None
    result = json.loads((tmp_path / case.name / "result.json").read_text())
    direct = network(Store(folder / "data" / "store").read(case.name, "volume")).values
    assert result["values"] == pytest.approx(direct, rel=1e-3, abs=1e-3)  # levels of 1.5e-5
    (again,) = BatchInference(network, tmp_path, workers=0, overwrite=False).outcomes([request])
    assert again.skipped
    # A result of other lesions is another.
    sources = request.sources()
    assert sources.are_of(result)
    assert not request_of(case, lesion_mask=None).sources().are_of(result)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lesion_mask": None}, "reads patches of lesions, which it does not find: give --scan"),
        ({"boxes": ((0, 0, 999, 9),)}, "box 0 0 999 9 reaches out of|--boxes: are of X-rays"),
    ],
)
def test_lesions_that_are_missing_or_elsewhere_are_one_line(
    folder: pathlib.Path, tmp_path: pathlib.Path, changes: dict, said: str
) -> None:
    network = predictor.load(folder / "run")
    case = Store(folder / "data" / "store").cases("test")[0]
    batch = BatchInference(network, tmp_path, workers=0, overwrite=False)
    (outcome,) = batch.outcomes([request_of(case, **changes)])
    assert outcome.error is not None
    assert re.search(said, outcome.error)
    assert "\n" not in outcome.error
    assert not list(tmp_path.iterdir())


def test_a_network_of_whole_scans_is_given_no_lesions() -> None:
    request = Request("a", pathlib.Path("a.png"), boxes=((0, 0, 20, 20),))
    with pytest.raises(InputError, match=r"--boxes: is given for a\.png, but this network reads"):
        request.require_readable(DataConfig())


def test_an_indicator_that_is_the_same_in_all_training_cases_is_one_line() -> None:
    system, names = build(XRAYS, "cpu"), XRAYS.data.indicators
    values: Any = [(7.0, *range(1, len(names))), (7.0, *range(2, len(names) + 1))]
    cases: Any = [types.SimpleNamespace(targets=of_case) for of_case in values]
    said = f"--indicators: {names[0]} is 7 in each of the 2 training cases, two values or more"
    with pytest.raises(InputError, match=said) as refused:
        system.facts(system.stages[0], cases)
    assert "\n" not in str(refused.value)


def test_a_step_is_the_same_on_two_devices() -> None:
    """Cases of one to three patches, so that devices have different numbers of them."""
    system = build(XRAYS, "cpu")
    (stage,) = system.stages
    rng = np.random.default_rng(0)
    batch = {
        "slices": rng.uniform(0.1, 1, (2, 3, 16, 16)).astype(np.float32),
        "depth": np.array([1, 3], np.int32),
        "label": np.zeros(2, np.int32),
        "targets": rng.uniform(size=(2, 5)).astype(np.float32),
    }
    states_after = []
    for devices in (1, 2):
        mesh = device_mesh.make_mesh(PlatformConfig(data_devices=devices), jax.devices()[:devices])
        step = make_train_step(system, stage, mesh, system.facts(stage, []))
        state = states.create(system, stage, initial(system))
        state = jax.device_put(state, device_mesh.replicated(mesh))
        after, _ = step(state, jax.device_put(batch, device_mesh.batch_sharding(mesh)))
        states_after.append(jax.device_get((after.params, after.carried)))
    # Sums of float32 in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *states_after)
