"""Batch normalisation: over devices, with filled-up batches, and far from zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepsc_jax.config import PlatformConfig
from deepsc_jax.models.layers.batch_norm import BATCH_STATS, BatchNorm
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh

WEIGHTS = np.array([1, 1, 0, 1, 1, 1, 0, 1.0])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def train(norm, variables, x, weights=None) -> Any:
    return norm.apply(variables, x, train=True, weights=weights, mutable=[BATCH_STATS])


def over_devices(count, form, weights, *, local=False, rows=slice(None)):
    """Loss, gradient of input and parameters, and statistics after a step over `count` devices."""
    norm = BatchNorm(Layout(form, local_norms=local))
    x, probe = draw(8, 2, 3, 4, 5) + 3, draw(8, 2, 3, 4, 5, seed=1)
    x, probe, weights = x[rows], probe[rows], weights[rows]
    with jax.enable_x64(True):
        params = {"scale": draw(5, seed=2) + 1, "bias": draw(5, seed=3)}
        stats = {"mean": draw(5, seed=4), "var": np.exp(draw(5, seed=5))}

        def loss(params, x, stats, probe, weights):
            y, moved = train(norm, {"params": params, BATCH_STATS: stats}, x, weights)
            return ((y * probe) ** 2 * weights[:, None, None, None, None]).sum(), moved

        def program(params, stats, batch):
            x, probe, weights = batch
            own = device_mesh.varying(params)
            both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (value, moved), (of_params, of_x) = both(own, x, stats, probe, weights)
            value, of_params = device_mesh.sum_over_data((value, of_params))
            return value, of_params, of_x, moved

        mesh = device_mesh.make_mesh(PlatformConfig(data_devices=count))
        mapped = jax.shard_map(
            program,
            mesh=mesh,
            in_specs=(P(), P(), P(device_mesh.DATA)),
            out_specs=(P(), P(), P(device_mesh.DATA), P()),
            axis_names={device_mesh.DATA},  # as `over_data` has it
        )
        lowered = jax.jit(mapped).lower(params, stats, (x, probe, weights))
        reductions = lowered.as_text().count("stablehlo.all_reduce")
        assert reductions == (2 if local else 3)  # the last: of the results
        return jax.device_get(lowered.compile()(params, stats, (x, probe, weights)))


@pytest.mark.parametrize("form", ["native", "folded"])
def test_devices_share_one_batchs_statistics(form):
    one, *others = (over_devices(count, form, WEIGHTS) for count in (1, 2, 4, 8))
    for other in others:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * np.abs(a).max())


def test_local_norms_are_those_of_each_devices_own_examples_and_move_by_their_mean():
    both = over_devices(2, "native", WEIGHTS, local=True)
    halves = [over_devices(1, "native", WEIGHTS, rows=rows) for rows in (slice(4), slice(4, 8))]
    (a, of_params, of_x, moved), (b, *others) = halves
    expected = (
        a + b,
        jax.tree.map(np.add, of_params, others[0]),
        np.concatenate([of_x, others[1]]),
        jax.tree.map(lambda x, y: (x + y) / 2, moved, others[2]),
    )
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * np.abs(y).max())
    shared = over_devices(2, "native", WEIGHTS)
    assert np.abs(both[2] - shared[2]).max() > 1e-3 * np.abs(shared[2]).max()


def test_a_device_with_nothing_but_filling_moves_no_running_statistics():
    weights = np.array([1, 1, 1, 1, 0, 0, 0, 0.0])
    *_, moved = over_devices(2, "native", weights, local=True)
    *_, expected = over_devices(1, "native", weights, rows=slice(4))
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


@pytest.mark.parametrize("form", ["native", "folded"])
def test_what_fills_a_batch_up_enters_no_statistics(form):
    norm = BatchNorm(Layout(form))
    x = draw(8, 3, 4, 5).astype(np.float32)
    variables = norm.init(jax.random.key(0), x, train=True)
    x[WEIGHTS == 0] = 1e3
    whole, moved = train(norm, variables, x, WEIGHTS)
    real, expected = train(norm, variables, x[WEIGHTS == 1])
    np.testing.assert_allclose(whole[WEIGHTS == 1], real, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _, kept = train(norm, variables, x, np.zeros(8))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(variables[BATCH_STATS]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_initialisation_leaves_the_running_statistics_at_their_start():
    x = draw(2, 3, 4).astype(np.float32)
    stats: Any = BatchNorm().init(jax.random.key(0), x, train=True)[BATCH_STATS]
    assert stats["mean"].tolist() == [0] * 4
    assert stats["var"].tolist() == [1] * 4


def test_digits_are_kept_far_from_zero_once_the_running_mean_is_there():
    # Squares of 1000 round by 6e-2 in float32: so would the variance, were the mean not taken off.
    x = (draw(4, 5, 6, 3) + 1000).astype(np.float32)
    norm = BatchNorm()
    stats = {"mean": np.full(3, 999, np.float32), "var": np.ones(3, np.float32)}
    params = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
    y, moved = train(norm, {"params": params, BATCH_STATS: stats}, x)
    exact = x.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(
        np.reshape(y, (-1, 3)), (exact - exact.mean(0)) / exact.std(0), atol=1e-4
    )
    np.testing.assert_allclose(
        moved[BATCH_STATS]["var"], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-5
    )


def test_half_precision_is_normalised_in_single():
    x = jnp.asarray(draw(2, 8, 8, 3) + 5, jnp.bfloat16)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    y, moved = train(norm, variables, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, moved))} == {jnp.dtype("float32")}
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(moved[BATCH_STATS]["mean"], 0.1 * exact.mean(0), rtol=1e-5)
