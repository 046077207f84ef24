"""SGD with momentum, weight decay, warm-up and steps against `torch.optim.SGD`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from parity import DTYPES, TRAINING, relative
from reference.cnncf import rate

from deepsc_jax.config import SgdConfig
from deepsc_jax.systems.sgd import sgd


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_steps(dtype: str, within: Any):
    options = SgdConfig(
        steps=20, learning_rate=0.1, weight_decay=0.3, warmup_steps=4, decay_every=12, decay=0.5
    )
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=7), rng.normal(size=(20, 7))
    theirs = torch.nn.Parameter(torch.tensor(start, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.SGD(
        [theirs], options.learning_rate, momentum=options.momentum, weight_decay=0.3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(options, step))
    with jax.enable_x64(dtype == "float64"):
        ours, made, worst = jnp.asarray(start, dtype), sgd(options), 0.0
        state = made.init(ours)
        for gradient in gradients:
            theirs.grad = torch.tensor(gradient, dtype=theirs.dtype)
            optimizer.step()
            schedule.step()
            updates, state = made.update(jnp.asarray(gradient, dtype), state, ours)
            ours = jnp.asarray(optax.apply_updates(ours, updates))
            worst = max(worst, relative(ours, theirs.detach().numpy()))
    within("SGD", dtype, {"parameters at each step": (worst, TRAINING[dtype])})
