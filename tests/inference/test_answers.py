"""What is made of predictions, by hand."""

import numpy as np
import pytest

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference.answers import gated
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
