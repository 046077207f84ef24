"""Learning rates and optimizers from the shared options of training."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from deepsc_jax.config import StageOptions, TrainConfig
from deepsc_jax.runtime.types import PyTree


def learning_rate(train: TrainConfig, stage: StageOptions) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then `train.schedule` down to 0.

    `train.rate_batch` scales it with the stage's batch (Goyal et al. 2017; linear).
    """
    peak = stage.learning_rate
    if train.rate_batch:
        peak *= stage.batch / train.rate_batch
    warm = min(train.warmup_steps, stage.steps)

    def rate(step: ArrayLike) -> Array:
        # optax's schedules stay in float32 where everything else is float64.
        taken = jnp.clip(jnp.asarray(step, jnp.result_type(float)), 0, stage.steps)
        done = jnp.clip((taken - warm) / max(stage.steps - warm, 1), 0, 1)
        share = {
            "linear": 1 - done,
            "cosine": (1 + jnp.cos(jnp.pi * done)) / 2,
            "constant": jnp.ones_like(done),
        }[train.schedule]
        return peak * (jnp.where(taken < warm, (taken + 1) / warm, share) if warm else share)

    return rate


def chosen(train: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The one that `train.optimizer` names."""
    return adam(train, schedule) if train.optimizer == "adam" else sgd(train, schedule)


def sgd(train: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum; `weight_decay` of kernels is added to their gradients.

    As `torch.optim.SGD(nesterov=True)`.
    """
    steps: list[optax.GradientTransformation] = []
    if train.clip_norm:
        steps.append(optax.clip_by_global_norm(train.clip_norm))
    if train.weight_decay:
        steps.append(optax.add_decayed_weights(train.weight_decay, mask=_kernels))
    return optax.chain(*steps, optax.sgd(schedule, momentum=train.momentum, nesterov=True))


def adam(train: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam; AdamW (Loshchilov and Hutter 2019) with `weight_decay`; clipped by `clip_norm`.

    Kernels alone decay: not norms, biases, or the scalars of a cross-stitch unit.
    """
    steps: list[optax.GradientTransformation] = [
        optax.adamw(
            schedule,
            b1=train.adam_b1,
            b2=train.adam_b2,
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            mask=_kernels,
        )
        if train.weight_decay
        else optax.adam(schedule, b1=train.adam_b1, b2=train.adam_b2, eps=train.adam_eps)
    ]
    if train.clip_norm:
        steps.insert(0, optax.clip_by_global_norm(train.clip_norm))
    return steps[0] if len(steps) == 1 else optax.chain(*steps)


def _kernels(params: PyTree) -> PyTree:
    """True for the kernels of convolutions and matrices."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def averaged(average: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """The exponential moving average of the parameters after `step` steps.

    Its decay rises to `decay` as (1 + n) / (10 + n), so that it forgets the initial parameters.
    """
    taken = step.astype(jnp.result_type(float))
    kept = jnp.minimum(decay, (1 + taken) / (10 + taken))
    return jax.tree.map(lambda a, p: (kept * a + (1 - kept) * p).astype(a.dtype), average, params)
