"""The curve of DSC against falsely marked volume, by hand."""

import numpy as np
import pytest

from deepsc_jax.evaluation import curve as curves
from deepsc_jax.evaluation.curve import CURVE_THRESHOLDS
from deepsc_jax.metrics.overlap import THRESHOLDS, dice


def test_voxels_are_counted_as_masks_of_each_threshold_hold_them() -> None:
    rng = np.random.default_rng(0)
    shape = (4, 5, 6)
    probability = rng.choice(np.array([0, 0.1, 0.3, 0.35, 0.7, 1], np.float32), shape)
    inside, lesion = rng.random(shape) < 0.8, rng.random(shape) < 0.3
    marked, hits = curves.marked_voxels(probability, inside, lesion, THRESHOLDS)
    scan = curves.of_scan(probability, inside, lesion, voxel_ml=0.5)
    assert scan.dsc is not None
    for i, threshold in enumerate(THRESHOLDS):
        mask = (probability >= threshold) & inside
        assert marked[i] == mask.sum()
        assert hits[i] == (mask & lesion).sum()
        if threshold in CURVE_THRESHOLDS:
            j = CURVE_THRESHOLDS.index(threshold)
            assert scan.dsc[j] == dice(mask, lesion)
            assert scan.marked_ml[j] == 0.5 * mask.sum()


def test_the_curve_is_a_mean_over_scans_of_either_kind() -> None:
    lesion = np.array([[[True, True, False, False]]])
    inside = np.ones_like(lesion)
    perfect = np.where(lesion, 0.9, 0.0).astype(np.float32)
    spurious = np.array([[[0.9, 0.0, 0.0, 0.5]]], np.float32)
    scans = [
        curves.of_scan(perfect, inside, lesion, 2.0),
        curves.of_scan(spurious, inside, lesion, 2.0),
        curves.of_scan(spurious, inside, np.zeros_like(lesion), 2.0),
        curves.of_scan(0 * spurious, inside, np.zeros_like(lesion), 2.0),
    ]
    found = curves.curve(scans)
    assert found["n"] == {"with_lesions": 2, "lesion_free": 2}
    assert found["thresholds"][0] == 0.02
    assert found["thresholds"][-1] == 0.98
    at = {threshold: i for i, threshold in enumerate(found["thresholds"])}
    expected = {0.02: (1 + 0.5) / 2, 0.5: (1 + 0.5) / 2, 0.52: (1 + 2 / 3) / 2, 0.92: 0.0}
    for threshold, dsc in expected.items():
        assert found["dsc"][at[threshold]] == pytest.approx(dsc)
    assert [found["false_ml"][at[t]] for t in (0.5, 0.52, 0.92)] == [2.0, 1.0, 0.0]
    assert curves.curve(scans[:1])["false_ml"] == [None] * len(CURVE_THRESHOLDS)
