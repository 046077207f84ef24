"""Thirty training steps of every stage against the reference's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import DTYPES, TRAINING, relative, to_tensors
from parity_network import CLASS_WEIGHTS, CONFIG, batch, draw, system_of, to_jax
from reference.deepsc import training as reference
from reference.deepsc.network import DeepSC

from deepsc_jax.config import PlatformConfig
from deepsc_jax.interop.torch import from_torch, to_torch
from deepsc_jax.models.deepsc.torch_names import TORCH_NAMES
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["segmentation", "classification", "joint"])
def test_thirty_steps(stage: str, dtype: str, within: Any):
    # As it trains on this device, but for the precision.
    system = system_of(CONFIG, jax.default_backend(), dtype)
    chosen = system.stage(stage)
    params = draw(CONFIG)
    batches = [batch(seed, depths=(11, 5 + seed % 7)) for seed in range(30)]

    module = DeepSC(CONFIG).to(getattr(torch, dtype))
    module.load_state_dict(to_torch(params, TORCH_NAMES))
    weights = torch.tensor(CLASS_WEIGHTS, dtype=getattr(torch, dtype))
    theirs = list(reference.train(module, stage, (to_tensors(b, dtype) for b in batches), weights))

    with jax.enable_x64(dtype == "float64"):
        mesh = device_mesh.make_mesh(PlatformConfig(data_devices=1))
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        state = states.create(system, chosen, {"params": cast})
        current = jax.device_put(state, device_mesh.replicated(mesh))
        facts = {"class_weights": jnp.asarray(CLASS_WEIGHTS, dtype)}
        step = make_train_step(system, chosen, mesh, facts)
        ours = []
        for arrays in batches:
            current, scalars = step(
                current, jax.device_put(to_jax(arrays, dtype), device_mesh.batch_sharding(mesh))
            )
            ours.append({name: float(scalars[name]) for name in theirs[0]})
        final = jax.tree.map(np.asarray, current.params)

    bound = TRAINING[dtype]
    error = max(relative(o["loss"], t["loss"]) for o, t in zip(ours, theirs, strict=True))
    measured = {"loss at each step": (error, bound)}
    if dtype == "float64":  # in float32 Adam turns rounding into steps
        last = relative(final, from_torch(module.state_dict(), TORCH_NAMES))
        measured["parameters at the end"] = (last, bound)
    within(f"30 steps, {stage}", dtype, measured)
