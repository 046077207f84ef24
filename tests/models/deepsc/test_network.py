"""The joint network: what a scan's result depends on, and the stages against one another."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig
from deepsc_jax.models.deepsc import network as deepsc
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.models.deepsc.network import DeepSC
from deepsc_jax.models.layers import bands
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.systems.building import build

TILE, SIZE, SLICES = (8, 16, 16), (32, 16), 6
DATA = DataConfig(working_size=SIZE, tile=TILE, slices=SLICES, depth_bucket=8)
MODEL = Options(
    inception_branches=((1,), (1, 3)),
    inception_channels=4,
    lesion_channels=(4, 4, 4),
    classifier_stem_channels=4,
    encoder_channels=(4, 4, 4),
    norm_groups=2,
)
FOLDED = Layout(form="folded")
NETWORK = DeepSC(MODEL, DATA, FOLDED)
# Sums in another order, in float32, through some thirty layers.
LOOSE = 1e-4


def scan(depth: int, seed: int) -> np.ndarray:
    """Blocks of 1x4x4 voxels, and some noise: coarse scales and pooled maps see them too."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(size=(depth, SIZE[0] // 4, SIZE[1] // 4)).repeat(4, 1).repeat(4, 2)
    return (0.8 * blocks + 0.2 * rng.uniform(size=blocks.shape)).astype(np.float32)


SCANS = [scan(11, 0), scan(5, 1)]


def run(network: DeepSC, variables: Any, batch: dict, stage: Any, gradient_tiles: int = 0) -> Any:
    return network.apply(variables, batch, stage, gradient_tiles)


def batch_of(
    scans: list[np.ndarray], bucket: int, tile: tuple[int, int, int] = TILE
) -> dict[str, jax.Array]:
    """All tiles of every scan, padded with zeros to `bucket` slices, and its sampled slices."""
    corners = list(itertools.product(range(0, bucket, tile[0]), range(0, SIZE[0], tile[1]), [0]))
    tiles = []
    for volume in scans:
        padded = np.pad(volume, ((0, bucket - len(volume)), (0, 0), (0, 0)))
        parts = [padded[d : d + tile[0], h : h + tile[1]] for d, h, _ in corners]
        tiles.append(np.stack(parts))
    chosen = [v[[i * len(v) // SLICES for i in range(SLICES)]] for v in scans]
    return {
        "tiles": jnp.asarray(np.stack(tiles)),
        "origins": jnp.asarray([corners] * len(scans), jnp.int32),
        "slices": jnp.asarray(np.stack(chosen)),
        "depth": jnp.asarray([len(v) for v in scans], jnp.int32),
    }


BATCH = batch_of(SCANS, 16)


def assembled(out: dict[str, Any], index: int, depth: int, bucket: int) -> np.ndarray:
    """The lesion map of one scan, from its tiles in the order of `batch_of`."""
    tiles = np.asarray(out["lesion"][index, ..., 0])
    rows = tiles.reshape(bucket // TILE[0], SIZE[0] // TILE[1], *TILE)
    return np.concatenate([np.concatenate(list(r), axis=1) for r in rows])[:depth]


@pytest.fixture(scope="module")
def variables(drawn):
    """Random parameters: no scalar of the cross-stitch and no lesion branch is zero."""
    return drawn(NETWORK, BATCH, "joint")


@pytest.fixture(scope="module")
def joint():
    return jax.jit(lambda v, batch: run(NETWORK, v, batch, "joint"))


@pytest.fixture(scope="module")
def out(joint, variables):
    return joint(variables, BATCH)


def replaced(variables, **parts):
    """The variables with some leaves replaced, by subnet and path."""
    params = jax.tree.map(lambda x: x, variables["params"])
    for path, value in parts.items():
        *inner, last = path.split("__")
        node = params
        for name in inner:
            node = node[name]
        node[last] = jnp.broadcast_to(value, node[last].shape).astype(jnp.float32)
    return {"params": params}


def same(found, expected, message=""):
    bound = LOOSE * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=message)


def test_the_result_has_every_intermediate_by_name(out):
    assert out["lesion"].shape == (2, 4, *TILE, 1)
    sides = [tuple(t // s for t in TILE) for s in (8, 4, 2, 1)]
    assert [s.shape for s in out["scales"]] == [(2, 4, *side, 1) for side in sides]
    assert out["logits"].shape == (2, 3)
    in_plane = [(SIZE[0] // s, SIZE[1] // s) for s in (2, 4, 8)]
    assert [m.shape for m in out["maps"]] == [(2, SLICES, *side, 4) for side in in_plane]
    masks = jax.eval_shape(deepsc.evidence, out, jnp.zeros(2, jnp.int32))
    assert [m.shape for m in masks] == [(2, SLICES, *side) for side in in_plane]


def test_the_logits_depend_on_what_they_should(joint, variables, out):
    # Else the invariances below would hold of a network that ignores its input.
    changed = BATCH | {"tiles": BATCH["tiles"].at[0, 1, :4].multiply(0.5)}
    moved = joint(variables, changed)["logits"] - out["logits"]
    assert np.abs(moved[0]).max() > 10 * LOOSE * np.abs(out["logits"]).max()
    assert not np.any(moved[1])
    changed = BATCH | {"slices": BATCH["slices"].at[1, 2].multiply(0.5)}
    moved = joint(variables, changed)["lesion"] - out["lesion"]
    assert np.abs(moved[1]).max() > 10 * LOOSE
    assert not np.any(moved[0])


def test_the_result_does_not_depend_on_the_depth_bucket(joint, variables, out):
    longer = joint(variables, batch_of(SCANS, 24))
    same(longer["logits"], out["logits"])
    for i, volume in enumerate(SCANS):
        depth = len(volume)
        same(assembled(longer, i, depth, 24), assembled(out, i, depth, 16))
        assert not np.any(np.asarray(longer["lesion"])[i, 4:])
    for one, other in zip(longer["maps"], out["maps"], strict=True):
        same(one, other)


def test_padding_inside_a_tile_changes_nothing(joint, variables):
    scans, tile = [scan(5, 2), scan(8, 3)], (16, *TILE[1:])
    deeper = DeepSC(MODEL, dataclasses.replace(DATA, tile=tile, depth_bucket=16), FOLDED)
    found = jax.jit(lambda v, batch: run(deeper, v, batch, "joint"))(
        variables, batch_of(scans, 16, tile)
    )
    expected = joint(variables, batch_of(scans, 16))
    same(found["logits"], expected["logits"])
    same(found["lesion"][:, :, :8], expected["lesion"][:, :2])
    assert not np.any(found["lesion"][0, :, 5:])
    assert not np.any(found["lesion"][1, :, 8:])


def test_lungs_are_standardised_and_zeros_stay_zeros(variables, out):
    # Values of 0.36 ± 0.1 n become ± n; 0 is outside of the lungs. A network that subtracts and
    # divides by other figures sees the same where its input makes up for them.
    other = dataclasses.replace(DATA, intensity_mean=0.36 / 2, intensity_sd=0.1 / 2)
    halved = BATCH | {"tiles": BATCH["tiles"] / 2, "slices": BATCH["slices"] / 2}
    network = DeepSC(MODEL, other, FOLDED)
    found = jax.jit(lambda v, batch: run(network, v, batch, "joint"))(variables, halved)
    same(found["lesion"], out["lesion"])
    same(found["logits"], out["logits"])
    found = NETWORK.bind(variables)._standardise(jnp.array([0.0, 0.26, 0.36, 0.56]))
    np.testing.assert_allclose(found, [0.0, -1.0, 0.0, 2.0], atol=1e-6)


def test_a_tiles_result_ends_with_the_scan(out):
    # 11 slices: the second row of tiles holds 3; 5 slices: the first holds 5 and the second none.
    lesion = np.asarray(out["lesion"][..., 0])
    for i, counts in enumerate([(8, 8, 3, 3), (5, 5, 0, 0)]):
        for k, count in enumerate(counts):
            assert np.all(lesion[i, k, :count] > 0)
            assert not np.any(lesion[i, k, count:])


def test_the_result_does_not_depend_on_the_batch(joint, variables, out):
    with_another = joint(variables, batch_of([scan(16, 9), SCANS[0]], 16))
    same(with_another["logits"][1], out["logits"][0])
    same(with_another["lesion"][1], out["lesion"][0])


def test_the_result_does_not_depend_on_the_order_of_tiles(joint, variables, out):
    order = np.array([2, 0, 3, 1])
    shuffled = BATCH | {name: BATCH[name][:, order] for name in ("tiles", "origins")}
    found = joint(variables, shuffled)
    same(found["logits"], out["logits"])
    same(found["lesion"], out["lesion"][:, order])


def test_scanned_tiles_give_what_folded_tiles_give(variables, out):
    layout = dataclasses.replace(FOLDED, loop_tiles=True, remat_tiles=True, remat_blocks=True)
    network = DeepSC(MODEL, DATA, layout)
    found = jax.jit(lambda v: run(network, v, BATCH, "joint"))(variables)
    assert jax.tree.structure(found) == jax.tree.structure(out)
    for path, leaf in jax.tree.leaves_with_path(found):
        expected = out
        for key in path:
            expected = expected[getattr(key, "key", getattr(key, "idx", None))]
        same(leaf, expected, jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "form",
    [
        "sliced",
        # Tests of meshes (test_scale.py) train with these.
        pytest.param("native", marks=pytest.mark.slow),
        pytest.param("banded", marks=pytest.mark.slow),
    ],
)
def test_all_forms_of_convolutions_agree(variables, out, monkeypatch, form):
    monkeypatch.setattr(bands, "BAND_GROUPS", 1)  # the tiles' rows are short
    network = DeepSC(MODEL, DATA, Layout(form=form))
    found = jax.jit(lambda v: run(network, v, BATCH, "joint"))(variables)
    same(found["logits"], out["logits"])
    same(found["lesion"], out["lesion"])


@pytest.fixture(scope="module")
def alone(variables):
    """Both single-task stages on the batch, with the same parameters."""

    @jax.jit
    def both(v):
        segmentation = run(NETWORK, v, BATCH, "segmentation")
        return segmentation, run(NETWORK, v, BATCH, "classification")

    return both(variables)


def test_with_an_identity_stitch_tiles_are_the_segmentation_stages(joint, variables, alone, out):
    found = joint(replaced(variables, cross_stitch__weights=jnp.eye(2)), BATCH)
    same(found["lesion"], alone[0]["lesion"])
    for one, other in zip(found["scales"], alone[0]["scales"], strict=True):
        same(one, other)
    assert np.abs(out["lesion"] - found["lesion"]).max() > 10 * LOOSE


def test_a_silent_lesion_branch_gives_the_classification_stages_logits(joint, variables, alone):
    silent = {"classifier__lesion_stem__kernel": 0.0, "cross_stitch__weights": jnp.eye(2)}
    found = joint(replaced(variables, **silent), BATCH)
    same(found["logits"], alone[1]["logits"])
    heard = joint(replaced(variables, cross_stitch__weights=jnp.eye(2)), BATCH)
    assert np.abs(heard["logits"] - found["logits"]).max() > 1e-3


def test_each_scalar_of_the_stitch_feeds_its_own_task(joint, variables):
    silent = {"classifier__lesion_stem__kernel": 0.0}  # S is the other way to the classifier
    base = joint(replaced(variables, cross_stitch__weights=jnp.eye(2), **silent), BATCH)
    for (row, column), task in {(0, 1): "lesion", (1, 0): "logits"}.items():
        stitch = jnp.eye(2).at[row, column].set(0.5)
        found = joint(replaced(variables, cross_stitch__weights=stitch, **silent), BATCH)
        for name in ("lesion", "logits"):
            moved = np.abs(found[name] - base[name]).max() > 10 * LOOSE
            assert moved == (name == task), f"a[{row}, {column}] and {name}"


def test_no_cross_stitch_is_the_identity(joint, variables):
    network = DeepSC(dataclasses.replace(MODEL, cross_stitch=False), DATA, FOLDED)
    shapes = jax.eval_shape(lambda key: network.init(key, BATCH, "joint"), jax.random.key(0))
    assert "cross_stitch" not in shapes["params"]
    parts = {k: v for k, v in variables["params"].items() if k != "cross_stitch"}
    found = jax.jit(lambda v: run(network, v, BATCH, "joint"))({"params": parts})
    expected = joint(replaced(variables, cross_stitch__weights=jnp.eye(2)), BATCH)
    same(found["lesion"], expected["lesion"])
    same(found["logits"], expected["logits"])


def test_the_plain_ablation_keeps_every_shape(out):
    network = DeepSC(dataclasses.replace(MODEL, inception="plain"), DATA, FOLDED)
    key = jax.random.key(0)
    shapes, params = jax.eval_shape(lambda: network.init_with_output(key, BATCH, "joint"))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, out)
    for name in ("inception_seg", "inception_cls"):
        assert list(params["params"][name]) == ["plain"]


def test_gradient_tiles_change_no_value_and_stop_the_other_tiles_gradient(variables, out):
    probe = jnp.arange(3.0)

    @jax.jit
    def gradient_and_result(v, tiles):
        def summed(tiles):
            result = run(NETWORK, v, BATCH | {"tiles": tiles}, "joint", 2)
            total = result["lesion"].sum() + (result["logits"] * probe).sum()
            return total, result

        return jax.grad(summed, has_aux=True)(tiles)

    gradient, result = gradient_and_result(variables, BATCH["tiles"])
    same(result["logits"], out["logits"])
    same(result["lesion"], out["lesion"])
    for one, other in zip(result["scales"], out["scales"], strict=True):
        same(one, other)
    assert not np.any(gradient[:, 2:])
    assert all(np.any(gradient[i, k]) for i in range(2) for k in range(2))


@pytest.mark.slow
def test_scanned_tiles_have_the_gradients_of_folded_tiles(variables):
    gradients = []
    for layout in (
        FOLDED,
        dataclasses.replace(FOLDED, loop_tiles=True, remat_tiles=True, remat_blocks=True),
    ):
        network = DeepSC(MODEL, DATA, layout)

        def loss(v, network=network):
            result = run(network, v, BATCH, "joint", 2)
            return (result["lesion"] ** 2).sum() + (result["logits"] * jnp.arange(3.0)).sum()

        gradients.append(jax.jit(jax.grad(loss))(variables))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[0]))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=LOOSE * scale)


def test_build_lays_the_network_out_for_the_platform():
    config = Config(data=DATA, model=MODEL)
    cpu, gpu = build(config, "cpu").layout, build(config, "gpu").layout
    assert (cpu.form, cpu.loop_tiles, cpu.dtype) == ("folded", False, jnp.float32)
    assert (gpu.form, gpu.loop_tiles, gpu.dtype) == ("banded", True, jnp.bfloat16)
    asked = PlatformConfig(conv_form="native", tile_loop="loop", remat="blocks")
    layout = build(dataclasses.replace(config, platform=asked), "cpu").layout
    assert (layout.form, layout.loop_tiles) == ("native", True)
    assert (layout.remat_tiles, layout.remat_blocks) == (False, True)


@pytest.mark.parametrize("stage", ["segmentation", "classification", "joint"])
def test_bfloat16_keeps_results_in_single_precision(variables, stage):
    network = DeepSC(MODEL, DATA, Layout(dtype=jnp.dtype(jnp.bfloat16), loop_tiles=True))
    found = jax.eval_shape(lambda v: run(network, v, BATCH, stage), variables)
    for name in ("lesion", "logits"):
        assert name not in found or found[name].dtype == jnp.float32
