"""Parameters and inputs drawn by numpy, the same on every machine."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def draw_params(module: Any, *arguments: Any, seed: int = 0) -> Any:
    """Variables of a Flax module for these arguments; none of them is zero."""
    shapes = jax.eval_shape(lambda key: module.init(key, *arguments), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> jax.Array:
        normal = rng.normal(size=shape.shape)
        if path[-1].key == "kernel":
            normal *= np.sqrt(2 / np.prod(shape.shape[:-1]))
        elif path[-1].key == "var":  # running variances
            normal = np.exp(0.5 * normal)
        else:  # norms' scales, biases and running means, and the cross-stitch
            normal = 0.3 * normal + (path[-1].key == "scale")
        return jnp.asarray(normal, jnp.float32)

    return jax.tree.map_with_path(leaf, shapes)


def masked_volume(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Values of [0, 1] that are 0 in half of the 4x4 blocks, as outside of the lungs: pool ties."""
    rng = np.random.default_rng(seed)
    batch, depth, height, width, *channels = shape
    coarse = rng.uniform(size=(batch, depth, -(-height // 4), -(-width // 4))) < 0.5
    lungs = coarse.repeat(4, 2).repeat(4, 3)[:, :, :height, :width]
    lungs = lungs.reshape(*lungs.shape, *(1 for _ in channels))
    return rng.uniform(size=tuple(shape)) * lungs
