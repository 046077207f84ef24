"""The 3D ResNet's options and losses, what its blocks compute again, and filled-up batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig
from deepsc_jax.models.comparators import resnet3d
from deepsc_jax.models.comparators.resnet3d import Options
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.models.layers.layout import Layout

OPTIONS = Options(widths=(2, 4), blocks=(1, 1))
X = np.random.default_rng(0).normal(size=(3, 4, 8, 8, 1)).astype(np.float32)


def trained(layout: Layout, variables: Any, x: Any, weights: Any = None) -> Any:
    """Logits and moved statistics of a training step's forward pass, and a gradient."""
    network = resnet3d.build(OPTIONS, DataConfig(), layout)

    @jax.jit
    def run(params: Any, stats: Any) -> Any:
        def total(params: Any) -> Any:
            given = {"params": params, BATCH_STATS: stats}
            out: Any
            out, moved = network.apply(given, x, weights, train=True, mutable=[BATCH_STATS])
            return (out["logits"][:2] ** 2).sum(), (out["logits"], moved)

        return jax.grad(total, has_aux=True)(params)

    return run(variables["params"], variables[BATCH_STATS])


@pytest.fixture(scope="module")
def variables() -> Any:
    network = resnet3d.build(OPTIONS, DataConfig(), Layout("folded"))
    init = jax.jit(lambda key: network.init(key, X, train=True, mutable=["params", BATCH_STATS]))
    return init(jax.random.key(0, impl="rbg"))


@pytest.fixture(scope="module")
def kept(variables: Any) -> Any:
    return trained(Layout("folded"), variables, X)


def close(one: Any, other: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(b).max()))


def test_blocks_that_are_computed_again_move_the_statistics_once(variables: Any, kept: Any):
    close(trained(Layout("folded", remat_blocks=True), variables, X), kept)


def test_a_scan_that_fills_the_batch_up_changes_no_other(variables: Any):
    two = trained(Layout("folded"), variables, X[:2])
    filled = X.copy()
    filled[2] = 100
    gradient, (logits, moved) = trained(
        Layout("folded"), variables, filled, np.array([1, 1, 0], np.float32)
    )
    close((gradient, (logits[:2], moved)), two)


def test_running_statistics_decide_where_nothing_is_trained(variables: Any, kept: Any):
    network, moved = resnet3d.build(OPTIONS, DataConfig(), Layout("folded")), kept[1][1]

    @jax.jit
    def logits(stats: Any, x: Any) -> Any:
        given = {"params": variables["params"], BATCH_STATS: stats}
        out: Any = network.apply(given, x, train=False)
        return out["logits"]

    alone = [logits(moved[BATCH_STATS], X[i : i + 1])[0] for i in range(3)]
    close(logits(moved[BATCH_STATS], X), np.stack(alone))  # no scan sees another
    assert np.abs(logits(variables[BATCH_STATS], X) - np.stack(alone)).max() > 1e-3


def test_the_loss_is_the_cross_entropy_times_the_true_classs_weight():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    out, weights = {"logits": logits}, jnp.array([1.0, 2.0, 0.5])
    terms, carried = resnet3d.losses(Config(OPTIONS), out, {"a": 1}, jnp.array([1, 2]), weights)
    assert carried == {"a": 1}
    expected = [-2 * np.log(0.3), -0.5 * np.log(0.8)]
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(terms["cross_entropy"], expected, rtol=1e-5)


def test_maps_are_the_layers_features():
    network = resnet3d.build(OPTIONS, DataConfig(), Layout())
    out: Any = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), X, train=True)[0])
    shapes = {name: m.shape for name, m in out["maps"].items()}
    assert shapes == {"layer1": (3, 2, 4, 4, 8), "layer2": (3, 1, 2, 2, 16)}


@pytest.mark.parametrize(
    ("options", "space", "reason"),
    [
        ({"widths": (8, 8)}, 1, r"widths is \(8, 8\) and blocks is \(3, 4, 6, 3\)"),
        ({"blocks": (1, 0, 1, 1)}, 1, "each must be at least 1"),
        ({"stem_stride": 0}, 1, "stem_stride is 0"),
        ({}, 2, "space is 2"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], space: int, reason: str):
    with pytest.raises(ValueError, match=reason):
        Options(**options).check(DataConfig(), PlatformConfig(space=space))
    Options().check(DataConfig(), PlatformConfig())
