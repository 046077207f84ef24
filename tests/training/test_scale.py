"""One train step for any mesh: the same losses, gradients and parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest
from drawn import masked_volume
from parity_network import draw, system_of

from deepsc_jax.config import Config, DataConfig, PlatformConfig
from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.models.deepsc.config import JointTraining, PreTraining
from deepsc_jax.models.layers import bands
from deepsc_jax.runtime import compiler, device_mesh
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

pytestmark = pytest.mark.scale

# Four scans, each of two tiles whose depth four devices share, with eight slices a device.
TILE, DEPTHS = (32, 8, 8), (50, 64, 37, 9)
CONFIG = Config(
    data=DataConfig(working_size=(8, 8), tile=TILE, slices=8, depth_bucket=64),
    model=dataclasses.replace(
        smallest.MODEL,
        segmentation=PreTraining(batch=4),
        classification=PreTraining(batch=4),
        joint=JointTraining(batch=4),
    ),
)
STAGES = ("segmentation", "classification", "joint")
CLASS_WEIGHTS = (0.7, 1.0, 1.6)
STEPS = 2


def batch(seed: int) -> dict[str, np.ndarray]:
    """All tiles and slices of four scans; zeros behind each scan's depth."""
    volumes = np.zeros((4, 64, *TILE[1:]))
    for i, depth in enumerate(DEPTHS):
        volumes[i, :depth] = masked_volume((1, depth, *TILE[1:]), seed=4 * seed + i)[0]
    rng = np.random.default_rng(seed)
    lesions = (rng.uniform(size=volumes.shape) < 0.3) & (volumes > 0)
    slices = [v[np.arange(8) * depth // 8] for v, depth in zip(volumes, DEPTHS, strict=True)]
    return {
        "tiles": volumes.reshape(4, 2, *TILE),
        "lesions": lesions.reshape(4, 2, *TILE).astype(float),
        "origins": np.tile(np.asarray([[0, 0, 0], [32, 0, 0]], np.int32), (4, 1, 1)),
        "slices": np.stack(slices),
        "depth": np.asarray(DEPTHS, np.int32),
        "label": np.asarray([0, 1, 2, 0], np.int32),
    }


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands in rows as short as these scans'."""
    monkeypatch.setattr(bands, "BAND_GROUPS", 1)


def run(name: str, dtype: str, **platform: Any) -> tuple[list[float], list[Any]]:
    """The loss of every step, and the first gradient and the last parameters."""
    choice = PlatformConfig(compute_dtype="float32", **platform)
    config = dataclasses.replace(CONFIG, platform=choice)
    system = system_of(config, dtype=dtype)
    stage = system.stage(name)
    mesh = device_mesh.make_mesh(choice)
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), draw(CONFIG))
        state = states.create(system, stage, {"params": params})
        where = states.sharding(state, mesh, shard_optimizer=choice.shard_optimizer)
        state = jax.device_put(state, where)
        facts = {"class_weights": jnp.asarray(CLASS_WEIGHTS, dtype)}
        step: Any = make_train_step(system, stage, mesh, facts, where)
        losses, gradient = [], None
        for seed in range(STEPS):
            arrays = {
                name: x.astype(dtype) if x.dtype.kind == "f" else x
                for name, x in batch(seed).items()
            }
            state, scalars = step(state, device_mesh.put_batch(arrays, mesh, DEPTH_AXES))
            losses.append(float(scalars["loss"]))
            if gradient is None:
                adam: Any = state.opt_state
                gradient = jax.tree.map(lambda m: np.asarray(m) / 0.1, adam[0].mu)
        assert step.program._cache_size() == 1
        return losses, [gradient, jax.tree.map(np.asarray, state.params)]


def difference(found: Any, expected: Any) -> float:
    """Largest difference of two trees over the largest magnitude."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    return max(np.abs(f - e).max() for f, e in pairs) / max(np.abs(e).max() for _, e in pairs)


def assert_same(found: Any, expected: Any) -> None:
    """Losses and both trees of two float64 runs, up to the order of sums."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
    for tree, wanted in zip(found[1], expected[1], strict=True):
        assert difference(tree, wanted) <= 1e-10


@pytest.fixture(scope="module")
def one_device() -> Any:
    """What one device computes: once for each stage and type."""
    found: dict[tuple[str, str], Any] = {}

    def get(stage: str, dtype: str) -> Any:
        if (stage, dtype) not in found:
            found[stage, dtype] = run(stage, dtype, data_devices=1)
        return found[stage, dtype]

    return get


slow = pytest.mark.slow
LEVERS = {
    "shard_optimizer": True,
    "accumulation": 2,
    "remat": "all",
    "tile_loop": "loop",
    "conv_form": "banded",
}
LAYOUTS = [
    pytest.param({"data_devices": 2, "space": 2, "shard_optimizer": True}, id="2x2-zero"),
    pytest.param({"data_devices": 4}, id="4x1", marks=slow),
    pytest.param(
        {"data_devices": 1, "space": 4, "conv_form": "banded"}, id="1x4-banded", marks=slow
    ),
    pytest.param({"data_devices": 1, **LEVERS}, id="1x1-levers", marks=slow),
    pytest.param({"data_devices": 2, "space": 4, **LEVERS}, id="2x4-levers", marks=slow),
]


@pytest.mark.parametrize("platform", LAYOUTS)
@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=() if s == "joint" else slow) for s in STAGES]
)
def test_any_mesh_computes_what_one_device_does(stage: Any, platform: dict, one_device: Any):
    # float64 tells a wrong reduction from rounding.
    assert_same(run(stage, "float64", **platform), one_device(stage, "float64"))


def assert_near(found: Any, expected: Any) -> None:
    """Losses and the first step's gradient of two float32 runs."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    assert difference(found[1][0], expected[1][0]) <= 1e-4


@slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_compilers_options_for_large_tiles_change_no_number(
    dtype: str, one_device: Any, monkeypatch: Any
):
    expected = one_device("joint", dtype)  # before they are changed
    few = compiler.options("cpu", TILE, "folded")
    monkeypatch.setattr(compiler, "LARGE_TILE", 1)
    assert compiler.options("cpu", TILE, "folded").keys() > few.keys()
    found = run("joint", dtype, data_devices=1)
    (assert_same if dtype == "float64" else assert_near)(found, expected)


@slow
@pytest.mark.parametrize("platform", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_any_mesh_computes_what_one_device_does_in_float32(
    stage: Any, platform: dict, one_device: Any
):
    assert_near(run(stage, "float32", **platform), one_device(stage, "float32"))
