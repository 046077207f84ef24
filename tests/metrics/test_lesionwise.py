"""Lesions found and missed, by hand; panoptica's are in panoptica_peer.py."""

import math

import numpy as np
import pytest

from deepsc_jax.metrics.lesionwise import (
    Detection,
    Lesions,
    detection,
    detection_by_size,
    match_lesions,
)

MM = (1.0, 1.0, 1.0)
SHAPE = (20, 40, 40)


def boxes(*corners: tuple[int, int, int, int]) -> np.ndarray:
    """True in slices 0 to 10 of each (row, column, rows, columns)."""
    mask = np.zeros(SHAPE, bool)
    for row, column, rows, columns in corners:
        mask[:10, row : row + rows, column : column + columns] = True
    return mask


def test_one_found_one_missed_and_one_invented():
    truth = boxes((0, 0, 10, 10), (20, 0, 5, 10))  # 1 and 0.5 ml
    pred = boxes((0, 2, 10, 10), (20, 20, 10, 12))  # 8 of 12 columns are shared; 1.2 ml of nothing
    lesions = match_lesions(pred, truth, MM)
    np.testing.assert_allclose(lesions.truth_ml, [1.0, 0.5])
    np.testing.assert_allclose(lesions.iou, [8 / 12, 0])
    np.testing.assert_allclose(lesions.unpaired_ml, [1.2])
    found = detection([lesions])
    assert (found.found, found.missed, found.false_positives) == (1, 1, 1)
    assert found.sensitivity == 0.5
    assert found.f1 == 0.5
    assert found.segmentation_quality == pytest.approx(8 / 12)
    assert found.panoptic_quality == pytest.approx(8 / 12 / 2)


def test_a_pair_needs_its_overlap():
    truth, pred = boxes((0, 0, 10, 10)), boxes((0, 4, 10, 10))  # 6 of 14
    assert detection([match_lesions(pred, truth, MM)]).found == 0
    assert detection([match_lesions(pred, truth, MM, min_iou=0.4)]).found == 1


def test_the_best_pair_is_taken_first_and_none_twice():
    truth = boxes((0, 0, 10, 20))
    # 6 and 12 of its 20 columns, one apart
    pred = boxes((0, 0, 10, 6), (0, 8, 10, 12))
    lesions = match_lesions(pred, truth, MM, min_iou=0.1)
    np.testing.assert_allclose(lesions.iou, [0.6])
    np.testing.assert_allclose(lesions.unpaired_ml, [0.6])


def test_specks_are_no_lesions():
    truth, pred = boxes((0, 0, 3, 3)), boxes((0, 0, 3, 3), (30, 30, 3, 3))  # 0.09 ml each
    assert match_lesions(pred, truth, MM).truth_ml.size == 0
    assert detection([match_lesions(pred, truth, MM, min_ml=0.05)]).false_positives == 1


def test_empty_masks():
    lesion, nothing = boxes((0, 0, 10, 10)), boxes()
    missed, free = match_lesions(nothing, lesion, MM), match_lesions(nothing, nothing, MM)
    invented = match_lesions(lesion, nothing, MM)
    assert detection([missed]).sensitivity == 0
    assert detection([missed]).panoptic_quality == 0
    assert math.isnan(detection([free]).f1)
    assert math.isnan(detection([]).false_positives_a_scan)
    assert detection([missed, free, invented]) == Detection(
        found=0,
        missed=1,
        false_positives=1,
        iou=0.0,
        scans=3,
        lesion_free=2,
        lesion_free_with_false_positives=1,
    )
    assert detection([missed, free, invented]).false_positives_a_scan == pytest.approx(1 / 3)


def test_by_size_a_lesion_is_in_one_group():
    scan = Lesions(np.array([0.2, 1.0, 9.9, 10.0]), np.array([0, 0.6, 0.7, 0]), np.array([50.0]))
    small, middle, large = detection_by_size([scan])
    assert (small.found, small.missed, small.false_positives) == (0, 1, 0)
    assert (middle.found, middle.missed, middle.iou) == (2, 0, pytest.approx(1.3))
    assert (large.found, large.missed, large.false_positives) == (0, 1, 1)
    assert all(group.scans == 1 and group.lesion_free == 0 for group in (small, middle, large))


def test_what_cannot_be_matched_is_refused():
    mask = boxes()
    with pytest.raises(ValueError, match="min_iou is 0: expected above 0, at most 1"):
        match_lesions(mask, mask, MM, min_iou=0)
    with pytest.raises(ValueError, match="holds uint8, expected bool"):
        match_lesions(mask.astype(np.uint8), mask, MM)
