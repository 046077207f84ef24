"""Which voxels are lesion, by hand."""

import numpy as np
import pytest

from deepsc_jax.inference.masks import lesion_mask

# Three lesions in voxels of 5x10x10 mm, half a ml each: of one, of two by a corner, of three.
PROBABILITY = np.zeros((4, 5, 6), np.float32)
PROBABILITY[0, 0, 0] = 0.9
PROBABILITY[3, 0, 0] = PROBABILITY[2, 1, 1] = 0.5
PROBABILITY[1, 4, 3:6] = 0.7
SPACING_MM = (5.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("smallest_ml", "voxels"), [(0.0, 6), (0.5, 6), (0.51, 5), (1.0, 5), (1.01, 3), (1.6, 0)]
)
def test_smaller_lesions_are_removed(smallest_ml: float, voxels: int) -> None:
    found = lesion_mask(PROBABILITY, None, 0.5, SPACING_MM, smallest_ml)
    assert found.dtype == bool
    assert found.sum() == voxels
    assert (PROBABILITY[found] >= 0.5).all()


def test_a_lesion_is_as_large_as_what_of_it_is_inside() -> None:
    inside = np.ones(PROBABILITY.shape, bool)
    inside[1, 4, 4] = False
    assert lesion_mask(PROBABILITY, inside, 0.6, SPACING_MM).sum() == 3
    assert lesion_mask(PROBABILITY, inside, 0.6, SPACING_MM, 0.6).sum() == 0
