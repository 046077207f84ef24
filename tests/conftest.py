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


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Assert that relative errors are within bounds, and leave them for the parity report."""

    def check(part: str, dtype: str, measured: dict[str, tuple[float, float]]) -> None:
        for quantity, (error, bound) in measured.items():
            row = {"part": part, "dtype": dtype, "quantity": quantity}
            record_property("parity", row | {"max_error": error, "bound": bound})
        for quantity, (error, bound) in measured.items():
            assert error <= bound, f"{part}, {dtype}: {quantity} off by {error:.2g}"

    return check


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """Parameters drawn by numpy: none starts at zero, and no initialiser is compiled."""

    def draw(module: Any, *arguments: Any, seed: int = 0) -> Any:
        shapes = jax.eval_shape(lambda key: module.init(key, *arguments), jax.random.key(0))
        rng = np.random.default_rng(seed)

        def leaf(path: Any, shape: Any) -> jax.Array:
            normal = rng.normal(size=shape.shape)
            if path[-1].key == "kernel":
                normal *= np.sqrt(2 / np.prod(shape.shape[:-1]))
            else:  # norms' scales and biases, and the cross-stitch
                normal = 0.3 * normal + (path[-1].key == "scale")
            return jnp.asarray(normal, jnp.float32)

        return jax.tree.map_with_path(leaf, shapes)

    return draw
