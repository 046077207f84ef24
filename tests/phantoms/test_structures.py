"""Dense and thin things that normal lungs hold, whatever the class."""

import numpy as np
import pytest

from deepsc_jax.data.lungs import lung_mask
from deepsc_jax.phantoms.lesions import make_phantom
from deepsc_jax.phantoms.structures import build_structures, draw_details
from deepsc_jax.phantoms.thorax import Frame, build_thorax, draw_nuisances


@pytest.fixture(scope="module")
def chest():
    """A frame and a thorax in it."""
    rng = np.random.default_rng(0)
    nuisances = draw_nuisances(rng, 64)
    spacing = nuisances["slice_mm"], nuisances["in_plane_mm"], nuisances["in_plane_mm"]
    frame = Frame((int(nuisances["slices"]), 64, 64), spacing)
    return frame, build_thorax(rng, frame, nuisances)


def built(chest, **changes):
    frame, thorax = chest
    rng = np.random.default_rng(1)
    drawn = draw_details(rng) | changes
    return build_structures(rng, frame, thorax, drawn)


def test_hilar_tissue_lies_around_the_hila(chest):
    frame, thorax = chest
    dense = np.argwhere(built(chest).tissue > 0.5)
    points = frame.points(dense)
    away = [np.linalg.norm(points - hilum, axis=1) for hilum in thorax.hila_mm]
    assert len(points) > 50
    assert np.min(away, axis=0).max() < 75
    assert all((a < 25).any() for a in away)


def test_fissures_are_thin_and_cross_both_lungs(chest):
    _, thorax = chest
    added = built(chest, emphysema_hu=0.0, fissure_hu=200.0).added_hu
    for side in (thorax.right, ~thorax.right):
        lung = thorax.lung & side
        share = (added[lung] > 60).mean()
        assert 0.005 < share < 0.12
    assert added.max() <= 400  # where two plates cross


def test_emphysema_takes_density_away_and_calcium_adds_it(chest):
    light = built(chest, emphysema_hu=80.0, fissure_hu=0.0)
    assert light.added_hu.max() <= 0
    assert light.added_hu.min() < -80
    assert not built(chest, calcifications=0.0).calcium_hu.any()
    assert built(chest, calcifications=8.0).calcium_hu.max() > 100


def test_found_lungs_hold_dense_tissue_in_every_class_as_real_ones_do():
    # 0.7 to 1.5 % of the voxels of real scans without lesions are above -150 HU.
    shares = []
    for index in (2, 5, 8, 11):
        phantom = make_phantom(0, index)
        mask = lung_mask(phantom.hu, phantom.spacing_mm, f"phantom {index}")
        shares.append((phantom.hu[mask] > -150).mean())
    assert 0.005 < np.mean(shares) < 0.025
    for index in (0, 1):
        phantom = make_phantom(0, index)
        normal = phantom.lung_mask & ~phantom.lesion_mask
        assert (phantom.hu[normal] > -150).mean() > 0.001
