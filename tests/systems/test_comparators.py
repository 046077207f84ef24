"""Networks through the whole engine: train, resume, evaluate, predict, weights."""

import dataclasses
import pathlib
import shutil
from typing import Any

import handful
import jax
import numpy as np
import pytest

from deepsc_jax.config import Config, StageConfig
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.inference import predictor
from deepsc_jax.models.cnncf import config as cnncf
from deepsc_jax.models.comparators import resnet3d, unet3d
from deepsc_jax.planning import compiled, flops
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import System, initial
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

OPTIONS = {
    "unet3d": unet3d.Options(
        widths=(4, 4), segmentation=unet3d.Training(steps=4, batch=2, learning_rate=1e-2)
    ),
    "resnet3d": resnet3d.Options(
        widths=(2, 2),
        blocks=(1, 1),
        stem_stride=2,
        classification=StageConfig(steps=4, batch=2, learning_rate=1e-2),
    ),
    "cnncf": cnncf.Options(
        stem=2,
        stage1_widths=(2, 2, 2),
        stage2_widths=(2, 2, 2),
        mix="full",
        gate_window=1,
        gate_sensitivity=0,
        gate_count=2,
        classification=cnncf.Training(steps=4, batch=2, warmup_steps=1, decay_every=3),
    ),
}
NAMES = pytest.mark.parametrize("name", OPTIONS)


def config_of(name: str) -> Config:
    return dataclasses.replace(handful.CONFIG, model=OPTIONS[name])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(handful.write(tmp_path_factory.mktemp("data")) / "store", handful.CONFIG.data)


@pytest.fixture(scope="module")
def runs(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A whole run of each network."""
    folders = {name: tmp_path_factory.mktemp(name) for name in OPTIONS}
    for name, folder in folders.items():
        _train(build(config_of(name), "cpu"), store, folder)
    return folders


def _train(system: System, store: Store, workdir: pathlib.Path) -> None:
    workdirs.begin(workdir, system.config, store)
    assert loop.train(system, store, workdir, system.stages)


def _leaves(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@NAMES
def test_it_trains_and_what_it_carries_moves(name: str, runs: dict[str, pathlib.Path]) -> None:
    variables = predictor.load(runs[name]).variables
    fresh = initial(build(config_of(name), "cpu"))
    assert variables.keys() == fresh.keys()
    assert ("batch_stats" in variables) == (name != "unet3d")
    for collection in variables:
        assert _leaves(variables[collection]) != _leaves(fresh[collection])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "unet3d" else pytest.mark.slow) for n in OPTIONS]
)
def test_a_resumed_run_has_the_same_bits(
    name: str, runs: dict[str, pathlib.Path], store: Store, tmp_path: pathlib.Path
) -> None:
    """As if it was killed after step 2, and had lost the checkpoint of step 4."""
    again = tmp_path / "run"
    shutil.copytree(runs[name], again)
    system = build(config_of(name), "cpu")
    shutil.rmtree(again / system.stages[0].name / "4")
    _train(system, store, again)
    like = predictor.abstract_state(system, system.stages[0])
    states = []
    for folder in (runs[name], again):
        checkpoints = loop.Checkpoints(folder / system.stages[0].name)
        states.append(checkpoints.load(like, 4)["state"])
        checkpoints.close()
    assert _leaves(states[0]) == _leaves(states[1])


@NAMES
def test_it_is_evaluated_by_what_it_gives(
    name: str, runs: dict[str, pathlib.Path], store: Store
) -> None:
    metrics, rows = evaluate(predictor.load(runs[name]), store, "test")
    assert ("lesions" in metrics, "classes" in metrics) == (name == "unet3d", name != "unet3d")
    assert len(rows) == 3


@NAMES
def test_it_predicts_scans_of_any_depth(name: str, runs: dict[str, pathlib.Path]) -> None:
    network = predictor.load(runs[name])
    rng = np.random.default_rng(0)
    for depth in (5, 19):
        volume = rng.uniform(size=(depth, 24, 32)).astype(np.float32)
        prediction = network(volume)
        assert (*prediction.volumes, *prediction.evidence) == network.network.volumes
        if name == "unet3d":
            assert prediction.lesion is not None
            assert prediction.lesion.shape == volume.shape
            assert prediction.classes is None
        else:
            assert prediction.classes is not None
            np.testing.assert_allclose(prediction.classes.sum(), 1, rtol=1e-6)
        # A step is a judgement, if its batch has a positive: the second's and the third's have. So
        # the gate is shut in the checkpoint of step 2, and open in that of step 4.
        best = bool(network.variables.get("gate", {}).get("open", False))
        said = "gate: open since step 3" if best else "gate: closed, answered by stage I"
        assert prediction.notes == ((said,) if name == "cnncf" else ())


def test_padding_of_depth_changes_nothing() -> None:
    """The same scan in a deeper bucket: of a tile only its real slices count."""
    system = build(config_of("unet3d"), "cpu")
    variables = initial(system)
    tiles = np.random.default_rng(0).uniform(size=(1, 1, 8, 24, 32)).astype(np.float32)
    tiles[:, :, 5:] = 0
    batch = {"tiles": tiles, "origins": np.zeros((1, 1, 3), np.int32), "depth": np.array([5])}
    shallow = system.outputs(system.stages[0], variables, batch)["lesion"]
    tiles[:, :, 5:] = 0.7  # what lies past the depth is not read
    again = system.outputs(system.stages[0], variables, batch)["lesion"]
    np.testing.assert_array_equal(shallow[:, :, :5], again[:, :, :5])


@NAMES
def test_weights_go_to_pytorch_and_back_by_the_same_bits(
    name: str, runs: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    torch_names = pytest.importorskip("deepsc_jax.interop.torch", reason="needs torch")
    network = predictor.load(runs[name])
    system = build(config_of(name), "cpu")
    exported = system.exported(network.variables)
    weights = torch_names.variables_to_torch(exported, system.torch_names)
    back = torch_names.run_variables(system, weights)
    assert _leaves(back) == _leaves(network.variables)
    torch_names.save_run(system, system.stages[0], back, 0.5, tmp_path / "run")
    assert predictor.load(tmp_path / "run").network.digest == network.network.digest


@NAMES
def test_its_step_is_planned(name: str) -> None:
    system = build(config_of(name), "cpu")
    mesh = device_mesh.make_mesh(system.config.platform, jax.devices()[:1])

    def products(scans: int) -> int:
        traced = compiled.trace(system, system.stages[0].name, mesh, scans, 16)
        return sum(flops.count(traced.jaxpr).values())

    assert products(4) == 2 * products(2) > 0


def test_parts_of_a_batch_with_statistics_are_refused_where_it_is_planned_and_trained() -> None:
    platform = dataclasses.replace(handful.CONFIG.platform, accumulation=2)
    for name in ("unet3d", "resnet3d"):  # CNNCF's options refuse it before
        system = build(dataclasses.replace(config_of(name), platform=platform), "cpu")
        mesh = device_mesh.make_mesh(platform, jax.devices()[:1])
        if name == "resnet3d":
            with pytest.raises(InputError, match="--accumulation=2: --model=resnet3d normalises"):
                compiled.trace(system, system.stages[0].name, mesh, 2, 16)
        else:
            compiled.trace(system, system.stages[0].name, mesh, 2, 16)


def test_a_stage_that_a_model_has_not_is_refused(runs: dict[str, pathlib.Path]) -> None:
    with pytest.raises(InputError, match=r"--stage=joint: --model=unet3d has the stages segment"):
        predictor.load(runs["unet3d"], "joint")


def test_a_run_of_another_model_does_not_go_on(runs: dict[str, pathlib.Path], store: Store) -> None:
    said = "a run of --model=unet3d is here, and --model=resnet3d was asked for: give another"
    with pytest.raises(InputError, match=said):
        workdirs.begin(runs["unet3d"], config_of("resnet3d"), store)
