"""Distillation: a student learns the fused soft labels of its teachers (Hinton et al. 2015)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, "batch class"]
Probabilities = Float[Array, "batch class"]


def soft_labels(teachers: Sequence[Logits], temperature: float) -> Probabilities:
    """The mean of the teachers' probabilities at `temperature`: of these, not of the logits."""
    return jnp.mean(jnp.stack([jax.nn.softmax(x / temperature) for x in teachers]), axis=0)


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
    hard: Float[Array, "batch"], soft: Float[Array, "batch"], alpha: float
) -> Float[Array, "batch"]:
    """The share `alpha` of the distillation loss and the rest of the hard labels'."""
    return (1 - alpha) * hard + alpha * soft
