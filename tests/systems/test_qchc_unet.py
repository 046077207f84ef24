"""QC-HC U-Net through the whole engine, on scans that are not masked."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data import augment, preparation
from deepsc_jax.data.classes import IDS
from deepsc_jax.data.records import Contents
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.inference import predictor
from deepsc_jax.models import registry
from deepsc_jax.models.qchc_unet.config import Options, Training
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.planning import compiled
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.building import build
from deepsc_jax.systems.decoding import decode
from deepsc_jax.systems.system import System, initial
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

# No loss is better by so much, so the rate falls with the third step: after two that were no better
# than the first.
CONFIG = Config(
    model=Options(
        widths=(4, 8),
        plateau_window=1,
        plateau_patience=2,
        plateau_min_delta=100.0,
        plateau_floor=0.0,
        segmentation=Training(steps=4, batch=2, learning_rate=1e-2),
    ),
    data=DataConfig(
        mask="none",
        hu_window=(-1250, 250),
        working_spacing_mm=(16, 12, 12),
        working_size=(32, 32),
        tile=(8, 16, 16),
        depth_bucket=8,
        slices=8,
    ),
    train=TrainConfig(
        tiles_per_scan=1, foreground=0, log_every=1, evaluate_every=2, checkpoint_every=2
    ),
    platform=PlatformConfig(data_devices=1),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("data")
    cases = write_phantoms((3, 2, 2), out, seed=0, size=48, workers=1)
    assert (
        preparation.prepare(cases, out, CONFIG.data, workers=1, contents=Contents(phantoms=True))
        == []
    )
    return Store(out / "store", CONFIG.data)


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    _train(build(CONFIG, "cpu"), store, folder)
    return folder


def _train(system: System, store: Store, workdir: pathlib.Path) -> None:
    workdirs.begin(workdir, system.config, store)
    assert loop.train(system, store, workdir, system.stages)


def _leaves(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _rates(workdir: pathlib.Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_the_store_holds_whole_scans_and_the_class_of_every_voxel(store: Store) -> None:
    for case in store.cases():
        volume, lung = store.read(case.name, "volume"), store.read(case.name, "lung") > 0
        lesion, classes = store.read(case.name, "lesion") > 0, store.read(case.name, "classes")
        assert (volume[~lung] > 0).any()
        expected = (float(volume.min()), float(volume.mean()), float(volume.std()))
        np.testing.assert_allclose(case.intensity, expected, atol=1e-5)
        np.testing.assert_array_equal(classes == IDS["lesion"], lesion)
        np.testing.assert_array_equal(classes > 0, lung | lesion)
        # From the patient's right to the left.
        right, left = (
            np.nonzero(classes == IDS[name])[2].mean() for name in ("right_lung", "left_lung")
        )
        assert right + 3 < left


def test_a_mirrored_scans_left_lung_is_its_right_one() -> None:
    stage = build(CONFIG, "cpu").stages[0]
    classes = np.array([0, 1, 2, 3], np.uint8).reshape(1, 1, 1, 1, 4).repeat(2, axis=0)
    vectors = [augment.Augmentation(flip=flip).vector() for flip in (0.0, 1.0)]
    batch = {
        "tiles": jnp.zeros(classes.shape, jnp.uint16),
        "classes": jnp.asarray(classes),
        "augmentation": jnp.asarray(np.stack(vectors)),
        "intensity": jnp.asarray([[0.1, 0.5, 0.2]] * 2),
    }
    seen = decode(batch, stage.reads, CONFIG.data, CONFIG.train)["classes"]
    assert seen.ravel().tolist() == [0, 1, 2, 3, 3, 1, 2, 0]


def test_it_trains_and_its_rate_falls_on_the_plateau(run: pathlib.Path) -> None:
    variables = predictor.load(run).variables
    fresh = initial(build(CONFIG, "cpu"))
    assert variables.keys() == fresh.keys() == {"params", "batch_stats"}
    for collection in variables:
        assert _leaves(variables[collection]) != _leaves(fresh[collection])
    np.testing.assert_allclose(_rates(run), [1e-2, 1e-2, 1e-3, 1e-3], rtol=1e-6)


@pytest.mark.slow
def test_a_run_resumed_before_the_plateau_has_the_same_bits(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    """As if it was killed after step 2, and had lost the checkpoint of step 4."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "segmentation" / "4")
    system = build(CONFIG, "cpu")
    _train(system, store, again)
    like = predictor.abstract_state(system, system.stages[0])
    states = []
    for folder in (run, again):
        checkpoints = loop.Checkpoints(folder / "segmentation")
        states.append(checkpoints.load(like, 4)["state"])
        checkpoints.close()
    assert _leaves(states[0]) == _leaves(states[1])
    assert _rates(again) == _rates(run)


def test_it_is_evaluated_by_lesions_and_lungs(run: pathlib.Path, store: Store) -> None:
    metrics, rows = evaluate(predictor.load(run), store, "test")
    assert "lesions" in metrics
    assert metrics["lungs"].keys() == {
        f"{side}_lung_{figure}" for side in ("left", "right") for figure in ("dsc", "wrong_side")
    }
    assert len(rows) == 2


@pytest.mark.parametrize("depth", [5, 19])
def test_it_predicts_as_the_reference_does(depth: int, run: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    from reference import qchc_unet as reference

    from deepsc_jax.interop.torch import variables_to_torch

    network = predictor.load(run)
    module = reference.network(CONFIG).eval()
    module.load_state_dict(variables_to_torch(network.variables, registry.torch_names("qchc_unet")))
    volume = np.random.default_rng(0).uniform(size=(depth, 32, 32)).astype(np.float32)
    prediction = network(volume)
    expected, _ = reference.predict(module, CONFIG, torch.from_numpy(volume))
    assert tuple(prediction.volumes) == network.network.volumes
    assert prediction.volumes.keys() == expected.keys()
    for name, found in prediction.volumes.items():
        np.testing.assert_allclose(found, expected[name].numpy(), atol=1e-4)


def test_weights_go_to_pytorch_and_back_by_the_same_bits(
    run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    torch_names = pytest.importorskip("deepsc_jax.interop.torch", reason="needs torch")
    network = predictor.load(run)
    table = registry.torch_names("qchc_unet")
    weights = torch_names.variables_to_torch(network.variables, table)
    system = build(CONFIG, "cpu")
    back = torch_names.variables_from_torch(weights, table, torch_names.expected(system))
    assert _leaves(back) == _leaves(network.variables)
    torch_names.save_run(system, system.stages[0], back, 0.5, tmp_path / "run")
    assert predictor.load(tmp_path / "run").network.digest == network.network.digest


def test_its_step_is_planned() -> None:
    system = build(CONFIG, "cpu")
    mesh = device_mesh.make_mesh(CONFIG.platform, jax.devices()[:1])
    assert compiled.trace(system, "segmentation", mesh, 2, 16).jaxpr.eqns


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"widths": (8,)}, "at least two levels"),
        ({"widths": (8, 12)}, "give each twice the one before"),
        ({"identity": True, "cascade": False}, "give cascade"),
        ({"hypercolumns": False, "hypercolumn_bottleneck": True}, "give both"),
        ({"voxel_classes": ("lesion", "background")}, "give background first"),
        ({"overlap": 1.0}, "give a share below 1"),
        ({"tversky_epsilon": 0.0}, "it must be above 0"),
        ({"plateau_window": 0}, "plateau_window is 0"),
        ({"plateau_factor": 1.0}, "plateau_factor is 1"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Options(**changes)


@pytest.mark.parametrize(
    ("data", "platform", "reason"),
    [
        ({"mask": "lungs"}, {}, "what is given needs not be found"),
        ({"tile": (64, 120, 128), "working_size": (480, 512)}, {}, "need multiples of 16"),
        ({"tile": (16, 128, 128)}, {"space": 2}, "a depth of 32 with space = 2"),
        ({}, {"accumulation": 2}, "accumulation is 2"),
    ],
)
def test_data_and_platform_that_do_not_fit_are_refused(
    data: dict[str, Any], platform: dict[str, Any], reason: str
) -> None:
    Options().check(DataConfig(mask="none"), PlatformConfig())
    given: dict[str, Any] = {"mask": "none"} | data
    with pytest.raises(ValueError, match=reason):
        Options().check(DataConfig(**given), PlatformConfig(**platform))
