"""What is said of evidence maps, by hand and against scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from deepsc_jax.metrics.evidence import pointing

LUNG = np.array([True, True, True, True, False])
LESION = np.array([True, False, True, False, False])


def test_figures_by_hand():
    # Lesion voxels .9 and .2, others .5 and .2: of four pairs 2 won, 1 tied, 1 lost.
    found = pointing(np.array([0.9, 0.5, 0.2, 0.2, 7.0]), LESION, LUNG)
    assert found.auc == pytest.approx(2.5 / 4)
    assert found.energy == pytest.approx(1.1 / 1.8)
    assert found.hit == 1
    assert pointing(np.array([0.9, 0.9, 0, 0, 7.0]), LESION, LUNG).hit == 0.5


def test_area_is_scikit_learns():
    rng = np.random.default_rng(0)
    lesion, lung = rng.random((6, 7, 8)) < 0.2, rng.random((6, 7, 8)) < 0.6
    evidence = np.round(rng.random((6, 7, 8)) + 0.2 * lesion, 1)  # with ties
    expected = roc_auc_score(lesion[lung], evidence[lung])
    assert pointing(evidence, lesion, lung).auc == pytest.approx(expected, abs=1e-12)


def test_an_empty_map_points_nowhere():
    assert pointing(np.zeros(5), LESION, LUNG) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("lesion", [np.zeros(5, bool), LUNG])
def test_without_two_kinds_of_voxels_there_is_nothing_to_say(lesion):
    assert all(math.isnan(x) for x in pointing(np.ones(5), lesion, LUNG))
