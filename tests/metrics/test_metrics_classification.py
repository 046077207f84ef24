"""Classification metrics on a handful of scans, counted by hand."""

import math

import numpy as np
import pytest
from sklearn import metrics

from deepsc_jax.metrics import (
    accuracy,
    confusion_matrix,
    macro_auc,
    macro_f1,
    macro_sensitivity,
    macro_specificity,
)
from deepsc_jax.metrics.classification import (
    class_auc,
    class_auprc,
    cohen_kappa,
    macro_auprc,
    macro_precision,
    matthews,
)

LABELS = np.array([0, 0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [
        [0.8, 0.1, 0.1],
        [0.6, 0.3, 0.1],
        [0.2, 0.7, 0.1],  # given 1
        [0.1, 0.5, 0.4],
        [0.3, 0.1, 0.6],  # given 2
        [0.2, 0.2, 0.6],
    ]
)
ALL = (accuracy, macro_sensitivity, macro_specificity, macro_f1, macro_auc)


def test_counts_by_hand():
    assert confusion_matrix(LABELS, PROBABILITIES).tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert accuracy(LABELS, PROBABILITIES) == pytest.approx(4 / 6)
    assert macro_sensitivity(LABELS, PROBABILITIES) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert macro_specificity(LABELS, PROBABILITIES) == pytest.approx((3 / 3 + 3 / 4 + 4 / 5) / 3)
    # precision 1, 1/2, 1/2 with the recalls above
    assert macro_f1(LABELS, PROBABILITIES) == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_auc_counts_the_pairs_in_the_right_order():
    # class 0: 3·3 pairs, wrong only 0.2 < 0.3, tied 0.2 = 0.2. Class 1: 2·4 pairs, wrong
    # 0.5 < 0.7, 0.1 < 0.7, 0.1 < 0.3, 0.1 < 0.2, tied 0.1 = 0.1. Class 2: 1·5 pairs, one tied.
    expected = ((9 - 1 - 0.5) / 9 + (8 - 4 - 0.5) / 8 + (5 - 0.5) / 5) / 3
    assert macro_auc(LABELS, PROBABILITIES) == pytest.approx(expected)


def test_a_class_without_scans_does_not_count():
    labels, probabilities = LABELS[:5], PROBABILITIES[:5]
    assert macro_sensitivity(labels, probabilities) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert macro_specificity(labels, probabilities) == pytest.approx((2 / 2 + 2 / 3) / 2)
    assert math.isfinite(macro_auc(labels, probabilities))
    assert confusion_matrix(labels, probabilities).shape == (3, 3)


def test_one_class_alone_has_no_specificity_and_no_auc():
    labels, probabilities = LABELS[:3], PROBABILITIES[:3]
    assert macro_sensitivity(labels, probabilities) == pytest.approx(2 / 3)
    assert math.isnan(macro_specificity(labels, probabilities))
    assert math.isnan(macro_auc(labels, probabilities))


def test_perfect_predictions_score_one_in_everything():
    for measure in ALL:
        assert measure(LABELS, np.eye(3)[LABELS]) == 1


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (LABELS, PROBABILITIES[:4], r"\(6,\), probabilities of shape \(4, 3\)"),
        (LABELS[:0], PROBABILITIES[:0], "at least one scan"),
        (LABELS + 1, PROBABILITIES, "labels run from 1 to 3: expected 0 to 2"),
        (LABELS, np.where(PROBABILITIES == 0.7, np.nan, PROBABILITIES), "of scan 2 are"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(labels, probabilities, message):
    for measure in ALL:
        with pytest.raises(ValueError, match=message):
            measure(labels, probabilities)


def test_precision_kappa_and_correlation_by_hand():
    assert macro_precision(LABELS, PROBABILITIES) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # Given 2, 2, 2 of labels 3, 2, 1: 12 of 36 agree by chance, 4 of 6 do.
    assert cohen_kappa(LABELS, PROBABILITIES) == pytest.approx((4 / 6 - 12 / 36) / (1 - 12 / 36))
    # Gorodkin: (right·n - Σ of products) / √((n² - Σ given²)(n² - Σ labels²))
    expected = (4 * 6 - 12) / math.sqrt((36 - 12) * (36 - 14))
    assert matthews(LABELS, PROBABILITIES) == pytest.approx(expected)


def test_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    probabilities = rng.dirichlet(np.ones(3), 200)
    probabilities = (probabilities + np.eye(3)[labels]) / 2
    probabilities[:100] = rng.dirichlet(np.ones(3), 100)
    given = probabilities.argmax(axis=1)
    one_hot = np.eye(3)[labels]
    for found, theirs in (
        (macro_precision, metrics.precision_score(labels, given, average="macro")),
        (macro_auc, metrics.roc_auc_score(labels, probabilities, multi_class="ovr")),
        (macro_auprc, metrics.average_precision_score(one_hot, probabilities, average="macro")),
        (cohen_kappa, metrics.cohen_kappa_score(labels, given)),
        (matthews, metrics.matthews_corrcoef(labels, given)),
    ):
        assert found(labels, probabilities) == pytest.approx(theirs, abs=1e-12), found.__name__
    areas = [metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in range(3)]
    np.testing.assert_allclose(class_auc(labels, probabilities), areas)


def test_a_class_never_given_has_no_precision():
    probabilities = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
    assert macro_precision(np.array([0, 0, 1]), probabilities) == pytest.approx(2 / 3 / 2)
    assert matthews(np.array([0, 0, 1]), probabilities) == 0
    assert cohen_kappa(np.array([0, 0, 1]), probabilities) == 0


def test_what_one_class_alone_leaves_undefined():
    labels, probabilities = np.array([0, 0]), np.array([[0.6, 0.4], [0.7, 0.3]])
    assert math.isnan(cohen_kappa(labels, probabilities))
    assert math.isnan(matthews(labels, probabilities))
    assert np.isnan(class_auc(labels, probabilities)).all()
    np.testing.assert_array_equal(class_auprc(labels, probabilities), [1, math.nan])
    assert macro_auprc(labels, probabilities) == 1
