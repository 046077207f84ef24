"""The lesion subnet: its scales, their weighted sum, and its depth padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.models.deepsc.lesion import LESION_PRIOR, LesionSubnet, combine
from deepsc_jax.models.layers.blocks import real_slices
from deepsc_jax.models.layers.layout import Layout

WEIGHTS = (0.05, 0.1, 0.25, 0.6)
SUBNET = LesionSubnet((4, 4, 4), WEIGHTS, 2, Layout("folded"))
DEPTH, HEIGHT, WIDTH = 16, 8, 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, DEPTH, HEIGHT, WIDTH, 3)), jnp.float32)


@pytest.fixture(scope="module")
def variables(drawn):
    real = jnp.array([DEPTH, DEPTH])
    return drawn(SUBNET, X, real_slices(real, DEPTH), real)


@pytest.fixture(scope="module")
def apply(variables):
    """The subnet on a batch of 2 and its counts of real slices."""
    program = jax.jit(SUBNET.apply)

    def run(x, valid):
        real = jnp.asarray(valid)
        return program(variables, x, real_slices(real, DEPTH), real)

    return run


def test_scales_are_probabilities_at_an_eighth_to_full(apply):
    lesion, scales = apply(X, [16, 16])
    assert lesion.shape == (2, DEPTH, HEIGHT, WIDTH, 1)
    assert [s.shape[1:4] for s in scales] == [(2, 1, 2), (4, 2, 4), (8, 4, 8), (16, 8, 16)]
    for s in scales:
        assert s.dtype == jnp.float32
        assert 0 < s.min() < s.max() < 1


def test_the_lesion_map_is_the_weighted_sum_of_upsampled_scales(apply):
    lesion, scales = apply(X, [16, 16])
    total = np.zeros(X.shape[:4])
    for weight, s in zip(WEIGHTS, scales, strict=True):
        up = np.asarray(s[..., 0], np.float64)
        for axis in (1, 2, 3):
            ratio = X.shape[axis] // up.shape[axis]
            centres = (np.arange(up.shape[axis]) + 0.5) * ratio
            at = np.arange(X.shape[axis]) + 0.5
            up = np.apply_along_axis(lambda v, a=at, c=centres: np.interp(a, c, v), axis, up)
        total += weight * up
    np.testing.assert_allclose(lesion[..., 0], total, rtol=1e-5, atol=1e-6)


def test_combine_by_hand():
    # Two slices of S_1 at 1/8, 0 and 1, centred on 4 and 12 of 16 slices, and nothing else.
    sides = ((2, 1, 1), (4, 2, 2), (8, 4, 4), (16, 8, 8))
    scales = [jnp.zeros((1, *side, 1)) for side in sides]
    scales[0] = scales[0].at[0, 1].set(1.0)
    up = jax.jit(lambda s, valid: combine(s, WEIGHTS, (16, 8, 8), valid))
    found = up(scales, jnp.array([16]))
    ramp = np.clip((np.arange(16) + 0.5 - 4) / 8, 0, 1)
    np.testing.assert_allclose(found[0, :, 3, 3, 0], 0.05 * ramp, rtol=1e-5, atol=1e-7)
    ones = [jnp.ones((1, *side, 1)) for side in sides]
    found = up(ones, jnp.array([9]))[0, :9, 3, 3, 0]
    np.testing.assert_allclose(found, np.ones(9), rtol=1e-6)


def test_coarse_scales_cannot_outvote_the_finest():
    assert sum(WEIGHTS[:3]) < WEIGHTS[3]
    assert sum(WEIGHTS) == pytest.approx(1)


@pytest.mark.parametrize("valid", [[9, 16], [1, 3], [8, 0]])
def test_padded_slices_change_no_real_one(apply, valid):
    noise = jnp.asarray(np.random.default_rng(2).normal(size=X.shape), jnp.float32)
    real = (jnp.arange(DEPTH) < jnp.asarray(valid)[:, None])[..., None, None, None]
    lesion, scales = apply(jnp.where(real, X, 0.0), valid)
    other, _ = apply(jnp.where(real, X, 0.0).at[1].set(noise[1] * real[1]), valid)
    np.testing.assert_array_equal(lesion[0], other[0])
    for s, factor in zip((*scales, lesion), (8, 4, 2, 1, 1), strict=True):
        for b in range(2):
            count = -(-valid[b] // factor)
            assert not np.any(s[b, count:])
            assert np.all(s[b, :count] > 0)


def test_the_result_does_not_depend_on_the_padding(apply, variables):
    short, _ = apply(X.at[:, 8:].set(0), [8, 8])
    alone, _ = jax.jit(SUBNET.apply)(variables, X[:, :8], None, None)
    np.testing.assert_allclose(short[:, :8], alone, rtol=1e-5, atol=1e-6)


def test_it_starts_near_the_lesion_prior():
    variables = jax.jit(SUBNET.init)(jax.random.key(0, impl="rbg"), X, None, None)
    heads = [variables["params"][f"segmentation{i}"] for i in range(1, 5)]
    odds = np.log(LESION_PRIOR / (1 - LESION_PRIOR))
    for head in heads:
        np.testing.assert_allclose(head["bias"], odds, rtol=1e-6)
        assert head["kernel"].shape == (4, 1)


def test_gradients_are_those_of_finite_differences():
    # In one compiled program XLA may round an activation and the maximum it was pooled to
    # differently; no gradient may hang on the two being equal.
    with jax.enable_x64(True):
        subnet = LesionSubnet((8, 16, 32), WEIGHTS, 4, layout=Layout("folded", jnp.float64))
        rng = np.random.default_rng(0)
        x, probe = rng.normal(size=(1, 16, 16, 24, 8)), rng.normal(size=(1, 16, 16, 24, 1))
        params = jax.tree.map(
            lambda leaf: jnp.asarray(
                rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
            ),
            jax.eval_shape(lambda: subnet.init(jax.random.key(0), x, None, None)),
        )

        def value(params):
            return (subnet.apply(params, x, None, None)[0] * probe).sum()

        ways = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        program, gradient = jax.jit(value), jax.jit(jax.grad(value))(params)

        def along(path, step):
            def moved(at, leaf, way):
                return leaf + step * way if at == path else leaf

            return program(jax.tree.map_with_path(moved, params, ways))

        slopes = jax.tree.map(lambda slope, way: float((slope * way).sum()), gradient, ways)
        step = 1e-9  # of 1e-6 one activation or another crosses zero
        for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
            found = (along(path, step) - along(path, -step)) / (2 * step)
            np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5, err_msg=str(path))
