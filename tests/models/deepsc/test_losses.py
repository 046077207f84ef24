"""Losses on arrays small enough to work by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.config import CLASSES, DataConfig
from deepsc_jax.models.deepsc import losses
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.systems.system import inverse_frequency

COVID, CAP, HEALTHY = range(3)


def tiles(*scans):
    """Scans of one tile each, given as lists of voxels: `(batch, 1, n, 1, 1)`."""
    return jnp.asarray(scans, jnp.float32)[:, None, :, None, None]


ALL = tiles([1, 1, 1, 1]).astype(bool)


def test_dice_of_known_overlaps():
    truth = tiles([1, 1, 0, 0])
    found = [tiles(p) for p in ([1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0.5, 0.5, 0.5, 0.5])]
    values = [losses.tversky_loss(p, truth, ALL, 0.0).item() for p in found]
    assert values == [0, 1, 0.5, 0.5]
    # (2 * 1 + 1) / (4 + 1) with epsilon 1.
    assert losses.tversky_loss(found[2], truth, ALL, 1.0).item() == pytest.approx(1 - 3 / 5)


def test_dice_is_one_figure_per_scan_over_all_its_tiles():
    probability = jnp.stack([tiles([1, 0, 0, 0])[:, 0], tiles([0, 0, 0, 0])[:, 0]], axis=1)
    truth = jnp.stack([tiles([1, 0, 0, 0])[:, 0], tiles([1, 1, 1, 1])[:, 0]], axis=1)
    valid = jnp.ones(truth.shape, bool)
    # 2 * 1 / (1 + 5), where the mean of the tiles' own is 1 / 2.
    assert losses.tversky_loss(probability, truth, valid, 0.0).item() == pytest.approx(1 - 2 / 6)


def test_a_scan_without_lesion_has_no_dice_and_no_gradient_from_it():
    probability = tiles([0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0])
    truth = tiles([0, 0, 0, 0], [1, 1, 0, 0])
    valid = jnp.concatenate([ALL, ALL])
    assert losses.tversky_loss(probability, truth, valid, 1e-5).tolist() == [0, 0]
    gradient = jax.grad(lambda p: losses.tversky_loss(p, truth, valid, 1e-5).sum())(probability)
    assert not np.any(gradient[0])
    assert np.isfinite(gradient).all()


def test_focal_loss_of_two_voxels():
    # Lesion at 0.8: -0.75 * 0.2^2 * ln 0.8; the other at 0.4: -0.25 * 0.4^2 * ln 0.6.
    expected = (-0.75 * 0.04 * math.log(0.8) - 0.25 * 0.16 * math.log(0.6)) / 2
    valid = tiles([1, 1]).astype(bool)
    found = losses.focal_loss(tiles([0.8, 0.4]), tiles([1, 0]), valid, 0.75, 2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    cubed = losses.focal_loss(tiles([0.8, 0.4]), tiles([1, 0]), valid, 0.25, 3.0)
    expected = (-0.25 * 0.008 * math.log(0.8) - 0.75 * 0.064 * math.log(0.6)) / 2
    assert cubed.item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_is_finite_at_0_and_1():
    truth, valid = tiles([1, 0, 1, 0]), ALL

    def loss(p):
        return losses.focal_loss(p, truth, valid, 0.75, 2.0).sum()

    value, gradient = jax.value_and_grad(loss)(tiles([0, 1, 1, 0]))
    # Two voxels as wrong as can be: -ln 1e-7 = 16.1 each, weighed 0.75 and 0.25.
    assert value == pytest.approx(16.1 / 4, rel=0.02)
    assert np.isfinite(gradient).all()


def test_padding_enters_neither_dice_nor_focal():
    probability, truth = tiles([0.7, 0.2, 0.9, 0.9]), tiles([1, 0, 0, 0])
    valid = tiles([1, 1, 0, 0]).astype(bool)
    short = (tiles([0.7, 0.2]), tiles([1, 0]), tiles([1, 1]).astype(bool))
    for loss, constants in ((losses.tversky_loss, (1e-5,)), (losses.focal_loss, (0.75, 2.0))):
        padded = loss(probability, truth, valid, *constants)
        np.testing.assert_allclose(padded, loss(*short, *constants), rtol=1e-6)
        gradient = jax.grad(lambda p, f=loss, c=constants: f(p, truth, valid, *c).sum())(
            probability
        )
        assert not np.any(gradient[0, 0, 2:])


def test_lung_voxels_are_above_0_and_end_with_the_scan():
    origins = jnp.array([[[0, 0, 0], [4, 0, 0]], [[0, 0, 0], [8, 0, 0]]])
    tiles = jnp.full((2, 2, 4, 2, 2), 0.5).at[0, 0, 1, 0, 0].set(0)
    lungs = losses.lung_voxels(tiles, origins, jnp.array([6, 3]))
    assert lungs.shape == (2, 2, 4, 2, 2)
    assert lungs[..., 1, 1].sum(axis=-1).tolist() == [[4, 2], [3, 0]]
    assert lungs[0, 0, :, 0, 0].tolist() == [True, False, True, True]
    assert lungs[0, 1, :, 1, 1].tolist() == [True, True, False, False]


def test_a_scan_without_lesions_pays_for_what_it_marks():
    # -ln 0.5 and -ln 0.8 in the two voxels of the lungs; a scan with a lesion pays nothing here.
    probability = tiles([0.5, 0.2, 0.9, 0.9], [0.5, 0.2, 0.9, 0.9])
    truth = tiles([0, 0, 0, 0], [0, 1, 0, 0])
    lungs = tiles([1, 1, 0, 0], [1, 1, 0, 0]).astype(bool)
    found = losses.lesion_free_loss(probability, truth, lungs)
    np.testing.assert_allclose(found, [(math.log(2) - math.log(0.8)) / 2, 0], rtol=1e-6)
    gradient = jax.grad(lambda p: losses.lesion_free_loss(p, truth, lungs).sum())(probability)
    np.testing.assert_allclose(gradient[0, 0, :, 0, 0], [1, 1 / 1.6, 0, 0], rtol=1e-6)
    assert not np.any(gradient[1])


def test_the_focal_mean_is_over_the_lungs_however_much_lies_around_them():
    probability, truth = tiles([0.7, 0.2]), tiles([1, 0])
    alone = losses.focal_loss(probability, truth, tiles([1, 1]).astype(bool), 0.75, 2.0)
    wide, around = tiles([0, 0, 0.7, 0.2, 0, 0]), tiles([0, 0, 1, 1, 0, 0]).astype(bool)
    found = losses.focal_loss(wide, tiles([0, 0, 1, 0, 0, 0]), around, 0.75, 2.0)
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_every_scale_is_supervised_by_the_lesions_of_its_blocks():
    # One lesion voxel of 8x8x8: each coarser voxel that holds it is lesion. Perfect scales cost
    # nothing but the focal loss of exact probabilities, 0; one wrong scale costs its quarter.
    truth = jnp.zeros((1, 1, 8, 8, 8)).at[0, 0, 5, 2, 7].set(1)
    lungs = jnp.ones(truth.shape, bool)
    scales = [jnp.zeros((1, 1, 8 // s, 8 // s, 8 // s, 1)) for s in (8, 4, 2, 1)]
    right = tuple(
        x.at[0, 0, 5 // s, 2 // s, 7 // s, 0].set(1)
        for x, s in zip(scales, (8, 4, 2, 1), strict=True)
    )
    options = dataclasses.replace(OPTIONS, focal_weight=0.0)
    assert losses.scale_loss(options, right, truth, lungs).item() == pytest.approx(0, abs=1e-5)
    for i in range(4):
        wrong = (*right[:i], scales[i], *right[i + 1 :])
        found = losses.scale_loss(options, wrong, truth, lungs).item()
        assert found == pytest.approx(1 / 4, abs=1e-4)


def test_class_weights_of_three_two_one():
    # N / (3 n): 6 / 9, 6 / 6, 6 / 3.
    np.testing.assert_allclose(inverse_frequency(jnp.array([3, 2, 1])), [2 / 3, 1, 2], rtol=1e-6)
    assert np.isfinite(inverse_frequency(jnp.array([3, 0, 1]))).all()


def test_cross_entropy_is_weighed_by_the_true_class():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]))
    weights = inverse_frequency(jnp.array([3, 2, 1]))
    found = losses.cross_entropy(logits, jnp.array([COVID, HEALTHY, CAP]), weights)
    expected = [2 / 3 * math.log(2), 2 * -math.log(0.6), -math.log(0.2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# One tile of 8 slices of 8x8 fills the working grid; 8 sampled slices coincide with its own.
DATA = DataConfig(working_size=(8, 8), tile=(8, 8, 8), slices=8, depth_bucket=8)
OPTIONS = Options(scale_weights=(0.05, 0.1, 0.25, 0.6))
PNEUMONIA = jnp.array([[2.0, 1.0, 0.0]])


def constant_scales(s1, s2, s3, depth=8, batch=1, count=1):
    """S_1..S_4 of tiles, each scale of one value."""
    sides = ((depth // 8, 1, 1), (depth // 4, 2, 2), (depth // 2, 4, 4), (depth, 8, 8))
    values = zip((s1, s2, s3, 0.0), sides, strict=True)
    return tuple(jnp.full((batch, count, *side, 1), value) for value, side in values)


def lungs_of(origins=(0,), depth=8, deep=8):
    """All voxels of one scan's tiles within its depth."""
    corners = jnp.zeros((1, len(origins), 3), jnp.int32).at[0, :, 0].set(jnp.array(origins))
    tiles = jnp.ones((1, len(origins), deep, 8, 8))
    return losses.lung_voxels(tiles, corners, jnp.array([depth]))


def constant_masks(m1, m2, m3, batch=1):
    return tuple(jnp.full((batch, 8, n, n), m) for m, n in ((m1, 4), (m2, 2), (m3, 1)))


@pytest.fixture(scope="module")
def task_aware():
    """The loss of one scan, its tiles given by the slice they begin at."""

    def run(scales, masks, logits=PNEUMONIA, label=COVID, origins=(0,), depth=8, **settings):
        corners = jnp.zeros((1, len(origins), 3), jnp.int32).at[0, :, 0].set(jnp.array(origins))
        return losses.task_aware_loss(
            scales, masks, logits, jnp.array([label]), lungs_of(origins, depth), corners,
            jnp.array([depth]), dataclasses.replace(OPTIONS, **settings), DATA,
        ).item()  # fmt: skip

    return run


def test_task_aware_loss_pairs_the_coarsest_scale_with_the_last_mask(task_aware):
    scales, masks = constant_scales(0.1, 0.2, 0.4), constant_masks(0.5, 0.9, 0.7)
    # (S_1, M_3), (S_2, M_2), (S_3, M_1).
    terms = (0.1 - 0.7) ** 2, (0.2 - 0.9) ** 2, (0.4 - 0.5) ** 2
    assert task_aware(scales, masks) == pytest.approx(sum(terms), rel=1e-5)
    single = task_aware(scales, masks, task_aware_scales="single")
    assert single == pytest.approx(terms[2], rel=1e-5)
    weighed = task_aware(scales, masks, task_aware_scale_weights="w")
    by_hand = 0.05 * terms[0] + 0.1 * terms[1] + 0.25 * terms[2]
    assert weighed == pytest.approx(by_hand, rel=1e-5)


def test_task_aware_loss_of_two_voxels():
    # A tile of 16 slices has two voxels at 1/8, 0.25 and 0.75, centred on 4 and 12. The T = 2
    # slices floor(i * 16 / 2) are centred on 0.5 and 8.5 and hold the masks 0.5 and 1: the first
    # voxel lies 3.5 of their 8 slices on, the second is past the last one, where 1 is held.
    data = dataclasses.replace(DATA, tile=(16, 8, 8), depth_bucket=16, slices=2)
    scales = constant_scales(0.0, 0.0, 0.0, depth=16)
    first = jnp.array([0.25, 0.75]).reshape(1, 1, 2, 1, 1, 1)
    last = jnp.array([0.5, 1.0]).reshape(1, 2, 1, 1)
    masks = (jnp.zeros((1, 2, 4, 4)), jnp.zeros((1, 2, 2, 2)), last)
    origin = jnp.zeros((1, 1, 3), jnp.int32)
    found = losses.task_aware_loss(
        (first, *scales[1:]), masks, PNEUMONIA, jnp.array([CAP]), lungs_of(depth=16, deep=16),
        origin, jnp.array([16]), OPTIONS, data,
    )  # fmt: skip
    crop = 0.5 + 0.5 * 3.5 / 8
    assert found.item() == pytest.approx(((0.25 - crop) ** 2 + (0.75 - 1) ** 2) / 2, rel=1e-5)


@pytest.mark.parametrize("predicted", range(3))
@pytest.mark.parametrize("label", range(3))
def test_non_pneumonia_does_not_enter_the_task_aware_loss(task_aware, predicted, label):
    logits = jax.nn.one_hot(jnp.array([predicted]), 3)
    scales, masks = constant_scales(0, 0, 0), constant_masks(1, 0, 0)
    found = task_aware(scales, masks, logits, label, task_aware_scales="single")
    healthy = CLASSES.index("non-pneumonia")
    assert found == pytest.approx(0.0 if healthy in (predicted, label) else 1.0)


def test_task_aware_mean_is_over_the_lungs(task_aware):
    # A scan of 4 slices: half of S_3's slices are padding, whatever stands there; a second tile
    # lies wholly past the scan and counts for nothing.
    scales = constant_scales(0.0, 0.0, 0.5, count=2)
    third = scales[2].at[:, 0, 2:].set(9.0).at[:, 1].set(9.0)
    scales = (*scales[:2], third, scales[3])
    masks = constant_masks(0.25, 0.0, 0.0)
    settings = {"depth": 4, "origins": (0, 8), "task_aware_scales": "single"}
    assert task_aware(scales, masks, **settings) == pytest.approx(0.0625, rel=1e-5)


def test_task_aware_gradient_flows_to_both_sides():
    scales, masks = constant_scales(0.1, 0.2, 0.4), constant_masks(0.5, 0.9, 0.7)

    @jax.jit
    @jax.grad
    def gradient(both):
        return losses.task_aware_loss(
            both[0], both[1], PNEUMONIA, jnp.array([COVID]), lungs_of(),
            jnp.zeros((1, 1, 3), jnp.int32), jnp.array([8]), OPTIONS, DATA,
        ).sum()  # fmt: skip

    to_scales, to_masks = gradient((scales, masks))
    assert all(np.all(np.asarray(g) != 0) for g in to_scales[:3])
    assert not np.any(to_scales[3])
    assert all(np.any(g) for g in to_masks)
    # d/dS of the mean of 64 squares, each 2 (S - M) / 64.
    np.testing.assert_allclose(to_scales[2], 2 * (0.4 - 0.5) / 64, rtol=1e-4)
