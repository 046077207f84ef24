"""Principal components: by scikit-learn and by hand."""

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from deepsc_jax.evaluation.components import components, picture


def test_they_are_scikit_learns():
    images = np.random.default_rng(0).normal(size=(9, 5, 6)) * np.linspace(1, 3, 30).reshape(5, 6)
    theirs: Any = PCA(5, svd_solver="full").fit(images.reshape(9, -1))
    found = components(images)
    np.testing.assert_allclose(found.mean, images.mean(axis=0))
    np.testing.assert_allclose(found.shares, theirs.explained_variance_ratio_)
    for ours, other in zip(found.eigenvectors.reshape(5, -1), theirs.components_, strict=True):
        np.testing.assert_allclose(np.abs(ours), np.abs(other), atol=1e-10)
        assert ours[np.abs(ours).argmax()] > 0


def test_one_direction_of_change_is_the_first_component():
    base, change = np.zeros((2, 3)), np.array([[0.0, -3.0, 0.0], [4.0, 0.0, 0.0]])
    found = components(np.stack([base, base + change, base + 2 * change]), count=2)
    np.testing.assert_allclose(found.mean, change)
    np.testing.assert_allclose(found.eigenvectors[0], change / 5, atol=1e-12)
    np.testing.assert_allclose(found.shares, [1, 0], atol=1e-12)


def test_images_that_do_not_differ_are_refused():
    with pytest.raises(ValueError, match="2 images that differ in nothing"):
        components(np.ones((2, 3, 3)))


def test_a_picture_runs_from_0_to_1():
    np.testing.assert_allclose(picture(np.array([[-1.0, 0], [1, 3]])), [[0, 0.25], [0.5, 1]])
    np.testing.assert_array_equal(picture(np.full((2, 2), 7.0)), np.zeros((2, 2)))
