"""QC-HC U-Net: the paper's Figures 4 (quick connections) and 7 (hypercolumns).

    x --> stem --> encoder0 --> out0 --pool--> encoder1 --> out1 ... --pool--> encoder4
                      |                                                           |
                   decoder0 <-- ... <-- out3, decoder3 <-------------------------+
                      |                      |
       logits = scores0  +  ...  +  Up_8(scores3)                 hypercolumns

    encoder    a = CB(x), b = CB(ReLU(a)), y = ReLU(a + b)        shortcut
               out = concat(y, x)                                 cascade; not at the lowest level
    decoder    z = concat(skip, up(below))
               a = CB(z), b = CB(ReLU(a)), y = ReLU(a + b + CB_1(z))   projection

CB is a convolution and batch norm. The four words on the right are options; with all of them off
this is a plain 3D U-Net, and with `bias` and without `upsampling_norm` as large as MIScnn's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepsc_jax.config import DataConfig, Ints3
from deepsc_jax.geometry.grids import EXACT, resample, tile_grid
from deepsc_jax.models.layers.batch_norm import BatchNorm
from deepsc_jax.models.layers.blocks import Conv, Deconv, max_pool, recomputed
from deepsc_jax.models.layers.layout import Layout, Volume
from deepsc_jax.models.qchc_unet import losses as terms
from deepsc_jax.models.qchc_unet.config import Options
from deepsc_jax.models.qchc_unet.torch_names import TORCH_NAMES

__all__ = ["TORCH_NAMES", "QCHCUNet", "build", "losses"]  # of a registry's row

glorot = nn.initializers.glorot_uniform()  # Keras's default


class ConvNorm(nn.Module):
    """A convolution and batch norm, the paper's Conv-BN."""

    features: int
    kernel: int
    bias: bool
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume, train: bool) -> Volume:
        x = Conv(self.features, self.kernel, 1, self.layout, glorot, name="conv")(x)
        if self.bias:
            x += self.param("conv_bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return BatchNorm(self.layout, name="norm")(x, train=train)


class Encoder(nn.Module):
    """A block of the encoder; `last` where nothing lies below it."""

    features: int
    last: bool
    options: Options
    layout: Layout

    @nn.compact
    def __call__(self, x: Volume, train: bool) -> Volume:
        options = self.options
        unit = (self.features, 3, options.bias, self.layout)
        a = ConvNorm(*unit, name="first")(x, train)
        total = ConvNorm(*unit, name="last")(nn.relu(a), train)
        if options.shortcut:
            total += a
        if options.identity:
            total += x
        y = nn.relu(total)
        return jnp.concatenate([y, x], axis=-1) if options.cascade and not self.last else y


class Decoder(nn.Module):
    """A block of the decoder: features from below, and what its level of the encoder gave."""

    features: int
    options: Options
    layout: Layout

    @nn.compact
    def __call__(self, below: Volume, skip: Volume, train: bool) -> Volume:
        options, layout = self.options, self.layout
        normed = options.upsampling_norm
        up = Deconv(self.features, layout, bias=not normed, kernel_init=glorot, name="up")(below)
        if normed:
            up = nn.relu(BatchNorm(layout, name="up_norm")(up, train=train))
        z = jnp.concatenate([skip, up], axis=-1)
        a = ConvNorm(self.features, 3, options.bias, layout, name="first")(z, train)
        total = ConvNorm(self.features, 3, options.bias, layout, name="last")(nn.relu(a), train)
        if options.shortcut:
            total += a
        if options.projection:
            total += ConvNorm(self.features, 1, options.bias, layout, name="projection")(z, train)
        return nn.relu(total)


class QCHCUNet(nn.Module):
    """The network; `build` makes it."""

    options: Options
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch depth height width 1"],
        valid: Int[Array, "batch"] | None = None,
        *,
        train: bool = False,
    ) -> dict:
        """Logits of every voxel.

        Args:
          x: patches whose sides are multiples of 2 ** (levels - 1); what lies beyond a scan is
            filled with its minimum, and is a part of the patch as any other.
          valid: makes no difference here.
          train: whether norms use the batch's statistics and move the running ones, which are in
            the collection `batch_stats`.

        Returns:
          `logits (batch, depth, height, width, class)`, float32 or wider, and `maps`: each
          level's last features by name, `level1` the finest.
        """
        del valid
        options, layout = self.options, self.layout
        levels, maps = len(options.widths), {}
        size = (x.shape[1], x.shape[2], x.shape[3])
        encoder = recomputed(Encoder, layout.remat_blocks, static=(2,))
        decoder = recomputed(Decoder, layout.remat_blocks, static=(3,))
        skips: list[Volume] = []
        if options.cascade:  # whose first block needs as many feature maps as it adds
            x = nn.relu(ConvNorm(options.widths[0], 3, options.bias, layout, name="stem")(x, train))
        for i, features in enumerate(options.widths):
            x = max_pool(x) if i > 0 else x
            last = i == levels - 1
            x = encoder(features, last, options, layout, name=f"encoder{i}")(x, train)
            skips.append(x)
        maps[f"level{levels}"] = x = self.perturb(f"level{levels}", x)
        scores = self._scores(x, levels - 1, size) if options.hypercolumn_bottleneck else None
        for i in reversed(range(levels - 1)):
            block = decoder(options.widths[i], options, layout, name=f"decoder{i}")
            x = block(x, skips[i], train)
            maps[f"level{i + 1}"] = x = self.perturb(f"level{i + 1}", x)
            if options.hypercolumns or i == 0:
                added = self._scores(x, i, size)
                scores = added if scores is None else scores + added
        return {"logits": scores, "maps": maps}

    def _scores(self, x: Volume, level: int, size: Ints3) -> Volume:
        """The class scores of a level, brought to full resolution: both are linear."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        head = nn.Dense(
            len(self.options.voxel_classes),
            dtype=wide,
            precision=EXACT,
            kernel_init=glorot,
            name=f"scores{level}",
        )
        return upsample(head(x.astype(wide)), size)


def upsample(x: Volume, size: Ints3) -> Volume:
    """`x` at full resolution: linear between voxels' centres, held at the edges."""
    scale = size[0] // x.shape[1]
    if scale == 1:
        return x
    corner, depth = jnp.zeros(3, jnp.int32), jnp.asarray(size[0], jnp.int32)
    source, target = (tile_grid(corner, size, depth, step) for step in (scale, 1))
    return jax.vmap(lambda values: resample(values, source, target))(x)


def build(options: Options, data: DataConfig, layout: Layout) -> nn.Module:
    """The network of `options`."""
    del data
    return QCHCUNet(options, layout)


def losses(
    options: Options,
    logits: Float[Array, "batch depth height width class"],
    truth: Int[Array, "batch depth height width"],
    valid: Int[Array, "batch"] | None,
) -> dict[str, Float[Array, "batch"]]:
    """Each patch's `tversky`, `cross_entropy` and `loss` (`losses.losses`)."""
    del valid  # what lies beyond a scan is background
    return terms.losses(
        logits, truth, options.tversky_alpha, options.tversky_beta, options.tversky_epsilon
    )
