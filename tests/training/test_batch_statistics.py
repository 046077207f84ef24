"""Batch norm through the train step: on any number of devices the same function."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig, StageConfig
from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.models.comparators import resnet3d
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.image_classification import ImageClassification
from deepsc_jax.systems.system import initial
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

SCANS, STEPS = 8, 1  # a second step would see what Adam makes of a gradient near zero
CONFIG = Config(
    resnet3d.Options(
        widths=(2, 2),
        blocks=(1, 1),
        stem_stride=2,
        classification=StageConfig(steps=STEPS, batch=SCANS, learning_rate=1e-2),
    ),
    data=DataConfig(working_size=(8, 8), tile=(8, 8, 8), slices=8, depth_bucket=8),
)


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "slices": rng.uniform(size=(SCANS, 8, 8, 8)),
        "depth": np.full(SCANS, 8, np.int32),
        "label": np.arange(SCANS, dtype=np.int32) % 3,
    }


def run(devices: int) -> dict[str, Any]:
    """Losses, the first gradient, and the running statistics after every step, in float64."""
    platform = PlatformConfig(data_devices=devices, compute_dtype="float32")
    config = dataclasses.replace(CONFIG, platform=platform)
    layout = Layout("folded", jnp.dtype("float64"))
    system = ImageClassification(config, layout, resnet3d)
    stage, mesh = system.stages[0], device_mesh.make_mesh(platform)
    drawn = jax.device_get(initial(system))
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: jnp.asarray(x, "float64"), drawn)
        state = states.create(system, stage, variables)
        state = jax.device_put(state, device_mesh.replicated(mesh))
        facts = {"class_weights": jnp.asarray((0.7, 1.0, 1.6), "float64")}
        step = make_train_step(system, stage, mesh, facts)
        found: dict[str, Any] = {"losses": [], "statistics": []}
        for seed in range(STEPS):
            state, scalars = step(state, device_mesh.put_batch(batch(seed), mesh, DEPTH_AXES))
            found["losses"].append(float(scalars["loss"]))
            found["statistics"].append(jax.device_get(state.carried["batch_stats"]))
            if not seed:  # Adam's first moment is a tenth of the gradient
                adam: Any = state.opt_state
                found["gradient"] = jax.device_get(adam[0].mu)
    return found | {"start": drawn["batch_stats"]}


@pytest.fixture(scope="module")
def one_device() -> dict[str, Any]:
    return run(1)


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_statistics_are_of_the_global_batch(devices: int, one_device: dict[str, Any]) -> None:
    """In float64, where 1e-10 tells a wrong reduction from the order of sums."""
    found = run(devices)
    for name in ("losses", "gradient", "statistics"):
        pairs = zip(jax.tree.leaves(found[name]), jax.tree.leaves(one_device[name]), strict=True)
        for value, expected in pairs:
            np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10, err_msg=name)
    for moved, start in zip(
        *map(jax.tree.leaves, (found["statistics"][0], found["start"])), strict=True
    ):
        assert not np.allclose(moved, start)
