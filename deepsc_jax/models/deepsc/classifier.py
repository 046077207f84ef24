"""The classification subnet and its evidence masks (paper, IV-D)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deepsc_jax.geometry.grids import EXACT
from deepsc_jax.models.layers.blocks import (
    Conv,
    ConvNormAct,
    GroupNorm,
    Mask,
    masked,
    masked_mean,
    pyramid,
    recomputed,
)
from deepsc_jax.models.layers.layout import Layout, Volume
from deepsc_jax.runtime.types import PyTree


class ResidualUnit(nn.Module):
    """3D encoder unit: two convolutions and a shortcut (He et al. 2016), in-plane stride."""

    features: int
    groups: int
    stride: int
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume, mask: Mask) -> Volume:
        """`mask` is of the result's size."""
        y = ConvNormAct(self.features, self.groups, 3, self.stride, self.layout, name="conv0")(
            x, mask
        )
        y = Conv(self.features, 3, layout=self.layout, name="conv1")(y)
        y = GroupNorm(self.groups, self.layout, name="norm1")(y, mask)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = x[:, :, :: self.stride, :: self.stride]
            x = Conv(self.features, 1, layout=self.layout, name="shortcut")(x)
            x = GroupNorm(self.groups, self.layout, name="shortcut_norm")(x, mask)
        return nn.relu(x.astype(y.dtype) + y)


class Classifier(nn.Module):
    """Class logits from C-features and the segmented lesions, both on the slice grid.

    The logits are the means over the lungs of the three units' maps times one matrix without bias,
    so that the mean of a class activation map there, summed over units, is that class's logit. The
    lesion branch starts at zero: the joint stage starts from the pre-trained function.
    """

    classes: int
    stem_channels: int
    encoder_channels: tuple[int, int, int]
    groups: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        features: Volume,
        lesions: Float[Array, "batch slices height width 1"],
        lungs: Mask,
    ) -> dict[str, PyTree]:
        """Classify.

        Args:
          features: F_C.
          lesions: to_scan(S).
          lungs: the voxels of both that count.

        Returns:
          `logits (batch, class)`; of each unit its `maps`, its `weights`, a matrix, and the voxels
          of its maps that count, `lungs`.
        """
        masks = pyramid(lungs, 3, (1, 2, 2))
        stem = ConvNormAct(self.stem_channels, self.groups, layout=self.layout, name="stem")
        branch = Conv(
            self.stem_channels,
            layout=self.layout,
            kernel_init=nn.initializers.zeros,
            name="lesion_stem",
        )
        x = jnp.concatenate([stem(features, lungs), masked(branch(lesions), lungs)], axis=-1)
        maps = []
        for i, channels in enumerate(self.encoder_channels):
            stride = 1 if i == 0 else 2
            unit = recomputed(ResidualUnit, self.layout.remat_blocks)(
                channels, self.groups, stride, self.layout, name=f"encoder{i + 1}"
            )
            x = unit(x, masks[i])
            maps.append(x)
        pooled = [masked_mean(m, mask) for m, mask in zip(maps, masks, strict=True)]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (sum(self.encoder_channels), self.classes))
        ends = [sum(self.encoder_channels[: i + 1]) for i in range(2)]
        return {
            "logits": jnp.dot(jnp.concatenate(pooled, axis=-1), kernel, precision=EXACT),
            "maps": tuple(maps),
            "weights": tuple(jnp.split(kernel, ends)),
            "lungs": masks,
        }


def class_activation_maps(
    maps: tuple[Volume, ...],
    weights: tuple[Float[Array, "channel class"], ...],
    classes: Int[Array, "batch"],
) -> tuple[Float[Array, "batch slices height width"], ...]:
    """The raw maps of one class per scan, in-plane 1/2, 1/4 and 1/8 (Zhou et al. 2016)."""
    return tuple(
        jnp.einsum("bthwk,bk->bthw", m.astype(w.dtype), w[:, classes].T, precision=EXACT)
        for m, w in zip(maps, weights, strict=True)
    )


def evidence_masks(
    maps: tuple[Volume, ...],
    weights: tuple[Float[Array, "channel class"], ...],
    lungs: tuple[Mask, ...],
    classes: Int[Array, "batch"],
) -> tuple[Float[Array, "batch slices height width"], ...]:
    """M_1, M_2, M_3 in [0, 1] (paper, IV-D): how far a map lies above its mean over the lungs.

    Assumed; the paper does not say how a map becomes a mask. A mask has a zero: what is not above
    the mean, and what is outside of the lungs; its highest voxel is 1. What is added to a whole map
    moves its logit and not the mask. No gradient flows through the maximum; one below 1e-6 counts
    as 1e-6.
    """
    masks = []
    for raw, mask in zip(class_activation_maps(maps, weights, classes), lungs, strict=True):
        raw = raw[..., None]
        above = nn.relu(masked(raw - masked_mean(raw, mask)[:, None, None, None], mask))
        highest = lax.stop_gradient(above.max((1, 2, 3, 4), keepdims=True))
        masks.append((above / jnp.maximum(highest, 1e-6))[..., 0])
    return tuple(masks)
