"""What is made of predictions, by hand."""

import numpy as np
import pytest

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference.answers import gated, mean, mirrored
from deepsc_jax.inference.options import LesionGate

LESION = np.array([[[0.2, 0.8]]], np.float32)
FREE = 2


@pytest.mark.parametrize(
    ("gate", "classes", "expected"),
    [
        ("none", (0.1, 0.1, 0.8), (0.2, 0.8)),
        ("soft", (0.1, 0.1, 0.8), (0.04, 0.16)),
        ("soft", (0.6, 0.4, 0.0), (0.2, 0.8)),
        ("hard", (0.1, 0.1, 0.8), (0.0, 0.0)),
        ("hard", (0.45, 0.1, 0.45), (0.2, 0.8)),  # of two the first wins, as in result.json
    ],
)
def test_a_gate_takes_lesions_by_the_class(
    gate: LesionGate, classes: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    given = Prediction({"lesion": LESION, "left_lung": LESION}, np.array(classes, np.float32))
    found = gated(given, FREE, gate)
    assert found.lesion is not None
    assert found.lesion.dtype == np.float32
    np.testing.assert_allclose(found.lesion, [[expected]], rtol=1e-6)
    np.testing.assert_array_equal(found.volumes["left_lung"], LESION)
    assert found.classes is given.classes


def prediction(lesion: float, classes: tuple[float, ...] | None, note: str) -> Prediction:
    one = np.full((1, 1, 2), lesion, np.float32)
    given = None if classes is None else np.array(classes, np.float32)
    return Prediction({"lesion": one}, given, {"evidence_1": one / 2}, {"age": lesion}, (note,))


def test_a_mean_is_over_all_and_its_evidence_over_those_of_its_class() -> None:
    said = [
        prediction(0.2, (0.7, 0.3, 0.0), "a"),
        prediction(0.4, (0.6, 0.4, 0.0), "b"),
        prediction(0.9, (0.1, 0.9, 0.0), "a"),
    ]
    found = mean(said[:2])
    assert found.lesion is not None
    np.testing.assert_allclose(found.lesion, 0.3)
    assert found.lesion.dtype == np.float32
    np.testing.assert_allclose(found.evidence["evidence_1"], 0.15)
    found = mean(said)
    assert found.lesion is not None
    assert found.classes is not None
    np.testing.assert_allclose(found.lesion, 0.5)
    np.testing.assert_allclose(found.classes, (1.4 / 3, 1.6 / 3, 0))
    np.testing.assert_allclose(found.evidence["evidence_1"], 0.45)  # the second class wins
    assert found.values == {"age": pytest.approx(0.5)}
    assert found.notes == ("a", "b")
    assert mean(said[:1]) is said[0]
    unclassified = [prediction(lesion, None, "a") for lesion in (0.2, 0.4)]
    np.testing.assert_allclose(mean(unclassified).evidence["evidence_1"], 0.15)


def test_evidence_for_another_class_is_said_to_be() -> None:
    said = [prediction(0.2, (0.5, 0.45, 0.05), "a"), prediction(0.4, (0.0, 0.45, 0.55), "a")]
    found = mean(said)
    np.testing.assert_allclose(found.evidence["evidence_1"], 0.15)
    assert found.notes[1].startswith("the evidence is for other classes")


def test_of_a_mirror_image_sides_and_columns_are_the_scans_again() -> None:
    left, right = (np.array([[[a, b]]], np.float32) for a, b in ((1, 2), (3, 4)))
    given = Prediction({"lesion": left, "left_lung": left, "right_lung": right}, None, {"e": right})
    found = mirrored(given)
    assert list(found.volumes) == ["lesion", "left_lung", "right_lung"]
    np.testing.assert_array_equal(found.volumes["lesion"], [[[2, 1]]])
    np.testing.assert_array_equal(found.volumes["left_lung"], [[[4, 3]]])
    np.testing.assert_array_equal(found.volumes["right_lung"], [[[2, 1]]])
    np.testing.assert_array_equal(found.evidence["e"], [[[4, 3]]])
