"""Adam with a linearly decaying learning rate (paper, V-A.3)."""

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from deepsc_jax.config import Config, Stage


def learning_rate(config: Config, stage: Stage) -> optax.Schedule:
    """From the stage's initial learning rate to 0 [assumed] over its steps.

    As optax's linear schedule, which stays in float32 where everything else is float64.
    """
    train, steps = config.train, config.train.steps(stage)
    initial = train.joint_learning_rate if stage == "joint" else train.learning_rate

    def rate(step: ArrayLike) -> Array:
        taken = jnp.clip(jnp.asarray(step, jnp.result_type(float)), 0, steps)
        return initial * (1 - taken / steps)

    return rate


def make_optimizer(config: Config, stage: Stage) -> optax.GradientTransformation:
    """The optimizer of `stage`."""
    train = config.train
    return optax.adam(
        learning_rate(config, stage), b1=train.adam_b1, b2=train.adam_b2, eps=train.adam_eps
    )
