"""QC-HC U-Net's maps, and its steps on several devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import draw_params

from deepsc_jax.config import Config, DataConfig, PlatformConfig
from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.models.qchc_unet import network as qchc
from deepsc_jax.models.qchc_unet.config import Options, Training
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.building import build
from deepsc_jax.systems.patch_segmentation import PatchSegmentation
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

TILE = (4, 8, 8)
CONFIG = Config(
    model=Options(
        widths=(4, 8),
        plateau_window=1,
        plateau_patience=1,
        plateau_min_delta=100.0,
        segmentation=Training(steps=3, batch=8, learning_rate=1e-3),
    ),
    data=DataConfig(mask="none", tile=TILE, working_size=(8, 8), depth_bucket=4),
)


def test_maps_are_named_finest_first_and_can_be_perturbed():
    network = qchc.build(Options(widths=(4, 8)), CONFIG.data, Layout())
    x = jnp.ones((1, *TILE, 1))
    drawn = draw_params(network, x)
    variables = {name: tree for name, tree in drawn.items() if name != "perturbations"}
    out: Any = jax.eval_shape(lambda: network.apply(variables, x))
    shapes = {name: leaf.shape for name, leaf in out["maps"].items()}
    assert shapes == {"level1": (1, 4, 8, 8, 4), "level2": (1, 2, 4, 4, 8)}
    assert {name: leaf.shape for name, leaf in drawn["perturbations"].items()} == shapes


def batch() -> dict[str, np.ndarray]:
    """Eight scans of a tile each."""
    rng = np.random.default_rng(0)
    return {
        "tiles": rng.uniform(size=(8, 1, *TILE)),
        "classes": rng.integers(0, 4, (8, 1, *TILE)).astype(np.int32),
        "origins": np.zeros((8, 1, 3), np.int32),
        "intensity": np.stack([rng.uniform(0.1, 0.5, 3) for _ in range(8)]),
        "depth": np.full(8, 4, np.int32),
        "label": np.zeros(8, np.int32),
    }


@pytest.mark.slow
def test_steps_with_a_plateau_are_the_same_on_any_number_of_devices():
    with jax.enable_x64(True):
        layout = dataclasses.replace(build(CONFIG, "cpu").layout, dtype=jnp.dtype("float64"))
        system = PatchSegmentation(CONFIG, layout, qchc)
        stage = system.stages[0]
        drawn = draw_params(system.network, jnp.zeros((1, *TILE, 1)))
        variables = {
            # On the host: a step gives its state's arrays on a device away.
            name: jax.tree.map(lambda x: np.asarray(x, "float64"), tree)
            for name, tree in drawn.items()
            if name != "perturbations"
        }
        results = []
        for count in (1, 2, 4, 8):
            mesh = device_mesh.make_mesh(PlatformConfig(data_devices=count))
            state = states.create(system, stage, variables)
            state = jax.device_put(state, device_mesh.replicated(mesh))
            step, rates = make_train_step(system, stage, mesh, {}), []
            for _ in range(3):
                state, scalars = step(state, device_mesh.put_batch(batch(), mesh, DEPTH_AXES))
                rates.append(float(scalars["learning_rate"]))
            np.testing.assert_allclose(rates, [1e-3, 1e-4, 1e-4])
            results.append(jax.device_get((state.params, state.carried)))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * max(np.abs(a).max(), 1))
