"""Radiographs by projection: path lengths by hand, counts, and what several views share."""

import numpy as np
import pytest

from deepsc_jax.phantoms.radiograph import (
    PHOTONS,
    SCATTER,
    WATER_PER_MM,
    View,
    attenuation,
    developed,
    draw_view,
    expose,
    on_detector,
    project,
    radiograph,
    with_contrast,
)

SPACING = (5.0, 2.0, 3.0)
AIR, WATER = -1000.0, 0.0


def cube() -> np.ndarray:
    """A block of water in air: 4 x 10 x 6 voxels of 5 x 2 x 3 mm."""
    hu = np.full((10, 20, 16), AIR)
    hu[2:6, 5:15, 4:10] = WATER
    return hu


def test_water_has_its_analytic_path_and_air_none():
    path = project(attenuation(cube()), SPACING[1], View())
    expected = np.zeros((10, 16))
    expected[2:6, 4:10] = 0.0193 * 20  # mm
    np.testing.assert_allclose(path, expected, rtol=1e-3, atol=1e-12)


def test_apex_is_up_and_pixels_are_square():
    path = project(attenuation(cube()), SPACING[1], View())
    image = on_detector(path, SPACING, 16, View())
    # 48 mm a side about the scan's middle, which is at 25 of its 50 mm. The block reaches from 10
    # to 30 mm above the lowest slice: from 5 mm above the middle to 15 below it.
    inside = np.argwhere(image > 0.5 * image.max())
    assert inside[:, 0].min() == pytest.approx((24 - 5) / 3, abs=1)
    assert inside[:, 0].max() == pytest.approx((24 + 15) / 3 - 1, abs=1)
    assert (inside[:, 1].min(), inside[:, 1].max()) == (4, 9)
    # And moves with whoever stands lower and further to the right.
    moved = on_detector(path, SPACING, 16, View(shift_mm=(6.0, 9.0)))
    np.testing.assert_allclose(moved[2:, 3:], image[:-2, :-3], atol=1e-12)


def test_turning_keeps_all_water():
    straight, turned = (
        project(attenuation(cube()), SPACING[1], View(degrees)) for degrees in (0.0, 8.0)
    )
    assert turned.sum() == pytest.approx(straight.sum(), rel=1e-2)
    assert np.abs(turned - straight).max() > 0.1 * straight.max()


def test_an_empty_field_is_flat():
    path = project(attenuation(np.full((4, 5, 6), AIR)), 2.0, View(5.0))
    np.testing.assert_array_equal(path, np.zeros((4, 6)))
    assert not developed(np.full((4, 6), 7.0)).any()


def test_counts_are_those_of_the_primary_beam_and_its_scatter():
    rng, path = np.random.default_rng(0), np.full((200, 200), 2.0)
    counts = expose(path, 1.0, rng)
    expected = (1 + SCATTER) * PHOTONS * np.exp(-2)
    assert counts.mean() == pytest.approx(expected, rel=1e-3)
    assert counts.var() == pytest.approx(expected, rel=0.03)  # Poisson's


def test_lesions_at_three_times_their_contrast():
    hu = np.full((1, 2, 3), -860.0)
    lesion, lung = np.zeros((2, 1, 2, 3), bool)
    lung[:] = True
    lesion[0, 0, :2] = True
    hu[0, 0, 0], hu[0, 0, 1] = -660, 40
    found = with_contrast(hu, lesion, lung, 3)
    assert found[0, 0, 0] == -260
    assert found[0, 0, 1] == 100  # no denser than soft tissue
    np.testing.assert_array_equal(found[0, 1], hu[0, 1])
    np.testing.assert_array_equal(with_contrast(hu, lesion, lung, 1), hu)


def test_a_lesion_is_shown_where_more_than_2_mm_of_it_are():
    hu = cube()
    lesion, lung = np.zeros((2, *hu.shape), bool)
    lung[2:6, 5:15, 4:10] = True
    lesion[3, 6, 5] = True  # 2 mm thick
    lesion[4, 6:8, 8] = True
    found = radiograph(hu, lesion, lung, SPACING, np.random.default_rng(0), size=32)
    assert found.image.dtype == np.uint8
    assert found.pixel_mm == 1.5
    rows, columns = np.nonzero(found.lesion_mask)
    assert set(columns) <= {15, 16, 17, 18, 19}  # about 8.5 voxels from the left
    assert found.lung_mask[rows, columns].all()
    shaded = found.image[found.lung_mask]  # by water, which is bright, as air is not
    assert np.median(shaded) > np.median(found.image[~found.lung_mask]) + 100


def test_views_differ_and_a_seed_gives_its_own_again():
    hu = cube()
    nothing = np.zeros(hu.shape, bool)
    views = [draw_view(np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert views[0] == views[2] != views[1]
    first, other, again = (
        radiograph(hu, nothing, nothing, SPACING, np.random.default_rng(3), view).image
        for view in views
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert WATER_PER_MM == 0.0193
