"""Adam with a linearly decaying learning rate (paper, V-A.3)."""

import optax

from deepsc_jax.config import Config, Stage


def learning_rate(config: Config, stage: Stage) -> optax.Schedule:
    """From the stage's initial learning rate to 0 [assumed] over its steps."""
    train = config.train
    initial = train.joint_learning_rate if stage == "joint" else train.learning_rate
    return optax.linear_schedule(initial, 0.0, train.steps(stage))


def make_optimizer(config: Config, stage: Stage) -> optax.GradientTransformation:
    """The optimizer of `stage`."""
    train = config.train
    return optax.adam(
        learning_rate(config, stage), b1=train.adam_b1, b2=train.adam_b2, eps=train.adam_eps
    )
