"""Thirty steps with a plateau in them against PyTorch's Adam and `ReduceLROnPlateau`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import draw_params
from parity import TRAINING, relative, to_tensors
from reference import qchc_unet as reference

from deepsc_jax.config import Config, DataConfig, PlatformConfig
from deepsc_jax.interop.torch import from_torch, variables_to_torch
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.models.qchc_unet import network as qchc
from deepsc_jax.models.qchc_unet.config import Options, Training
from deepsc_jax.models.qchc_unet.torch_names import TORCH_NAMES
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.building import build
from deepsc_jax.systems.patch_segmentation import PatchSegmentation
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

TILE = (4, 8, 8)
# The first window of three steps is the best; after two that are not better by so much, at step 9,
# the rate falls; one does not count, so that it falls again at step 18, to its floor.
CONFIG = Config(
    model=Options(
        widths=(4, 8),
        plateau_window=3,
        plateau_patience=2,
        plateau_min_delta=100.0,
        plateau_floor=3e-5,
        segmentation=Training(steps=30, batch=2, learning_rate=1e-3),
    ),
    data=DataConfig(mask="none", tile=TILE, working_size=(8, 8), depth_bucket=4),
)


def batch(seed: int) -> dict[str, np.ndarray]:
    """Two scans of two tiles each, with the class of every voxel."""
    rng = np.random.default_rng(seed)
    return {
        "tiles": rng.uniform(size=(2, 2, *TILE)).astype(np.float32),
        "classes": rng.integers(0, 4, (2, 2, *TILE)).astype(np.int32),
        "origins": np.zeros((2, 2, 3), np.int32),
        "intensity": np.array([[0.1, 0.5, 0.3], [0.0, 0.4, 0.2]], np.float32),
        "depth": np.array([4, 4], np.int32),
        "label": np.array([0, 1], np.int32),
    }


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_thirty_steps(dtype: str, within: Any):
    system = build(CONFIG, jax.default_backend())
    system = PatchSegmentation(
        CONFIG, dataclasses.replace(system.layout, dtype=jnp.dtype(dtype)), qchc
    )
    stage = system.stages[0]
    drawn = draw_params(system.network, jnp.zeros((1, *TILE, 1)))
    variables = {name: tree for name, tree in drawn.items() if name != "perturbations"}
    batches = [batch(seed) for seed in range(30)]

    module = reference.network(CONFIG).to(getattr(torch, dtype)).train()
    module.load_state_dict(variables_to_torch(variables, TORCH_NAMES))
    tensors = (to_tensors(b, dtype) for b in batches)
    theirs = list(reference.train(module, CONFIG, stage.name, tensors, torch.ones(3)))
    assert [t["learning_rate"] for t in theirs] == pytest.approx(
        8 * [1e-3] + 9 * [1e-4] + 13 * [3e-5]
    )

    with jax.enable_x64(dtype == "float64"):
        mesh = device_mesh.make_mesh(PlatformConfig(data_devices=1))
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
        state = jax.device_put(states.create(system, stage, cast), device_mesh.replicated(mesh))
        step, ours = make_train_step(system, stage, mesh, {}), []
        for arrays in batches:
            floats = {
                k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in arrays.items()
            }
            state, scalars = step(state, jax.device_put(floats, device_mesh.batch_sharding(mesh)))
            ours.append({name: float(scalars[name]) for name in theirs[0]})
        params, stats = jax.device_get((state.params, state.carried[BATCH_STATS]))

    bound = TRAINING[dtype]
    measured = {}
    for name, title in (("loss", "loss at each step"), ("learning_rate", "rate at each step")):
        error = max(relative(o[name], t[name]) for o, t in zip(ours, theirs, strict=True))
        measured[title] = (error, bound)
    if dtype == "float64":  # in float32 Adam turns rounding into steps
        weights = module.state_dict()
        measured["parameters at the end"] = (
            relative(params, from_torch(weights, TORCH_NAMES)),
            bound,
        )
        measured["statistics at the end"] = (
            relative(stats, from_torch(weights, TORCH_NAMES, collection=BATCH_STATS)),
            bound,
        )
    within("30 steps, QC-HC U-Net", dtype, measured)
