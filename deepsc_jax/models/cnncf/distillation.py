"""Distillation: a student learns the fused soft labels of its teachers (Hinton et al. 2015)."""

import dataclasses

import jax
from jaxtyping import Array, Float

from deepsc_jax.models.cnncf.config import Options
from deepsc_jax.models.cnncf.residual import BASIC, BOTTLENECK, TEACHERS

Logits = Float[Array, "batch class"]
Probabilities = Float[Array, "batch class"]


def teachers(options: Options) -> tuple[Options, ...]:
    """The options of each teacher's network: TS1 to TS4 of the authors' files, as many as asked."""
    kinds = {BASIC: "basic", BOTTLENECK: "bottleneck"}
    return tuple(
        dataclasses.replace(
            options,
            variant="published",
            published_blocks=shape.blocks,
            published_kernels=kinds[shape.kernels],
        )
        for shape in TEACHERS[: options.teachers]
    )


def soft_labels(logits: Float[Array, "batch teacher class"], temperature: float) -> Probabilities:
    """The mean of the teachers' probabilities at `temperature`: of these, not of the logits."""
    return jax.nn.softmax(logits / temperature).mean(axis=1)


def distillation_loss(
    logits: Logits, soft: Probabilities, temperature: float
) -> Float[Array, "batch"]:
    """T² KL(soft || softmax(logits / T)) of each example, summed over the classes.

    Its batch mean is torch's `F.kl_div(..., reduction="batchmean")` times T². The authors' copy of
    a public project divides by the classes as well, by `nn.KLDivLoss()`'s default.
    """
    student = jax.nn.log_softmax(logits / temperature)
    divergence = (jax.scipy.special.xlogy(soft, soft) - soft * student).sum(axis=-1)
    return temperature**2 * divergence


def student_loss(
    hard: Float[Array, "batch"], soft: Float[Array, "batch"], weight: float
) -> Float[Array, "batch"]:
    """The share `weight` of the distillation loss and the rest of the hard labels'."""
    return (1 - weight) * hard + weight * soft
