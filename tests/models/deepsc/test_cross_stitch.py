"""The four scalars that mix the tasks' features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepsc_jax.models.deepsc.cross_stitch import CrossStitch

PROBE = np.array([[1, 2], [3, 4]], np.float32)


def first(unit):
    """The unit's variables before any step."""
    return nn.init(lambda module: module(), unit)(jax.random.key(0))


def test_it_starts_from_its_initial_weights():
    unit = CrossStitch(True, (0.9, 0.1))
    variables = first(unit)
    assert [leaf.shape for leaf in jax.tree.leaves(variables)] == [(2, 2)]
    expected = np.array([[0.9, 0.1], [0.1, 0.9]], np.float32)
    np.testing.assert_array_equal(unit.apply(variables), expected)


def test_all_four_learn():
    unit = CrossStitch(True, (0.9, 0.1))
    variables = first(unit)
    gradient = jax.grad(lambda v: (jnp.asarray(unit.apply(v)) * PROBE).sum())(variables)
    np.testing.assert_array_equal(gradient["params"]["weights"], PROBE)


def test_disabled_it_is_the_identity_without_parameters():
    unit = CrossStitch(False, (0.9, 0.1))
    variables = first(unit)
    assert jax.tree.leaves(variables) == []
    np.testing.assert_array_equal(unit.apply(variables), np.eye(2))
