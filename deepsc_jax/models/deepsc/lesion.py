"""The 3D lesion subnet and its segmentation generator (paper, IV-C)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepsc_jax.geometry.grids import EXACT, resample, tile_grid
from deepsc_jax.models.layers.blocks import (
    ConvNormAct,
    Deconv,
    Mask,
    masked,
    max_pool,
    pyramid,
    recomputed,
)
from deepsc_jax.models.layers.layout import Layout, Volume

Valid = Int[Array, "batch"] | None
LESION_PRIOR = 0.05  # assumed: initial lesion probability (Lin et al. 2017 start from a small one)


class DoubleConv(nn.Module):
    """Two convolutions, each with group norm and ReLU: a transition unit at one resolution."""

    features: int
    groups: int
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume, mask: Mask) -> Volume:
        for i in range(2):
            unit = ConvNormAct(self.features, self.groups, layout=self.layout, name=f"conv{i}")
            x = unit(x, mask)
        return x


class LesionSubnet(nn.Module):
    """U-Net with three down- and three up-transition units and four intermediate segmentations.

    Returns S `(batch, depth, height, width, 1)` and the scales (S_1, ..., S_4), coarsest (1/8)
    first: probabilities, zero where nothing counts: outside of the lungs and in padded slices.
    """

    channels: tuple[int, int, int]
    scale_weights: tuple[float, ...]
    groups: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Volume, mask: Mask, valid: Valid) -> tuple[Volume, tuple[Volume, ...]]:
        """`mask` says which voxels count, and `valid` how many slices of each tile are real."""
        masks = pyramid(mask, 4)
        tile, skips = (x.shape[1], x.shape[2], x.shape[3]), []
        transition = recomputed(DoubleConv, self.layout.remat_blocks)
        for level, features in enumerate(self.channels):
            unit = transition(features, self.groups, self.layout, name=f"down{level + 1}")
            x = unit(x, masks[level])
            skips.append(x)
            x = max_pool(x)
        scales = [self._segmentation(x, masks[3], 1)]
        for level in (2, 1, 0):
            features = self.channels[level]
            deconv = Deconv(features, self.layout, name=f"deconv{3 - level}")
            x = masked(deconv(x), masks[level])
            x = jnp.concatenate([skips[level], x], axis=-1)
            unit = transition(features, self.groups, self.layout, name=f"up{3 - level}")
            x = unit(x, masks[level])
            scales.append(self._segmentation(x, masks[level], 4 - level))
        whole = combine(scales, self.scale_weights, tile, valid)
        return masked(whole, mask), tuple(scales)

    def _segmentation(self, x: Volume, mask: Mask, index: int) -> Volume:
        """S_index: a 1x1x1 convolution and a sigmoid, in float32 or wider."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        odds = jnp.log(LESION_PRIOR / (1 - LESION_PRIOR))
        head = nn.Dense(
            1,
            dtype=wide,
            precision=EXACT,
            bias_init=nn.initializers.constant(odds),
            name=f"segmentation{index}",
        )
        return masked(nn.sigmoid(head(x.astype(wide))), mask)


def combine(
    scales: list[Volume], weights: tuple[float, ...], tile: tuple[int, int, int], valid: Valid
) -> Volume:
    """S = sum_i w_i Up(S_i) (paper, equation 3), each brought to full resolution."""
    batch = scales[0].shape[0]
    depths = jnp.full((batch,), tile[0]) if valid is None else valid

    def up(values: Float[Array, "d h w 1"], depth: Int[Array, ""], scale: int) -> Array:
        origin = jnp.zeros(3, jnp.int32)
        source, target = (tile_grid(origin, tile, depth, s) for s in (scale, 1))
        return resample(values, source, target)

    total = weights[-1] * scales[-1]
    for weight, values in zip(weights[:-1], scales[:-1], strict=True):
        scale = tile[0] // values.shape[1]
        total += weight * jax.vmap(lambda v, d, s=scale: up(v, d, s))(values, depths)
    return total
