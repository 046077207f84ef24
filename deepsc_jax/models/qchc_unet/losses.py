"""What QC-HC U-Net is trained by: Tversky indices of all classes, and cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SPACE = (1, 2, 3)


def losses(
    logits: Float[Array, "batch depth height width class"],
    truth: Int[Array, "batch depth height width"],
    alpha: float,
    beta: float,
    epsilon: float,
) -> dict[str, Float[Array, "batch"]]:
    """Each patch's `tversky`, `cross_entropy` and `loss`, their sum (paper, equations 9 to 11).

    `tversky` is the number of classes less the sum of their Tversky indices, the background's among
    them (MIScnn's `tversky_crossentropy`). A class that is absent from a patch costs 1, almost
    without a gradient, unless none of it is predicted; so values compare on the same patches only.

    Args:
      logits: of every class.
      truth: class ids.
      alpha: of false negatives.
      beta: of false positives.
      epsilon: added above and below each fraction.
    """
    log_probability = jax.nn.log_softmax(logits)
    probability = jnp.exp(log_probability)
    target = jax.nn.one_hot(truth, logits.shape[-1], dtype=logits.dtype)
    overlap = (probability * target).sum(SPACE)
    missed = ((1 - probability) * target).sum(SPACE)
    spurious = (probability * (1 - target)).sum(SPACE)
    index = (overlap + epsilon) / (overlap + alpha * missed + beta * spurious + epsilon)
    tversky = (1 - index).sum(axis=-1)
    cross_entropy = -(log_probability * target).sum(axis=-1).mean(SPACE)
    return {
        "tversky": tversky,
        "cross_entropy": cross_entropy,
        "loss": tversky + cross_entropy,
    }
