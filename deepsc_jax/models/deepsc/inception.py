"""The 3D inception block (paper, IV-B.1) and its ablation (V-E.1)."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from deepsc_jax.models.layers.blocks import (
    Conv,
    ConvNormAct,
    GroupNorm,
    Mask,
    average_in_plane,
    masked,
    pool_mask,
)
from deepsc_jax.models.layers.layout import Layout, Volume


class Inception(nn.Module):
    """Branches of cascaded 3D convolutions, concatenated, then group norm and ReLU.

    `kind='plain'` is the ablation: one convolution of the widest branch's kernel, with the same
    stride and channels. Only a branch's last convolution has the stride; a branch that ends in a
    1x1x1 convolution averages blocks first, since a strided one would ignore most pixels.

    `(batch, depth, height, width, channel)` to the same depth, in-plane sizes over `stride`, and
    `channels` channels.
    """

    kind: Literal["inception", "plain"]
    branches: tuple[tuple[int, ...], ...]
    channels: int
    groups: int
    stride: int = 1
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Volume, mask: Mask) -> Volume:
        """`mask` says which voxels of `x` count."""
        coarse = pool_mask(mask, (1, self.stride, self.stride))
        if self.kind == "plain":
            kernel = max(k for branch in self.branches for k in branch)
            return ConvNormAct(
                self.channels, self.groups, kernel, self.stride, self.layout, name="plain"
            )(x, coarse)
        outputs = []
        for i, kernels in enumerate(self.branches):
            y = x
            for j, kernel in enumerate(kernels):
                stride = self.stride if j == len(kernels) - 1 else 1
                if kernel == 1 and stride > 1:
                    y, stride = average_in_plane(y, stride), 1
                features = self.channels // len(self.branches)
                conv = Conv(features, kernel, stride, self.layout, name=f"b{i}_{j}")
                y = masked(conv(y), coarse if j == len(kernels) - 1 else mask)
            outputs.append(y)
        y = jnp.concatenate(outputs, axis=-1)
        return GroupNorm(self.groups, self.layout, relu=True, name="norm")(y, coarse)
