"""Normalisation, pooling and upsampling, against plain numpy."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.models.deepsc.lesion import DoubleConv
from deepsc_jax.models.layers import blocks as layers
from deepsc_jax.models.layers import slabs
from deepsc_jax.models.layers.layout import Layout, resolve_dtype, resolve_form
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.errors import InputError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def group_norm(x, groups, scale, bias, valid=None):
    """Wu and He's definition over the real slices of each scan, one group at a time."""
    y = np.zeros(x.shape)
    width = x.shape[-1] // groups
    for b, g in np.ndindex(len(x), groups):
        real = slice(0, x.shape[1] if valid is None else valid[b])
        channels = slice(g * width, (g + 1) * width)
        part = x[b, real, :, :, channels].astype(np.float64)
        normal = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
        y[b, real, :, :, channels] = normal * scale[channels] + bias[channels]
    return y


@pytest.fixture(scope="module", params=["native", "sliced", "folded"])
def normalise(request):
    """GroupNorm of 2 groups over 6 channels, with values and gradients of a weighted sum."""

    @jax.jit
    def run(x, scale, bias, valid, probe):
        def summed(x, scale, bias):
            variables = {"params": {"scale": scale, "bias": bias}}
            mask = layers.real_slices(valid, x.shape[1])
            y = layers.GroupNorm(2, Layout(request.param)).apply(variables, x, mask)
            return (y * probe).sum(), y

        gradients, y = jax.grad(summed, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
        return y, gradients

    return run


SCALE, BIAS = draw(6, seed=5) + 1, draw(6, seed=6)


@pytest.mark.parametrize("width", [5, 24])  # on a TPU one by one, and in three rows of lanes
def test_group_norm_is_the_definition_over_real_slices(normalise, width):
    x, probe = draw(2, 4, 3, width, 6) * 3 + 2, draw(2, 4, 3, width, 6, seed=1)
    found, _ = normalise(x, SCALE, BIAS, np.array([4, 4]), probe)
    np.testing.assert_allclose(found, group_norm(x, 2, SCALE, BIAS), rtol=1e-5, atol=1e-5)
    found, _ = normalise(x, SCALE, BIAS, np.array([3, 1]), probe)
    expected = group_norm(x, 2, SCALE, BIAS, [3, 1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not np.any(found[0, 3:])
    assert not np.any(found[1, 1:])


def test_group_norm_without_valid_sees_every_slice():
    x = draw(2, 4, 3, 5, 6)
    variables = {"params": {"scale": SCALE, "bias": BIAS}}
    found = jax.jit(lambda x: layers.GroupNorm(2).apply(variables, x, None))(x)
    np.testing.assert_allclose(found, group_norm(x, 2, SCALE, BIAS), rtol=1e-5, atol=1e-5)


def test_group_norm_has_torchs_epsilon(normalise):
    x = np.zeros((1, 4, 3, 5, 6), np.float32)
    x[:, 0] = 1e-3  # a variance of 2e-7, far below epsilon
    found, _ = normalise(x, np.ones(6), np.zeros(6), np.array([4]), x)
    peak = 0.75e-3 / np.sqrt(1e-6 * 3 / 16 + 1e-5)
    np.testing.assert_allclose(found[0, 0], peak, rtol=1e-4)


def test_group_norm_keeps_its_digits_on_large_means(normalise):
    # Sums of squares round by 6e-8 of them: at a mean of 1000, were it not taken off first, by 6e-2
    # of the variance. What is left is the rounding of the input itself, 3e-5.
    x = draw(2, 4, 3, 5, 6) + 1000
    found, _ = normalise(x, SCALE, BIAS, np.array([4, 3]), x)
    expected = group_norm(x, 2, SCALE, BIAS, [4, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [5, 24])
def test_group_norm_gradients_match_finite_differences(normalise, width):
    x, probe = draw(2, 4, 3, width, 6), draw(2, 4, 3, width, 6, seed=1)
    valid, step = np.array([4, 2]), 1e-5
    _, gradients = normalise(x, SCALE, BIAS, valid, probe)
    assert not np.any(gradients[0][1, 2:])

    def summed(x, scale, bias):
        return (group_norm(x, 2, scale, bias, valid) * probe).sum()

    for i, gradient in enumerate(gradients):
        direction = draw(*gradient.shape, seed=7 + i).astype(np.float64)
        ahead, behind = ([a.astype(np.float64) for a in (x, SCALE, BIAS)] for _ in range(2))
        ahead[i] += step * direction
        behind[i] -= step * direction
        slope = (summed(*ahead) - summed(*behind)) / (2 * step)
        # Cancellation among up to 1728 terms of float32.
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_a_scan_without_a_real_slice_is_zero_not_nan(normalise):
    x = draw(2, 4, 3, 5, 6)
    found, gradients = normalise(x, SCALE, BIAS, np.array([0, 4]), x)
    assert not np.any(found[0])
    assert all(np.isfinite(g).all() for g in gradients)


def test_padded_slices_never_change_real_ones(normalise):
    x = draw(2, 4, 3, 5, 6)
    valid = np.array([3, 2])
    other = x.copy()
    other[0, 3:], other[1, 2:] = 1e4, -50
    np.testing.assert_array_equal(
        normalise(x, SCALE, BIAS, valid, x)[0], normalise(other, SCALE, BIAS, valid, x)[0]
    )

    class Unit(nn.Module):
        """Masked before a convolution, as every caller does."""

        @nn.compact
        def __call__(self, x, valid):
            mask = layers.real_slices(valid, x.shape[1])
            x = layers.masked(x, mask)
            return layers.ConvNormAct(4, 2, layout=Layout("folded"))(x, mask)

    params = jax.jit(Unit().init)(jax.random.key(0), x, valid)
    apply = jax.jit(Unit().apply)
    short = np.concatenate([x[:1, :3], np.zeros((1, 3, 3, 5, 6), np.float32)], axis=1)
    long = apply(params, short, np.array([3]))[0, :3]
    np.testing.assert_array_equal(apply(params, x, valid), apply(params, other, valid))
    np.testing.assert_allclose(apply(params, x, valid)[0, :3], long, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["native", "folded"])
def test_deconvolution_writes_one_block_per_voxel(form):
    x = draw(2, 2, 3, 4, 5)
    module = layers.Deconv(3, Layout(form))
    params = module.init(jax.random.key(0), x)
    kernel = np.asarray(params["params"]["kernel"], np.float64)
    expected = np.zeros((2, 4, 6, 8, 3))
    for d, h, w in np.ndindex(2, 2, 2):
        expected[:, d::2, h::2, w::2] = x.astype(np.float64) @ kernel[d, h, w]
    probe = draw(*expected.shape, seed=1)

    def ours(params, x):
        y = jnp.asarray(module.apply(params, x))
        return (y * probe).sum(), y

    def laxs(params, x):  # which reads the kernel backwards
        kernel = params["params"]["kernel"][::-1, ::-1, ::-1]
        dims = ("NDHWC", "DHWIO", "NDHWC")
        y = jax.lax.conv_transpose(x, kernel, (2, 2, 2), "VALID", dimension_numbers=dims)
        return (y * probe).sum(), y

    gradients, found = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    general = jax.jit(jax.grad(laxs, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(found, general[1], rtol=1e-5, atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradients, general[0])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_max_pool_takes_each_block_and_shares_ties():
    x = draw(2, 4, 2, 6, 3)
    found = layers.max_pool(jnp.asarray(x))
    assert found.shape == (2, 2, 1, 3, 3)
    for b, d, w, c in np.ndindex(2, 2, 3, 3):
        block = x[b, 2 * d : 2 * d + 2, :, 2 * w : 2 * w + 2, c]
        assert found[b, d, 0, w, c] == block.max()
    tied = jnp.zeros((1, 2, 2, 2, 1)).at[0, 0, :, 0, 0].set(5.0)
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(tied)
    assert gradient[0, :, :, :, 0].tolist() == [[[0.5, 0], [0.5, 0]], [[0, 0], [0, 0]]]


def test_a_half_filled_slice_pools_to_its_real_half():
    x = np.abs(draw(1, 4, 2, 2, 1)).astype(np.float32)
    x[:, 3:] = 0
    found = layers.max_pool(jnp.asarray(x))
    assert found[0, 1].item() == x[0, 2].max()


def test_a_mask_is_pooled_to_blocks_that_hold_a_voxel_that_counts():
    slices = layers.real_slices(jnp.array([3, 4, 1, 0]), 4)
    assert layers.pool_mask(slices)[:, :, 0, 0, 0].sum(axis=1).tolist() == [2, 2, 1, 0]
    one = jnp.zeros((1, 8, 8, 8, 1), bool).at[0, 5, 2, 7, 0].set(True)
    for mask, step in zip(layers.pyramid(one, 4), (1, 2, 4, 8), strict=True):
        assert mask is not None
        assert np.argwhere(mask[0, ..., 0]).tolist() == [[5 // step, 2 // step, 7 // step]]
    in_plane = layers.pool_mask(one, (1, 2, 2))
    assert np.argwhere(in_plane[0, ..., 0]).tolist() == [[5, 1, 3]]
    assert layers.pool_mask(None) is None


@pytest.mark.parametrize("form", ["native", "sliced", "folded"])
def test_group_norm_sees_the_lungs_alone(form):
    # What is around them, and how much, changes neither the result there nor the statistics.
    x, around = draw(2, 4, 6, 24, 6) + 50, draw(2, 8, 12, 48, 6, seed=1) * 100
    lungs = np.random.default_rng(2).uniform(size=(2, 4, 6, 24, 1)) < 0.3
    box = np.s_[:, 2:6, 3:9, 8:32]
    wide, where = around, np.zeros((*around.shape[:4], 1), bool)
    wide[box], where[box] = x, lungs
    variables = {"params": {"scale": SCALE, "bias": BIAS}}
    norm = layers.GroupNorm(2, Layout(form))
    tight, found = (
        np.asarray(norm.apply(variables, jnp.asarray(v), jnp.asarray(m)))
        for v, m in ((x, lungs), (wide, where))
    )
    np.testing.assert_allclose(found[box], tight, rtol=1e-4, atol=1e-4)
    assert not found[~where[..., 0]].any()
    for b in range(2):  # by hand, one group of three channels
        values = x[b, lungs[b, ..., 0], :3].astype(np.float64)
        by_hand = (values - values.mean()) / np.sqrt(values.var() + 1e-5) * SCALE[:3] + BIAS[:3]
        np.testing.assert_allclose(tight[b, lungs[b, ..., 0], :3], by_hand, rtol=1e-4, atol=1e-4)


def test_average_in_plane_is_the_mean_of_blocks():
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4, 1)
    found = layers.average_in_plane(jnp.asarray(x), 2)
    assert found[0, 0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_auto_is_resolved_by_platform():
    assert resolve_form("auto", "cpu") == "folded"
    assert resolve_form("auto", "cpu", space=2) == "native"
    assert [resolve_form("auto", "gpu", space) for space in (1, 2)] == ["banded"] * 2
    assert resolve_form("auto", "tpu") == "sliced"
    assert resolve_form("auto", "tpu", space=2) == "native"
    assert resolve_form("auto", "metal") == "native"
    asked = ["native", "banded", "sliced", "folded"]
    assert [resolve_form(form, "cpu") for form in asked] == asked
    with pytest.raises(InputError, match="--conv_form=direct: it is for CPUs, and this is a tpu"):
        resolve_form("direct", "tpu")
    assert resolve_dtype("auto", "cpu") == jnp.float32
    assert resolve_dtype("auto", "tpu") == jnp.bfloat16
    assert resolve_dtype("float32", "gpu") == jnp.float32


def test_half_precision_convolves_in_it_and_normalises_in_single():
    x = jnp.asarray(draw(1, 2, 4, 4, 6))
    module = layers.ConvNormAct(4, 2, layout=Layout(dtype=jnp.dtype(jnp.bfloat16)))
    abstract = functools.partial(jax.eval_shape, module.init, jax.random.key(0))
    params = abstract(x, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(module.apply, params, x, None).dtype == jnp.bfloat16
    # Mean 2 and deviation 1; a sum taken in bfloat16 would stop growing at 512 of these 2048.
    flat = jnp.full((1, 4, 16, 16, 2), 1.0, jnp.bfloat16).at[:, ::2].set(3.0)
    norm = layers.GroupNorm(1)
    found = jax.jit(norm.apply)(norm.init(jax.random.key(0), flat, None), flat, None)
    assert found.dtype == jnp.bfloat16
    assert np.unique(np.asarray(found, np.float32)).tolist() == [-1.0, 1.0]


def test_a_loop_over_tiles_takes_along_no_constant_as_large_as_a_tile():
    tiles, mask = jnp.asarray(draw(3, 1, 4, 4, 4, 2)), layers.real_slices(jnp.array([3]), 4)

    def one(total, tile):
        return total + layers.max_pool(layers.masked(tile, mask)).sum(), None

    traced = jax.make_jaxpr(jax.grad(lambda x: jax.lax.scan(one, 0.0, x)[0]))(tiles)
    loops = [e for e in traced.eqns if e.primitive.name == "scan"]
    assert len(loops) == 2  # forward and backward
    for loop in loops:
        pairs = zip(loop.invars, loop.params["jaxpr"].jaxpr.invars, strict=True)
        kept = [v for v, inside in pairs if v.aval.shape == inside.aval.shape]  # not a slice each
        assert all(v.aval.size < tiles[0].size for v in kept)


@pytest.mark.parametrize("tile", [(64, 128, 128), (16, 32, 32)])  # large, and not
@pytest.mark.parametrize("wanted", [False, True])
def test_a_cpu_computes_again_what_a_block_does_not_keep(wanted, tile, drawn, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2**13)  # two slabs
    x = draw(1, 16, 8, 8, 4)
    block: Any = layers.recomputed(DoubleConv, wanted)(4, 2, Layout("folded"))
    params = drawn(block, x, None)

    def loss(params, x):
        return (block.apply(params, 2 * x, None) ** 2).sum()

    options = compiler.options("cpu", tile, "folded")
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options)
    program = gradient.lower(params, x).compile().as_text() or ""
    # Of both convolutions, slab by slab: forward, the kernel's gradient, the input's gradient; and
    # forward again. Without `compiler_options` XLA merges one of them with the first.
    assert program.count(" convolution(") == (16 if wanted else 12)
