"""Batch normalisation over whatever devices the batch lies on (Ioffe and Szegedy 2015).

PyTorch's semantics, not Flax's: what is normalised is divided by the biased deviation, and the
running variance is the unbiased one's moving mean.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from deepsc_jax.models.layers.blocks import EXACT, NORM_EPSILON, affine
from deepsc_jax.models.layers.layout import CPU_FORMS, Layout
from deepsc_jax.models.torch_names import Rule
from deepsc_jax.runtime import device_mesh

Features = Float[Array, "batch *space channel"]
BATCH_STATS = "batch_stats"  # the collection of running statistics
MOMENTUM = 0.1  # of a new batch; torch's default


class BatchNorm(nn.Module):
    """Normalisation of each channel over the batch and any number of spatial axes.

    Parameters `scale` and `bias`, and `mean` and `var` in the collection `batch_stats`, a channel.
    In training the statistics are those of the global batch, whose sums over `data` are one
    all-reduce; with `layout.local_norms` those of a device's own examples, and the running ones
    move by the devices' mean. Apart from training they are the running ones. Float32 or wider,
    whatever the dtype of the input. A batch of one value has the variance 0, where PyTorch refuses
    it.
    """

    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Features,
        *,
        train: bool,
        weights: Float[Array, "batch"] | None = None,
        moves: Bool[Array, ""] | None = None,
    ) -> Features:
        """Normalise `x`.

        Args:
          x: features of a device's examples.
          train: whether by the batch's statistics, which also move the running ones.
          weights: 1 for an example and 0 for one that only fills the batch up, which enters no
            statistics; by default all are 1.
          moves: whether the running statistics move in training; by default they do.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable(BATCH_STATS, "mean", jnp.zeros, (channels,))
        running_var = self.variable(BATCH_STATS, "var", jnp.ones, (channels,))
        rows = x.reshape(len(x), -1, 1, 1, channels)
        wide = rows.astype(jnp.promote_types(x.dtype, jnp.float32))
        # About the size of the mean, which would otherwise cancel in the variance; all devices
        # have it without asking each other.
        shift = running_mean.value
        if train:
            wide = wide - shift
            own = for_all = self._sums(wide, weights)
            if not self.layout.local_norms:
                own, for_all = device_mesh.shared_sum_over_data(own)
            count, sums, squares = _parts(own)
            mean = sums / jnp.maximum(count, 1)
            variance = nn.relu(squares / jnp.maximum(count, 1) - mean * mean)
            if not self.is_initializing():
                self._update(running_mean, running_var, for_all, moves)
        else:
            mean, variance = shift, running_var.value
        slope = lax.rsqrt(variance + NORM_EPSILON) * scale
        slope, offset = (
            jnp.broadcast_to(values, (len(x), channels)) for values in (slope, bias - mean * slope)
        )
        return affine(wide, slope, offset, self.layout).astype(x.dtype).reshape(x.shape)

    def _sums(self, wide: Features, weights: Float[Array, "batch"] | None) -> Array:
        """Of a device's examples: count, sums and sums of squares of values, in a row."""
        batch, voxels, *_, channels = wide.shape
        if weights is None:
            weights = jnp.ones(batch, wide.dtype)
        weights = weights.astype(wide.dtype)

        def total(values: Features) -> Float[Array, "channel"]:
            values = values.reshape(batch, voxels, channels)
            if self.layout.form in CPU_FORMS:  # whose sums run on one core, and products on all
                return jnp.einsum("b,brc->c", weights, values, precision=EXACT)
            return (values * weights[:, None, None]).sum(axis=(0, 1))

        count = weights.sum(keepdims=True) * voxels
        return jnp.concatenate([count, total(wide), total(wide * wide)])

    def _update(
        self,
        running_mean: nn.Variable,
        running_var: nn.Variable,
        vector: Array,
        moves: Bool[Array, ""] | None,
    ) -> None:
        """Move the running statistics by what `_sums` gives, of the batch or of this device."""
        count, sums, squares = _parts(lax.stop_gradient(vector))
        mean = sums / jnp.maximum(count, 1)  # less the running one, which was taken off
        unbiased = nn.relu(squares - count * mean * mean) / jnp.maximum(count - 1, 1)
        if self.layout.local_norms:  # the mean of all devices that have any
            one = (count > 0).astype(mean.dtype)
            vector = one * jnp.concatenate([one[None], mean, unbiased])
            count, mean, unbiased = _parts(device_mesh.shared_sum_over_data(vector)[1])
            mean, unbiased = (values / jnp.maximum(count, 1) for values in (mean, unbiased))
        share = MOMENTUM * (count > 0 if moves is None else (count > 0) & moves)
        running_mean.value = running_mean.value + share * mean
        running_var.value = (1 - share) * running_var.value + share * unbiased


def _parts(vector: Array) -> tuple[Array, Array, Array]:
    """One value, and two of each channel."""
    channels = len(vector) // 2
    return vector[0], vector[1 : channels + 1], vector[channels + 1 :]


def norm_names(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The names of a batch norm in PyTorch: parameters and running statistics."""
    return (
        Rule(f"{ours}/scale", f"{theirs}.weight"),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
        Rule(f"{ours}/mean", f"{theirs}.running_mean", collection=BATCH_STATS),
        Rule(f"{ours}/var", f"{theirs}.running_var", collection=BATCH_STATS),
    )
