"""Overlap metrics on masks small enough to count by hand."""

import math

import numpy as np
import pytest

from deepsc_jax.metrics import dice, sensitivity, specificity
from deepsc_jax.metrics.overlap import lvr_error, volume_error_ml


@pytest.fixture
def masks():
    """10 voxels: 4 true, 3 predicted, 2 of them right."""
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool).reshape(1, 2, 5)
    pred = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 0], bool).reshape(1, 2, 5)
    return pred, truth


def test_counts_by_hand(masks):
    pred, truth = masks
    assert dice(pred, truth) == pytest.approx(2 * 2 / (3 + 4))
    assert sensitivity(pred, truth) == pytest.approx(2 / 4)
    assert specificity(pred, truth) == pytest.approx(5 / 6)


def test_specificity_counts_the_region_alone(masks):
    pred, truth = masks
    lung = np.zeros_like(truth)
    lung.flat[:7] = True
    assert specificity(pred, truth, lung) == pytest.approx(2 / 3)


def test_a_missed_lesion_scores_zero(masks):
    _, truth = masks
    nothing = np.zeros_like(truth)
    assert dice(nothing, truth) == 0
    assert sensitivity(nothing, truth) == 0
    assert specificity(nothing, truth) == 1


def test_a_lesion_where_there_is_none_scores_zero(masks):
    pred, _ = masks
    nothing = np.zeros_like(pred)
    assert dice(pred, nothing) == 0
    assert math.isnan(sensitivity(pred, nothing))
    assert specificity(pred, nothing) == pytest.approx(7 / 10)


def test_undefined_without_lesion_and_without_background(masks):
    pred, _ = masks
    nothing = np.zeros_like(pred)
    assert math.isnan(dice(nothing, nothing))
    assert math.isnan(specificity(pred, ~nothing))


def test_masks_that_do_not_fit_are_refused(masks):
    pred, truth = masks
    with pytest.raises(ValueError, match="truth holds uint8, expected bool"):
        dice(pred, truth.astype(np.uint8))
    with pytest.raises(ValueError, match=r"region has shape \(2, 5\), pred has \(1, 2, 5\)"):
        specificity(pred, truth, truth[0])


def test_errors_of_volume_have_a_sign(masks):
    pred, truth = masks
    spacing, lung = (10.0, 10.0, 5.0), np.ones_like(truth)  # voxels of 0.5 ml
    assert volume_error_ml(pred, truth, spacing) == pytest.approx((3 - 4) * 0.5)
    assert volume_error_ml(truth, pred, spacing) == pytest.approx(0.5)
    assert lvr_error(pred, truth, lung) == pytest.approx(-0.1)
    nothing = np.zeros_like(truth)
    assert volume_error_ml(nothing, truth, spacing) == -2
    assert volume_error_ml(nothing, nothing, spacing) == 0
    assert math.isnan(lvr_error(pred, truth, nothing))
