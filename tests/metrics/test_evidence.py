"""What is said of evidence maps, by hand and against scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from deepsc_jax.metrics.evidence import likeness, perturbation, pointing

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


def test_likeness_is_a_rank_correlation():
    one = np.array([0.1, 0.2, 0.7, 0.9])
    assert likeness(one, one**3) == pytest.approx(1)
    assert likeness(one, -one) == pytest.approx(-1)
    assert math.isnan(likeness(one, np.ones(4)))


def test_an_answer_hangs_on_what_its_evidence_names():
    """Of a network that sees the mean of the lesion, a map of it beats chance and its opposite."""
    rng = np.random.default_rng(0)
    volume = rng.uniform(0.2, 0.4, (4, 10, 10))
    lung, lesion = np.ones((2, 4, 10, 10), bool)
    lung[:, 0] = lesion[:] = False
    lesion[1:3, 4:8, 4:8] = True
    volume[lesion] = 0.9
    asked = []

    def probability(scan: np.ndarray) -> float:
        asked.append(scan)
        assert np.array_equal(scan[:, 0], volume[:, 0])  # what is no lung stays
        return float(np.clip((scan[lesion].mean() - 0.3) / 0.6, 0, 1))

    good = perturbation(probability, volume, lesion.astype(float), lung)
    assert len(asked) == 29
    poor = perturbation(probability, volume, 1 - lesion.astype(float), lung)
    # All of the lesion, a ninth of the lungs, is gone at the second of eleven shares.
    assert good.deletion < 0.12
    assert good.insertion > 0.85
    assert good.random == pytest.approx(0.5, abs=0.1)
    assert poor.deletion > 0.85
    assert poor.insertion < 0.12
