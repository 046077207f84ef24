"""The classification subnet, its class activation maps and its evidence masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.config import CLASSES
from deepsc_jax.models.deepsc.classifier import (
    Classifier,
    ResidualUnit,
    class_activation_maps,
    evidence_masks,
)
from deepsc_jax.models.layers.layout import Layout

CLASSIFIER = Classifier(len(CLASSES), 4, (4, 6, 8), 2, Layout("folded"))
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(2, 3, 16, 8, 4)), jnp.float32)
LESIONS = jnp.asarray(RNG.uniform(size=(2, 3, 16, 8, 1)), jnp.float32)
NOTHING = jnp.zeros_like(LESIONS)
LUNGS = jnp.asarray(RNG.uniform(size=LESIONS.shape) < 0.3)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(CLASSIFIER.init)(jax.random.key(0, impl="rbg"), FEATURES, LESIONS, LUNGS)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(CLASSIFIER.apply)


def test_units_have_in_plane_strides_1_2_2(variables, apply):
    out = apply(variables, FEATURES, LESIONS, LUNGS)
    assert [m.shape for m in out["maps"]] == [(2, 3, 16, 8, 4), (2, 3, 8, 4, 6), (2, 3, 4, 2, 8)]
    assert [w.shape for w in out["weights"]] == [(4, 3), (6, 3), (8, 3)]
    assert out["logits"].shape == (2, 3)


def test_the_mean_class_activation_map_is_the_logit(variables, apply):
    out = apply(variables, FEATURES, LESIONS, LUNGS)
    for c in range(len(CLASSES)):
        raw = class_activation_maps(out["maps"], out["weights"], jnp.array([c, c]))
        logit = sum(
            np.asarray([m[i][inside[i, ..., 0]].mean() for i in range(2)])
            for m, inside in zip(
                (np.asarray(m, np.float64) for m in raw), map(np.asarray, out["lungs"]), strict=True
            )
        )
        # The same sums in another order, in float32.
        np.testing.assert_allclose(logit, out["logits"][:, c], rtol=1e-5, atol=1e-6)


def test_activation_map_of_two_by_two_by_hand():
    # Two channels on a 2x2 map: 1 2 / 3 4 and 0 1 / 0 1; class 1 weighs them 0.5 and -2.
    maps = (jnp.array([[[1.0, 0], [2, 1]], [[3, 0], [4, 1]]])[None, None],)
    weights = (jnp.array([[9.0, 0.5, 9], [9, -2, 9]]),)
    (raw,) = class_activation_maps(maps, weights, jnp.array([1]))
    assert raw[0, 0].tolist() == [[0.5, -1.0], [1.5, 0.0]]
    assert raw.mean() == (0.5 * 2.5) + (-2 * 0.5)
    # The mean is 0.25: 0.25 and 1.25 above it, over the larger.
    (mask,) = evidence_masks(maps, weights, (None,), jnp.array([1]))
    np.testing.assert_allclose(mask[0, 0], [[0.2, 0], [1, 0]], rtol=1e-6)
    # Of the lungs, 0.5 and -1, it is -0.25.
    lungs = jnp.array([[True, True], [False, False]])[None, None, ..., None]
    (mask,) = evidence_masks(maps, weights, (lungs,), jnp.array([1]))
    np.testing.assert_allclose(mask[0, 0], [[1, 0], [0, 0]], rtol=1e-6)


def test_each_scan_gets_the_map_of_its_own_class(variables, apply):
    out = apply(variables, FEATURES, LESIONS, LUNGS)
    both = class_activation_maps(out["maps"], out["weights"], jnp.array([2, 0]))
    for scan, c in enumerate((2, 0)):
        alone = class_activation_maps(out["maps"], out["weights"], jnp.array([c, c]))
        for one, other in zip(both, alone, strict=True):
            np.testing.assert_array_equal(one[scan], other[scan])


def test_evidence_lies_in_0_to_1_and_peaks_at_1(variables, apply):
    out = apply(variables, FEATURES, LESIONS, LUNGS)
    chosen = jnp.argmax(out["logits"], -1)
    masks = evidence_masks(out["maps"], out["weights"], out["lungs"], chosen)
    for mask, lungs in zip(masks, out["lungs"], strict=True):
        assert mask.min() == 0
        assert not np.any(mask[~lungs[..., 0]])
        np.testing.assert_allclose(mask.max(axis=(1, 2, 3)), 1, rtol=1e-6)


def test_a_constant_map_is_no_evidence_and_not_nan():
    maps = (jnp.ones((1, 1, 2, 2, 1)),)
    for weight in (-1.0, 0.0, 2.0):
        weights = (jnp.array([[weight, 0, 0]]),)
        assert not np.any(evidence_masks(maps, weights, (None,), jnp.array([0]))[0])


def test_a_map_below_zero_everywhere_has_evidence_and_a_gradient():
    weights, classes = (jnp.array([[-1.0, 0, 0]]),), jnp.array([0])
    maps = jnp.array([1.0, 2, 4, 3]).reshape(1, 1, 2, 2, 1)
    # About the mean of -2.5: 1.5, 0.5, -1.5, -0.5.
    (mask,) = evidence_masks((maps,), weights, (None,), classes)
    np.testing.assert_allclose(mask.ravel(), [1, 1 / 3, 0, 0], rtol=1e-6)
    pull = jnp.array([1.0, 0, 0, 0]).reshape(1, 1, 2, 2)
    gradient = jax.grad(
        lambda m: (pull * evidence_masks((m,), weights, (None,), classes)[0]).sum()
    )(maps)
    # Over the maximum of 1.5, about the mean: nothing through the maximum, nothing for the logit.
    np.testing.assert_allclose(gradient.ravel(), [-1 / 2, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6)
    assert gradient.sum() == pytest.approx(0, abs=1e-7)


def test_the_lesion_branch_starts_silent_and_can_learn(variables, apply):
    with_lesions = apply(variables, FEATURES, LESIONS, LUNGS)["logits"]
    np.testing.assert_array_equal(
        with_lesions, apply(variables, FEATURES, NOTHING, LUNGS)["logits"]
    )

    @jax.jit
    @jax.grad
    def gradient(v):
        return (apply(v, FEATURES, LESIONS, LUNGS)["logits"] * jnp.arange(3.0)).sum()

    assert np.any(gradient(variables)["params"]["lesion_stem"]["kernel"])
    taught = jax.tree.map(lambda x: x, variables)
    kernel = taught["params"]["lesion_stem"]["kernel"]
    taught["params"]["lesion_stem"]["kernel"] = jnp.ones_like(kernel)
    moved = (
        apply(taught, FEATURES, LESIONS, LUNGS)["logits"]
        - apply(taught, FEATURES, NOTHING, LUNGS)["logits"]
    )
    assert np.abs(moved).max() > 1e-4


def test_the_last_layer_has_no_bias(variables):
    assert variables["params"]["kernel"].shape == (4 + 6 + 8, len(CLASSES))
    top = {name for name, leaf in variables["params"].items() if not isinstance(leaf, dict)}
    assert top == {"kernel"}


def test_a_residual_unit_passes_its_input_by():
    # Kernels of zero leave norms of zero: same width and stride 1 give ReLU of the input alone.
    unit = ResidualUnit(4, 2, 1, Layout("folded"))
    x = FEATURES
    shapes = jax.eval_shape(unit.init, jax.random.key(0), x, None)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    np.testing.assert_array_equal(jax.jit(unit.apply)(zeros, x, None), np.maximum(x, 0))
    assert "shortcut" not in shapes["params"]
    strided = ResidualUnit(4, 2, 2, Layout("folded"))
    assert "shortcut" in jax.eval_shape(strided.init, jax.random.key(0), x, None)["params"]
