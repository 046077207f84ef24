"""Calibration: by hand, and against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy import special
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from deepsc_jax.metrics.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability,
    scale_by_temperature,
)


def answers(scans: int = 4000, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, of which those with logits times `temperature` are given."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (scans, 3))
    labels = (special.softmax(logits, axis=1).cumsum(axis=1) < rng.uniform(size=(scans, 1))).sum(1)
    return labels, special.softmax(temperature * logits, axis=1)


def test_calibration_error_by_hand():
    # Two bins: confidences 0.9, 0.8, 0.7 with two of three right, and 0.4 with a right one.
    probabilities = np.array([[0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    labels = np.array([0, 1, 2, 2])
    curve = reliability(labels, probabilities, bins=2)
    np.testing.assert_allclose(curve.confidence, [0.4, 0.8])
    np.testing.assert_allclose(curve.frequency, [1, 2 / 3])
    np.testing.assert_array_equal(curve.scans, [1, 3])
    expected = (0.6 * 1 + (0.8 - 2 / 3) * 3) / 4
    assert expected_calibration_error(labels, probabilities, bins=2) == pytest.approx(expected)


def test_a_certain_answer_is_in_the_last_bin():
    curve = reliability(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose([curve.confidence, curve.frequency], [[1], [0.5]])


@pytest.mark.parametrize("class_id", [0, 1, 2])
def test_the_curve_of_a_class_is_scikit_learns(class_id: int):
    labels, probabilities = answers()
    frequency, confidence = calibration_curve(
        labels == class_id, probabilities[:, class_id], n_bins=15
    )
    curve = reliability(labels, probabilities, class_id)
    np.testing.assert_allclose(curve.confidence, confidence)
    np.testing.assert_allclose(curve.frequency, frequency)


def test_brier_score_is_scikit_learns():
    labels, probabilities = answers(200)
    theirs = sum(brier_score_loss(labels == c, probabilities[:, c]) for c in range(3))
    assert brier_score(labels, probabilities) == pytest.approx(theirs, abs=1e-12)
    assert brier_score(np.array([0]), np.array([[0.0, 1.0]])) == 2


def test_temperature_is_found_and_mends_the_calibration():
    labels, probabilities = answers(temperature=2.5)
    temperature = fit_temperature(labels, probabilities)
    assert temperature == pytest.approx(2.5, rel=0.05)  # of 4,000 scans
    scaled = scale_by_temperature(probabilities, temperature)
    before, after = (expected_calibration_error(labels, p) for p in (probabilities, scaled))
    assert before > 0.05
    assert after < 0.02
    np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
    # It is the best there is, by scikit-learn's likelihood.
    losses = [
        log_loss(labels, scale_by_temperature(probabilities, t))
        for t in (temperature, 0.99 * temperature, 1.01 * temperature)
    ]
    assert losses[0] == min(losses)


def test_temperature_1_changes_nothing():
    _, probabilities = answers(50)
    np.testing.assert_allclose(scale_by_temperature(probabilities, 1), probabilities)


def test_answers_all_certain_have_a_temperature():
    certain = np.eye(3)[[0, 1, 2]]
    assert fit_temperature(np.array([0, 1, 2]), certain) < 1
    scaled = scale_by_temperature(certain, fit_temperature(np.array([1, 2, 0]), certain))
    assert np.isfinite(scaled).all()


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"of scan 1 are \[0.4 0.4\]: expected none below 0"):
        brier_score(np.array([0, 1]), np.array([[0.5, 0.5], [0.4, 0.4]]))
    with pytest.raises(ValueError, match="temperature is 0: expected a positive number"):
        scale_by_temperature(np.array([[0.5, 0.5]]), 0)
