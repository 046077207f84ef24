"""The 3D U-Net's options, its padding, its losses by hand, and its maps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import draw_params, masked_volume

from deepsc_jax.config import DataConfig, PlatformConfig
from deepsc_jax.models.comparators import unet3d
from deepsc_jax.models.comparators.unet3d import Options
from deepsc_jax.models.layers.layout import Layout

OPTIONS = Options(widths=(4, 6, 8))
NETWORK = unet3d.build(OPTIONS, DataConfig(), Layout("folded"))


@pytest.fixture(scope="module")
def params() -> Any:
    return draw_params(NETWORK, jnp.zeros((1, 4, 8, 8, 1)))["params"]


def test_padded_slices_and_the_bucket_change_nothing(params: Any):
    apply = jax.jit(lambda x, valid: NETWORK.apply({"params": params}, x, valid)["logits"])  # pyright: ignore
    x = masked_volume((1, 7, 8, 8, 1)).astype(np.float32)
    short = np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    long = np.pad(x, ((0, 0), (0, 9), (0, 0), (0, 0), (0, 0)), constant_values=9)
    valid = np.array([7])
    found = apply(long, valid)[:, :7]
    np.testing.assert_allclose(found, apply(short, valid)[:, :7], rtol=1e-5, atol=1e-5)


def test_losses_are_mlperfs_by_hand():
    # Two voxels of lesion probability 0.8 and 0.4, the first a lesion; a padded slice behind.
    odds = np.log(np.array([4, 2 / 3]))
    logits = np.zeros((1, 2, 1, 2, 2))
    logits[0, 0, 0, :, 1], logits[0, 1] = odds, 50
    truth = np.array([[[[1, 0]], [[0, 1]]]])
    terms = unet3d.losses(OPTIONS, jnp.asarray(logits), jnp.asarray(truth), jnp.array([1]))
    dice = 1 - 2 * 0.8 / (1 + 1.2)
    entropy = -(np.log(0.8) + np.log(0.6)) / 2
    assert float(terms["dice"][0]) == pytest.approx(dice, rel=1e-5)
    assert float(terms["cross_entropy"][0]) == pytest.approx(entropy, rel=1e-5)
    assert float(terms["loss"][0]) == pytest.approx((dice + entropy) / 2, rel=1e-5)


def test_maps_are_named_finest_first_and_can_be_perturbed(params: Any):
    x = jnp.asarray(masked_volume((1, 4, 8, 8, 1)), jnp.float32)
    variables: Any = jax.eval_shape(lambda: NETWORK.init(jax.random.key(0), x))
    out: Any = jax.eval_shape(lambda: NETWORK.apply({"params": params}, x))
    shapes = {name: m.shape for name, m in out["maps"].items()}
    assert shapes == {
        "level1": (1, 4, 8, 8, 4),
        "level2": (1, 2, 4, 4, 6),
        "level3": (1, 1, 2, 2, 8),
    }
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), variables["perturbations"])

    def lesion(perturbations: Any) -> Any:
        found: Any = NETWORK.apply({"params": params, "perturbations": perturbations}, x)
        return found["logits"][..., 1].sum()

    gradients = jax.jit(jax.grad(lesion))(zeros)
    assert {name: bool(jnp.any(g != 0)) for name, g in gradients.items()} == dict.fromkeys(
        shapes, True
    )


@pytest.mark.parametrize(
    ("options", "space", "reason"),
    [
        ({"widths": (8,)}, 1, "at least two levels"),
        ({"widths": (8,) * 8}, 1, r"8 levels need multiples of 128"),
        ({"widths": (8,) * 5}, 8, "a depth of 128 with space = 8"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], space: int, reason: str):
    with pytest.raises(ValueError, match=reason):
        Options(**options).check(DataConfig(), PlatformConfig(space=space))
    Options().check(DataConfig(), PlatformConfig())
