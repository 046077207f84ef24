"""What all tests share: eight CPU devices, parsed flags, and no compilation cache on disk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

# Before any test touches a device: tests of the mesh split batches over these.
jax.config.update("jax_num_cpu_devices", 8)
# A cache kept between runs would hide recompilation from the tests that count it.
jax.config.update("jax_enable_compilation_cache", False)
# Grain's workers and absl's flags raise UnparsedFlagAccessError outside app.run.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """Parameters drawn by numpy, biases too: nothing is zero, and no initialiser is compiled."""

    def draw(module: Any, *arguments: Any, scale: float = 0.3, seed: int = 0) -> Any:
        shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(scale=scale, size=leaf.shape), jnp.float32), shapes
        )

    return draw
