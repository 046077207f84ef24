"""The mesh, its errors, and that splitting a batch over devices changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest
from jax.sharding import PartitionSpec as P

from deepsc_jax.config import DataConfig, PlatformConfig
from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.models.deepsc.losses import scan_losses
from deepsc_jax.models.deepsc.network import DeepSC
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError

DEVICES = [1, 2, 4]


def mesh(data: int, space: int = 1) -> jax.sharding.Mesh:
    return device_mesh.make_mesh(PlatformConfig(data_devices=data, space=space))


def test_the_mesh_has_a_data_and_a_space_axis():
    assert jax.device_count() == 8
    assert mesh(2, 3).shape == {"data": 2, "space": 3}
    assert mesh(0).shape == {"data": 8, "space": 1}
    assert mesh(0, 3).shape == {"data": 2, "space": 3}


@pytest.mark.parametrize(("data", "space", "needed"), [(9, 1, 9), (4, 4, 16), (0, 9, 9)])
def test_too_few_devices_are_refused_with_their_number(data, space, needed):
    with pytest.raises(
        InputError, match=f"--data_devices={data} --space={space}: {needed} devices .* 8 "
    ):
        mesh(data, space)


@pytest.mark.parametrize(
    ("batch", "parts", "refused"),
    [(8, 1, ""), (6, 1, "4 devices: .* of 4,"), (8, 4, "4 devices in 4 parts each: .* of 16,")],
)
def test_a_batch_that_the_devices_do_not_divide_is_refused_by_its_flag(batch, parts, refused):
    if not refused:
        device_mesh.check_batch("deepsc.joint.batch", batch, parts, mesh(4))
        return
    with pytest.raises(InputError, match=f"--deepsc.joint.batch={batch}: .* {refused}"):
        device_mesh.check_batch("deepsc.joint.batch", batch, parts, mesh(4))


def test_optimizer_state_is_split_along_the_first_axis_that_divides():
    tree = {"kernel": jnp.zeros((3, 6, 8)), "bias": jnp.zeros(4), "count": jnp.zeros(())}
    specs = {k: v.spec for k, v in device_mesh.split_over_data(tree, mesh(4, 2)).items()}
    expected = {"kernel": P(None, None, "data"), "bias": P("data"), "count": P()}
    assert specs == expected


def test_volumes_are_split_along_depth_over_space():
    batch = {
        "tiles": np.zeros((2, 3, 8, 4, 4)),
        "slices": np.zeros((2, 8, 4, 4)),
        "label": np.arange(2),
    }
    put = device_mesh.put_batch(batch, mesh(2, 4), DEPTH_AXES)
    shapes = {name: x.addressable_shards[0].data.shape for name, x in put.items()}
    assert shapes == {"tiles": (1, 3, 2, 4, 4), "slices": (1, 2, 4, 4), "label": (1,)}


def test_batches_are_split_and_parameters_copied():
    batch = {"x": np.arange(8.0).reshape(4, 2), "label": np.arange(4)}
    put = device_mesh.put_batch(batch, mesh(2, 2), {})
    for name, array in batch.items():
        np.testing.assert_array_equal(put[name], array)
        for shard in put[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, array[shard.index])
            assert len(shard.data) == 2
    copied = jax.device_put(jnp.arange(3.0), device_mesh.replicated(mesh(2, 2)))
    assert [len(shard.data) for shard in copied.addressable_shards] == [3] * 4


def mean_square(weights, batch):
    """Of a small two-layer network, over a global batch of 8."""
    hidden = jnp.tanh(batch["x"] @ weights["first"])
    return ((hidden @ weights["second"] - batch["y"]) ** 2).sum() / 8


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    weights = {"first": rng.normal(size=(3, 5)), "second": rng.normal(size=(5,))}
    batch = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=(8,))}
    return jax.tree.map(np.float32, (weights, batch))


@pytest.mark.parametrize("devices", DEVICES)
def test_a_small_programs_loss_and_gradient_are_one_devices(small, devices):
    weights, batch = small
    expected = jax.value_and_grad(mean_square)(weights, jax.tree.map(jnp.asarray, batch))

    def per_device(weights, _, batch):
        return device_mesh.sum_over_data(jax.value_and_grad(mean_square)(weights, batch))

    program = jax.jit(device_mesh.over_data(per_device, mesh(devices)))
    found = program(weights, {}, device_mesh.put_batch(batch, mesh(devices), {}))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_are_a_devices_own_until_they_are_summed(small):
    weights, batch = small

    def per_device(weights, _, batch):
        gradient = jax.grad(mean_square)(weights, batch)
        return jax.tree.map(lambda g: g[None], gradient)

    program = device_mesh.over_data(per_device, mesh(2), gathered=True)
    found = jax.jit(program)(weights, {}, device_mesh.put_batch(batch, mesh(2), {}))
    for half in range(2):
        share = jax.tree.map(lambda x, h=half: jnp.asarray(x[4 * h : 4 * h + 4]), batch)
        expected = jax.grad(mean_square)(weights, share)
        for name in expected:
            np.testing.assert_allclose(found[name][half], expected[name], rtol=1e-5, atol=1e-6)


def test_gathered_results_are_one_row_per_example_in_order(small):
    _, batch = small
    program = device_mesh.over_data(lambda w, _, b: w * b["x"], mesh(4), gathered=True)
    found = jax.jit(program)(jnp.asarray(2.0), {}, device_mesh.put_batch(batch, mesh(4), {}))
    np.testing.assert_array_equal(found, 2 * batch["x"])


TILE = (8, 8, 8)
DATA = DataConfig(working_size=(8, 8), tile=TILE, slices=4, depth_bucket=8)
NETWORK = DeepSC(smallest.MODEL, DATA, Layout(form="folded"))


@pytest.fixture(scope="module")
def segmentation(drawn):
    """Parameters and a batch of four scans of the segmentation stage, some of them short."""
    rng = np.random.default_rng(0)
    batch = {
        "tiles": rng.uniform(size=(4, 1, *TILE)).astype(np.float32),
        "lesions": (rng.uniform(size=(4, 1, *TILE)) < 0.2).astype(np.float32),
        "origins": np.zeros((4, 1, 3), np.int32),
        "depth": np.array([8, 5, 8, 3], np.int32),
    }
    real = np.arange(TILE[0]) < batch["depth"][:, None]
    for name in ("tiles", "lesions"):
        batch[name] *= real[:, None, :, None, None]
    return drawn(NETWORK, batch, "segmentation")["params"], batch


@pytest.mark.slow
def test_the_segmentation_stages_gradient_does_not_depend_on_the_devices(segmentation):
    params, batch = segmentation

    def share_of_loss(params, batch):
        out = NETWORK.apply({"params": params}, batch, "segmentation")
        terms = scan_losses(smallest.MODEL, DATA, "segmentation", out, batch, jnp.ones(3))  # type: ignore[arg-type]
        return terms["loss"].sum() / 4

    def per_device(params, _, batch):
        return device_mesh.sum_over_data(jax.value_and_grad(share_of_loss)(params, batch))

    results = []
    for devices in (1, 4):  # a compilation each
        program = jax.jit(device_mesh.over_data(per_device, mesh(devices)))
        results.append(program(params, {}, device_mesh.put_batch(batch, mesh(devices), DEPTH_AXES)))
    (loss, gradient), (other_loss, other) = results
    assert loss > 0.1
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for one, two in zip(*map(jax.tree.leaves, (gradient, other)), strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * largest)
