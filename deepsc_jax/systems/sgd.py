"""SGD with momentum, weight decay, a warm-up and steps, as `torch.optim.SGD` and `LambdaLR`."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from deepsc_jax.config import SgdConfig

WARMUP_START = 0.1  # of the rate


def rate(options: SgdConfig) -> optax.Schedule:
    """The learning rate of a step: a product of its warm-up and of its decay, from step 0 on."""

    def at(step: ArrayLike) -> Array:
        taken = jnp.asarray(step, jnp.result_type(float))
        warmed = jnp.minimum(taken / max(options.warmup_steps, 1), 1)
        warmed = WARMUP_START + (1 - WARMUP_START) * warmed if options.warmup_steps else 1
        return options.learning_rate * warmed * options.decay ** (taken // options.decay_every)

    return at


def sgd(options: SgdConfig) -> optax.GradientTransformation:
    """The optimizer, in PyTorch's order: decay joins the gradient, then momentum, then the rate."""
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay),
        optax.trace(options.momentum),
        optax.scale_by_learning_rate(rate(options)),
    )
