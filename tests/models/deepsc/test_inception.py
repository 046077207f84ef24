"""The inception block's branches, strides and ablation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.models.deepsc.inception import Inception
from deepsc_jax.models.layers.blocks import average_in_plane, real_slices
from deepsc_jax.models.layers.convolution import conv3d
from deepsc_jax.models.layers.layout import Layout

BRANCHES = ((1,), (1, 3), (3, 5))
CHANNELS = 6


def block(**changes) -> Inception:
    settings = {"kind": "inception", "branches": BRANCHES, "channels": CHANNELS, "groups": 2}
    return Inception(**(settings | changes))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = draw(2, 5, 8, 6, 1)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(block().init)(jax.random.key(1, impl="rbg"), X, None)


def by_hand(params, x, stride):
    """The branches one by one; then group norm as Wu and He define it, and ReLU."""
    parts = []
    for i, kernels in enumerate(BRANCHES):
        y = x
        for j, kernel in enumerate(kernels):
            last = j == len(kernels) - 1
            step = stride if last else 1
            if kernel == 1 and step > 1:
                y, step = average_in_plane(y, step), 1
            y = conv3d(y, params[f"b{i}_{j}"]["kernel"], step, "native")
        parts.append(y)
    y = np.asarray(jnp.concatenate(parts, axis=-1), np.float64)
    groups = y.reshape(*y.shape[:4], 2, CHANNELS // 2)
    mean, variance = (f(groups, axis=(1, 2, 3, 5), keepdims=True) for f in (np.mean, np.var))
    return np.maximum((groups - mean) / np.sqrt(variance + 1e-5), 0).reshape(y.shape)


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_are_concatenated_normalised_and_rectified(variables, stride):
    found = jax.jit(block(stride=stride, layout=Layout("folded")).apply)(variables, X, None)
    assert found.shape == (2, 5, 8 // stride, 6 // stride, CHANNELS)
    expected = by_hand(variables["params"], X, stride)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_one_kernel_per_convolution(variables):
    shapes = {k: v["kernel"].shape for k, v in variables["params"].items() if k != "norm"}
    assert shapes == {
        "b0_0": (1, 1, 1, 1, 2),
        "b1_0": (1, 1, 1, 1, 2),
        "b1_1": (3, 3, 3, 2, 2),
        "b2_0": (3, 3, 3, 1, 2),
        "b2_1": (5, 5, 5, 2, 2),
    }
    strided = jax.eval_shape(block(stride=2).init, jax.random.key(0), X, None)
    assert jax.tree.map(jnp.shape, strided) == jax.tree.map(jnp.shape, variables)


def test_each_branch_looks_as_far_as_its_kernels():
    # Before the norm, which sees everything: the reach of branch (3, 5) is 1 + 2 voxels.
    captured = jax.jit(
        lambda v, x: block().apply(v, x, None, capture_intermediates=True, mutable=True)[1]
    )
    point = jnp.zeros((1, 9, 9, 9, 1)).at[0, 4, 4, 4, 0].set(1.0)
    variables = jax.tree.map(
        lambda s: jnp.ones(s.shape), jax.eval_shape(block().init, jax.random.key(0), point, None)
    )
    seen = captured(variables, point)["intermediates"]
    for name, reach in {"b0_0": 0, "b1_1": 1, "b2_1": 3}.items():
        (y,) = seen[name]["__call__"]
        expected = np.zeros((9, 9, 9), bool)
        expected[(slice(4 - reach, 5 + reach),) * 3] = True
        np.testing.assert_array_equal(np.asarray(y[0, ..., 0]) != 0, expected, err_msg=name)


def test_plain_is_one_convolution_of_the_widest_kernel():
    plain = block(kind="plain", stride=2)
    variables = jax.eval_shape(plain.init, jax.random.key(0), X, None)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["plain"]["conv"]["kernel"] == (5, 5, 5, 1, CHANNELS)
    assert list(shapes) == ["plain"]
    assert jax.eval_shape(plain.apply, variables, X, None).shape == (2, 5, 4, 3, CHANNELS)


def test_padded_slices_change_nothing(variables):
    apply = jax.jit(block(layout=Layout("folded")).apply)
    valid = real_slices(jnp.array([3, 5]), 5)
    padded = X.at[0, 3:].set(0)
    short = apply(variables, X[:, :3], real_slices(jnp.array([3, 3]), 3))[0]
    found = apply(variables, padded, valid)
    np.testing.assert_allclose(found[0, :3], short, rtol=1e-5, atol=1e-5)
    assert not np.any(found[0, 3:])
    np.testing.assert_allclose(
        found[1], apply(variables, X, real_slices(jnp.array([5, 5]), 5))[1], rtol=1e-6
    )
