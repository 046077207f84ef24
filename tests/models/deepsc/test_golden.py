"""The joint network against the reference's outputs as they were written: needs no PyTorch."""

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
from parity_network import CLASS_WEIGHTS, CONFIG, batch, draw, network_of, options_of, to_jax

from deepsc_jax.models.deepsc.losses import scan_losses
from deepsc_jax.models.layers.layout import Layout


def test_the_joint_network_has_the_golden_losses_logits_and_gradients():
    expected, options = np.load(golden.PATH), options_of(CONFIG)
    network = network_of(CONFIG, Layout("folded", jnp.dtype("float64")))

    def objective(params: Any, inputs: Any) -> Any:
        out: Any = network.apply({"params": params}, inputs, "joint")
        weights = jnp.asarray(CLASS_WEIGHTS)
        terms = scan_losses(options, CONFIG.data, "joint", out, inputs, weights)
        return terms["loss"].mean(), {name: terms[name] for name in golden.TERMS} | {
            "logits": out["logits"]
        }

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, "float64"), draw(CONFIG))
        inputs = to_jax(batch(), "float64")
        gradient, found = jax.jit(jax.grad(objective, has_aux=True))(params, inputs)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-9, err_msg=name)
    wanted = expected["gradient_norms"]
    np.testing.assert_allclose(golden.norms(gradient), wanted, rtol=0, atol=1e-8 * wanted.max())
