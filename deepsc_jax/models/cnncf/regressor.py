"""CNNRF (Liang et al. 2021, Fig. 3b and 6d): clinical indicators of a patch of a lesion.

CNNCF's stem and stage II, whose features' means a regressor block maps to the indicators.
"""

from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.models.cnncf.config import RegressorOptions
from deepsc_jax.models.cnncf.torch_names import REGRESSOR_NAMES as TORCH_NAMES
from deepsc_jax.models.layers.batch_norm import BatchNorm
from deepsc_jax.models.layers.blocks import EXACT, recomputed
from deepsc_jax.models.layers.blocks2d import Conv2d, Image, ResBlockA, ResBlockB, xavier_init
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime.types import PyTree

__all__ = ["CNNRF", "TORCH_NAMES", "build", "losses"]


class CNNRF(nn.Module):
    """The network; `build` makes it."""

    options: RegressorOptions
    indicators: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self, x: Image, weights: Float[Array, "batch"] | None = None, *, train: bool
    ) -> dict:
        """`values (batch, indicator)`, float32 or wider, and `maps`.

        Args:
          x: patches, three channels of [0, 1].
          weights: 1 for a patch and 0 for what only fills the batch up; by default all are 1.
          train: whether norms use the batch's statistics and move the running ones.
        """
        x = Conv2d(self.options.stem, 3, 1, self.layout, name="stem")(x)
        x = nn.relu(BatchNorm(self.layout, name="stem_norm")(x, train=train, weights=weights))
        i1 = i2 = x
        kinds = (ResBlockA, ResBlockA, ResBlockB)
        for i, (kind, width) in enumerate(zip(kinds, self.options.widths, strict=True)):
            block = recomputed(kind, self.layout.remat_blocks, static=(5,))
            i1, i2 = block(width, 2, self.layout, name=f"stage2_{i}")(i1, i2, weights, None, train)
        x = self.perturb("stage2", i2)
        pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(axis=(1, 2))
        return {"values": self._regressor(pooled, weights, train), "maps": {"stage2": x}}

    def _regressor(
        self, v: Float[Array, "batch feature"], weights: Array | None, train: bool
    ) -> Float[Array, "batch indicator"]:
        """Three linear layers, and a skip that joins after the second.

        Of the skip's kernel the text says 1x1 and the caption 3x3: on one pixel both are the same.
        """

        def linear(x: Array, width: int, name: str, bias: bool = True) -> Array:
            return nn.Dense(
                width,
                use_bias=bias,
                dtype=x.dtype,
                precision=EXACT,
                kernel_init=xavier_init,
                name=name,
            )(x)

        first, second = self.options.hidden
        h = linear(linear(v, first, "linear1"), second, "linear2")
        norm = BatchNorm(self.layout, name="skip_norm")
        skip = nn.relu(norm(linear(v, second, "skip", False), train=train, weights=weights))
        return linear(h + skip, self.indicators, "linear3")


def build(options: RegressorOptions, data: DataConfig, layout: Layout) -> nn.Module:
    """The network of `options`."""
    return CNNRF(options, len(data.indicators), layout)


def losses(
    config: Config,
    out: dict[str, PyTree],
    carried: dict[str, PyTree],
    targets: Float[Array, "batch indicator"],
) -> tuple[dict[str, Float[Array, "batch"]], dict[str, PyTree]]:
    """Each patch's mean of squared errors, not its root, as `loss`; and what is carried."""
    del config
    squared = ((cast(Array, out["values"]) - targets) ** 2).mean(axis=-1)
    return {"mse": squared, "loss": squared}, carried
