"""The classification subnet and its evidence masks (paper, IV-D)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deepsc_jax.geometry.grids import EXACT
from deepsc_jax.models.layers.blocks import Conv, ConvNormAct, GroupNorm, recomputed
from deepsc_jax.models.layers.layout import Layout, Volume


class ResidualUnit(nn.Module):
    """3D encoder unit: two convolutions and a shortcut (He et al. 2016), in-plane stride."""

    features: int
    groups: int
    stride: int
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        y = ConvNormAct(self.features, self.groups, 3, self.stride, self.layout, name="conv0")(
            x, None
        )
        y = Conv(self.features, 3, layout=self.layout, name="conv1")(y)
        y = GroupNorm(self.groups, self.layout, name="norm1")(y, None)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = x[:, :, :: self.stride, :: self.stride]
            x = Conv(self.features, 1, layout=self.layout, name="shortcut")(x)
            x = GroupNorm(self.groups, self.layout, name="shortcut_norm")(x, None)
        return nn.relu(x.astype(y.dtype) + y)


class Classifier(nn.Module):
    """Class logits from C-features and the segmented lesions, both on the slice grid.

    The logits are the spatial means of the three units' maps times one matrix without bias, so
    that the mean of a class activation map, summed over units, is that class's logit. The lesion
    branch starts at zero: the joint stage starts from the pre-trained function.
    """

    classes: int
    stem_channels: int
    encoder_channels: tuple[int, int, int]
    groups: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self, features: Volume, lesions: Float[Array, "batch slices height width 1"]
    ) -> dict[str, Array | tuple[Array, ...]]:
        """Returns `logits (batch, class)`, the units' `maps` and `weights`, one matrix a unit."""
        stem = ConvNormAct(self.stem_channels, self.groups, layout=self.layout, name="stem")
        branch = Conv(
            self.stem_channels,
            layout=self.layout,
            kernel_init=nn.initializers.zeros,
            name="lesion_stem",
        )
        x = jnp.concatenate([stem(features, None), branch(lesions)], axis=-1)
        maps = []
        for i, channels in enumerate(self.encoder_channels):
            stride = 1 if i == 0 else 2
            unit = recomputed(ResidualUnit, self.layout.remat_blocks)(
                channels, self.groups, stride, self.layout, name=f"encoder{i + 1}"
            )
            x = unit(x)
            maps.append(x)
        pooled = [_spatial_mean(m) for m in maps]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (sum(self.encoder_channels), self.classes))
        ends = [sum(self.encoder_channels[: i + 1]) for i in range(2)]
        return {
            "logits": jnp.dot(jnp.concatenate(pooled, axis=-1), kernel, precision=EXACT),
            "maps": tuple(maps),
            "weights": tuple(jnp.split(kernel, ends)),
        }


def _spatial_mean(x: Volume) -> Float[Array, "batch channel"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(axis=(1, 2, 3))


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
    classes: Int[Array, "batch"],
) -> tuple[Float[Array, "batch slices height width"], ...]:
    """M_1, M_2, M_3 in [0, 1] (paper, IV-D): each scan's map from its minimum to its maximum.

    Assumed; the paper does not say how a map becomes a mask. What is added to a whole map moves
    its logit and changes neither the mask nor, by the mean, its gradient: the task-aware loss
    shapes maps, and leaves it to the cross-entropy how high they are. (Where values below zero
    counted as nothing, training pushed all maps below zero and emptied the masks.) No gradient
    flows through the two extremes; a range below 1e-6 counts as 1e-6.
    """
    masks = []
    for raw in class_activation_maps(maps, weights, classes):
        raw = raw - raw.mean((1, 2, 3), keepdims=True)
        low, high = (
            lax.stop_gradient(f(raw, (1, 2, 3), keepdims=True)) for f in (jnp.min, jnp.max)
        )
        masks.append((raw - low) / jnp.maximum(high - low, 1e-6))
    return tuple(masks)
