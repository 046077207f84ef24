"""The cross-stitch unit (paper, IV-B.2; Misra et al. 2016)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class CrossStitch(nn.Module):
    """Four learnable scalars that mix the two tasks' features.

    `start` holds the initial values on and off the diagonal. Returns
    `[[a_LL, a_LC], [a_CL, a_CC]]`; the identity, without parameters, where `enabled` is false.
    """

    enabled: bool
    start: tuple[float, float]

    @nn.compact
    def __call__(self) -> Float[Array, "2 2"]:
        if not self.enabled:
            return jnp.eye(2)
        on, off = self.start

        def initial(_: Array, shape: tuple[int, ...]) -> Array:
            return jnp.full(shape, off, jnp.float32).at[jnp.diag_indices(2)].set(on)

        return self.param("weights", initial, (2, 2))
