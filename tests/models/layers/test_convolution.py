"""The forms of a convolution, against the textbook's in plain numpy, and its slabs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepsc_jax.config import DataConfig, PlatformConfig
from deepsc_jax.models.layers import bands, slabs
from deepsc_jax.models.layers.convolution import conv3d
from deepsc_jax.models.layers.layout import CPU_FORMS, resolve_form
from deepsc_jax.models.layers.slabs import STACKED_CHANNELS
from deepsc_jax.runtime import compiler, device_mesh
from deepsc_jax.runtime.errors import InputError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def along_depth_and_in_plane(stride):
    return (1, stride) if isinstance(stride, int) else stride


def convolve(x, kernel, stride):
    """The textbook sum over kernel offsets, zero padding k // 2, in float64."""
    taps, (step, stride) = kernel.shape[:3], along_depth_and_in_plane(stride)
    padded = np.pad(x.astype(np.float64), [(0, 0), *((k // 2, k // 2) for k in taps), (0, 0)])
    sides = [-(-x.shape[1] // step), -(-x.shape[2] // stride), -(-x.shape[3] // stride)]
    y = np.zeros((len(x), *sides, kernel.shape[-1]))
    for d, h, w in np.ndindex(*taps):
        slices = slice(d, d + step * (sides[0] - 1) + 1, step)
        rows = slice(h, h + stride * (sides[1] - 1) + 1, stride)
        columns = slice(w, w + stride * (sides[2] - 1) + 1, stride)
        y += padded[:, slices, rows, columns] @ kernel[d, h, w]
    return y


def sums_and_gradients(x, kernel, probe, stride, form):
    def probed(x, kernel):
        y = conv3d(x, kernel, stride, form)
        return (y * probe).sum(), y

    return jax.value_and_grad(probed, argnums=(0, 1), has_aux=True)(x, kernel)


FORMS = ("native", "banded", "sliced", "folded", "direct")
any_form = jax.jit(sums_and_gradients, static_argnames=("stride", "form"))


@pytest.mark.parametrize(
    ("kernel", "stride", "shape", "channels"),
    [
        (1, 1, (3, 5, 4), 3),
        (1, 1, (3, 5, 4), 1),
        (1, 2, (3, 5, 4), 3),
        (3, 1, (4, 5, 6), 3),
        (3, 2, (4, 6, 5), 3),
        (5, 1, (3, 7, 6), 2),
        (5, 2, (2, 7, 8), 2),
        (3, 1, (1, 4, 4), STACKED_CHANNELS - 1),
        (3, 1, (3, 4, 4), STACKED_CHANNELS),
        (3, 2, (3, 5, 4), STACKED_CHANNELS + 1),
        (3, 1, (2, 3, 128), 1),
        (3, 2, (3, 4, 32), 3),
        (5, 1, (2, 3, 16), 8),
        (5, 2, (2, 4, 32), 5),
        (1, 2, (2, 4, 16), 4),
        (1, (2, 2), (3, 5, 4), 3),
        (3, (2, 2), (5, 6, 32), 3),
        (3, (2, 2), (4, 5, 4), STACKED_CHANNELS),
        (3, (2, 1), (4, 3, 4), 2),
        (7, (2, 2), (6, 9, 8), 1),
    ],
)
def test_every_form_is_the_textbook_convolution(kernel, stride, shape, channels):
    x = draw(2, *shape, channels)
    weights = draw(kernel, kernel, kernel, channels, 2, seed=1)
    expected = convolve(x, weights, stride)
    probe = draw(*expected.shape, seed=2)
    results = [any_form(x, weights, probe, stride, form) for form in FORMS]
    for (_, values), _ in results:
        # Sums of up to 900 products of float32 normals.
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=2e-5)
    (_, native), *others = results
    for one, *found in zip(native, *(gradients for _, gradients in others), strict=True):
        for other in found:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize(
    ("width", "channels", "features", "stride", "voxels"),
    [
        (128, 1, 4, 1, 16),
        (128, 4, 4, 1, 16),
        (512, 4, 4, 2, 16),
        (128, 16, 16, 1, 4),
        (128, 32, 16, 1, 4),
        (64, 32, 32, 1, 2),
        (32, 64, 64, 1, 1),
        (128, 64, 128, 2, 1),
        (64, 4, 4, 1, 8),  # 8 groups of 8
        (40, 4, 4, 1, 4),  # no multiple of 16, and 5 groups of 8
        (41, 4, 4, 1, 1),
    ],
)
def test_a_band_fills_the_channels_of_a_tensor_core(width, channels, features, stride, voxels):
    kernel = (3, 3, 3, channels, features)
    assert bands.band_voxels(width, kernel, stride) == voxels


@pytest.mark.parametrize(
    ("width", "channels", "features", "stride", "voxels"),
    [
        (128, 4, 4, 1, 32),
        (128, 16, 16, 1, 8),
        (128, 32, 16, 1, 4),
        (32, 64, 64, 1, 2),
        (128, 64, 128, 2, 2),
        (32, 128, 128, 1, 1),
        (40, 4, 4, 1, 8),
        (41, 4, 4, 1, 1),
    ],
)
def test_a_band_fills_a_tpus_lanes(width, channels, features, stride, voxels):
    kernel = (3, 3, 3, channels, features)
    assert bands.lane_voxels(width, kernel, stride) == voxels


@pytest.mark.parametrize(("channels", "features"), [(1, 4), (1, 32), (2, 4), (3, 8), (4, 4)])
def test_a_band_reads_multiples_of_eight_channels(monkeypatch, channels, features):
    read = []

    def native(x, kernel, *_):
        read.append((x.shape[-1], kernel.shape[3]))
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]))

    monkeypatch.setattr(bands, "native", native)
    conv3d(
        jnp.zeros((1, 3, 4, 128, channels)), jnp.zeros((3, 3, 3, channels, features)), 1, "banded"
    )
    ((stacked, taken),) = read
    assert stacked == taken > 2 * channels
    assert stacked % 8 == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["banded", "sliced", "folded", "direct"])
def test_a_convolution_of_half_precision_has_a_gradient_in_single(form, stride, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    monkeypatch.setattr(slabs, "SLAB_SLICES", 1)
    x, weights = jnp.asarray(draw(1, 3, 4, 32, 4), jnp.bfloat16), draw(3, 3, 3, 4, 4, seed=1)
    probe = draw(1, 3, 4 // stride, 32 // stride, 4, seed=2)
    (_, native), (_, found) = (
        any_form(x, weights, probe, stride, form) for form in ("native", form)
    )
    assert [leaf.dtype for leaf in found] == [jnp.bfloat16, jnp.float32]
    if form in CPU_FORMS:  # several slabs, whose sum in half precision is its rounding
        assert np.any(found[1] != found[1].astype(jnp.bfloat16).astype(jnp.float32))
    for one, other in zip(native, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=0.01 * np.abs(one).max())


def test_slices_of_half_precision_are_summed_in_single():
    x = jnp.asarray(draw(1, 4, 5, 16, 8), jnp.bfloat16)
    weights = jnp.asarray(draw(3, 3, 3, 8, 8, seed=1), jnp.bfloat16)
    found = conv3d(x, weights, 1, "sliced").astype(jnp.float32)
    expected = convolve(np.asarray(x, np.float32), np.asarray(weights, np.float64), 1)
    # Rounded once: by half a unit of bfloat16's last place; sums of float32 add a little.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "stride"), [("folded", 1), ("folded", 2), ("folded", (3, 2)), ("direct", 1)]
)
@pytest.mark.parametrize("channels", [pytest.param(3, marks=pytest.mark.slow), 4, STACKED_CHANNELS])
def test_a_convolution_in_slabs_is_that_of_the_whole(monkeypatch, stride, channels, form):
    x, weights = draw(2, 7, 6, 4, channels), draw(3, 3, 3, channels, 3, seed=1)
    step, apart = along_depth_and_in_plane(stride)
    probe = draw(2, -(-7 // step), 6 // apart, 4 // apart, 3, seed=2)
    whole = sums_and_gradients(x, weights, probe, stride, form)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    monkeypatch.setattr(slabs, "SLAB_SLICES", 2)
    # The last has one slice of the 7; with a stride, a slab begins at a multiple of it.
    assert (x.shape[1], slabs.slab_slices(jnp.asarray(x), 3)) == (7, 2)
    in_slabs = sums_and_gradients(x, weights, probe, stride, form)
    for one, other in zip(jax.tree.leaves(in_slabs), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_a_kernels_gradient_has_no_more_slabs_than_are_worth_compiling(monkeypatch):
    x, cotangent, kernel = draw(2, 7, 6, 4, 3), draw(2, 7, 6, 4, 2), draw(3, 3, 3, 3, 2)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)
    monkeypatch.setattr(slabs, "SLAB_SLICES", 1)
    found = {}
    for most in (1, 3, 16):  # each scan's 7 slices and a margin of 1: in slabs of 16, 6 and 1
        monkeypatch.setattr(slabs, "MOST_SLABS", most)
        gradient = jax.jit(lambda *given: slabs.kernel_gradient(*given))
        program = gradient.lower(x, cotangent, kernel)
        assert program.as_text().count("stablehlo.convolution") == most
        found[most] = program.compile()(x, cotangent, kernel)
    for other in (found[3], found[16]):
        np.testing.assert_allclose(other, found[1], rtol=1e-5, atol=1e-5)


def test_a_kernel_need_not_be_a_cube():
    x, weights = draw(1, 4, 5, 32, 2), draw(1, 3, 5, 2, 3, seed=1)
    assert bands.band_voxels(32, weights.shape, 1) > 1
    expected = convolve(x, weights, 1)
    probe = draw(*expected.shape, seed=2)
    _, native = any_form(x, weights, probe, 1, "native")
    for form in FORMS:
        (_, values), gradients = any_form(x, weights, probe, 1, form)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(native, gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_direct_without_onednn_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(compiler, "has_onednn", lambda: False)
    with pytest.raises(InputError, match=r"JAX \d.* has no oneDNN here"):
        resolve_form("direct", "cpu")


def test_a_jax_without_the_options_has_no_onednn(monkeypatch):
    monkeypatch.setattr(compiler, "ONEDNN", {"xla_no_such_option": True})
    assert not compiler.has_onednn.__wrapped__()


def test_onednn_takes_direct_convolutions_but_not_their_kernels_gradient():
    if not compiler.has_onednn():
        pytest.skip("this JAX has no oneDNN; JAX 0.11 has")
    assert resolve_form("direct", "cpu") == "direct"
    x, weights, probe = draw(1, 8, 16, 16, 8), draw(3, 3, 3, 8, 8), draw(1, 8, 16, 16, 8)
    options = compiler.options("cpu", DataConfig().tile, "direct")
    gradients = jax.jit(sums_and_gradients, static_argnums=(3, 4), compiler_options=options)
    compiled = gradients.lower(x, weights, probe, 1, "direct").compile()
    program = compiled.as_text() or ""
    found = [program.count(f" {kind}(") for kind in ("custom-call", "convolution")]
    assert (found, program.count('"__onednn$convolution"')) == ([2, 1], 2)
    expected = any_form(x, weights, probe, 1, "native")
    pairs = zip(*map(jax.tree.leaves, (compiled(x, weights, probe), expected)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("form", ["native", "banded"])
def test_a_strided_convolution_of_split_depth_has_the_gradient_of_the_whole(form, monkeypatch):
    monkeypatch.setattr(bands, "BAND_GROUPS", 1)
    x, weights = draw(2, 8, 6, 16, 3), draw(3, 3, 3, 3, 4, seed=1)
    probe = draw(2, 4, 3, 8, 4, seed=2)

    def program(kernel, _, batch):
        (_, values), gradients = sums_and_gradients(batch[0], kernel, batch[1], (2, 2), form)
        return device_mesh.sum_over_data((values.sum(), gradients[1]))

    def over(space):
        mesh = device_mesh.make_mesh(PlatformConfig(data_devices=1, space=space))
        split = NamedSharding(mesh, PartitionSpec(device_mesh.DATA, device_mesh.SPACE))
        batch = jax.device_put((x, probe), split)
        return jax.jit(device_mesh.over_data(program, mesh))(weights, {}, batch)

    for one, other in zip(over(1), over(4), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())
