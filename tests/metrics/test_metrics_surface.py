"""Surface distances: by hand, against scipy, and against DeepMind's package."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mask_pairs import random_pairs
from scipy.spatial.distance import cdist

from deepsc_jax.metrics import (
    normalized_surface_dice,
    root_mean_square_surface_distance,
    surface,
)
from deepsc_jax.metrics.surface import surface_distances
from deepsc_jax.metrics.surfels import CORNERS, neighbour_codes, surfel_areas

UNIT = (1.0, 1.0, 1.0)
EXACT = 1e-12  # float64 throughout, up to the order of sums
FLOAT32 = 1e-5  # edt's distances are float32


def ellipsoid(shape, centre, radii):
    """True inside the ellipsoid; centre and radii in voxels."""
    grid = np.indices(shape)
    offsets = [(grid[axis] - centre[axis]) / radii[axis] for axis in range(3)]
    return np.square(offsets).sum(axis=0) <= 1


def two_lesions():
    shape = (12, 24, 20)
    pred = ellipsoid(shape, (6, 12, 9), (4.1, 6.3, 5.9))
    truth = ellipsoid(shape, (5, 11, 9), (3.6, 7.2, 5.4))
    return pred, truth | ellipsoid(shape, (10, 3, 15), (2.2, 3.1, 4.3))


# From surface-distance 0.1 (PyPI), compute_surface_dice_at_tolerance(compute_surface_distances(
# truth, pred, spacing), tolerance) on `two_lesions`, at 1, 3 and 6 mm.
DEEPMIND = {
    (1.0, 1.0, 1.0): (0.7777628425444438, 0.8791322325292108, 0.9443737671866742),
    (5.0, 0.7, 0.7): (0.74758522300148, 0.8517846989312973, 0.9434621324941704),
    (2.5, 0.8, 1.3): (0.625768596152446, 0.8609294547360125, 0.9189357456316761),
}
# The same package's total surfel areas of (truth, pred), mm².
DEEPMIND_AREAS = {
    (1.0, 1.0, 1.0): (514.5539633377434, 407.00533561601577),
    (5.0, 0.7, 0.7): (1140.6663441141459, 970.0411384267809),
    (2.5, 0.8, 1.3): (975.0978139997432, 816.3041666745069),
}
# The same package's area of each kind of neighbour code, spacing 1 mm: for a code with these
# corners inside (0 = lower, 1 = upper along D, H, W).
DEEPMIND_KINDS = [
    ("000", 0.21650635),
    ("000 001", 0.70710678),
    ("000 011", 0.43301270),
    ("000 111", 0.43301270),
    ("000 001 010", 1.14951905),
    ("000 001 110", 0.92361313),
    ("000 011 101", 0.64951905),
    ("000 001 010 011", 1.0),
    ("000 001 010 100", 1.29903811),
    ("000 001 011 111", 1.57313218),
    ("000 001 010 111", 1.36602540),
    ("000 001 110 111", 1.41421356),
    ("000 011 101 110", 0.86602540),
]


def code_of(corners):
    return sum(1 << CORNERS.index((int(c[0]), int(c[1]), int(c[2]))) for c in corners.split())


@pytest.mark.parametrize("spacing", DEEPMIND)
def test_nsd_is_deepminds(spacing):
    pred, truth = two_lesions()
    for tolerance, expected in zip((1, 3, 6), DEEPMIND[spacing], strict=True):
        assert normalized_surface_dice(pred, truth, spacing, tolerance) == pytest.approx(
            expected, abs=EXACT
        )


@pytest.mark.parametrize("spacing", DEEPMIND_AREAS)
def test_surface_areas_are_deepminds(spacing):
    pred, truth = two_lesions()
    for mask, expected in zip((truth, pred), DEEPMIND_AREAS[spacing], strict=True):
        area = surfel_areas(spacing)[neighbour_codes(mask)].sum()
        assert area == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(("corners", "area"), DEEPMIND_KINDS)
def test_area_of_each_kind_of_cell(corners, area):
    code = code_of(corners)
    assert surfel_areas(UNIT)[code] == pytest.approx(area, abs=1e-8)  # the digits given above
    assert surfel_areas(UNIT)[255 - code] == pytest.approx(area, abs=1e-8)


def test_surfel_areas_turn_with_the_cell():
    spacing = (1.3, 0.7, 2.1)
    for order, flip in itertools.product(
        itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)
    ):
        turned = np.zeros(256, int)
        for code in range(256):
            for bit, corner in enumerate(CORNERS):
                if code >> bit & 1:
                    moved = [corner[order[axis]] ^ flip[axis] for axis in range(3)]
                    turned[code] |= 1 << CORNERS.index((moved[0], moved[1], moved[2]))
        turned_spacing = [spacing[order[axis]] for axis in range(3)]
        np.testing.assert_allclose(
            surfel_areas(turned_spacing)[turned], surfel_areas(spacing), rtol=1e-12
        )


def test_a_single_voxel_is_an_octahedron():
    voxel = np.ones((1, 1, 1), bool)
    area = surfel_areas((2.0, 2.0, 2.0))[neighbour_codes(voxel)].sum()
    assert area == pytest.approx(8 * math.sqrt(3) / 4 * 2)  # 8 triangles of side sqrt(2) mm


def test_nsd_of_two_parallel_plates_steps_at_their_distance():
    pred, truth = np.zeros((2, 12, 40, 40), bool)
    pred[1], truth[6] = True, True  # surfels at 0.5, 1.5 and 5.5, 6.5 slices
    spacing = (0.6, 1.0, 1.0)  # nearest surfels 4 slices = 2.4 mm apart, the others 5 = 3.0 mm
    assert normalized_surface_dice(pred, truth, spacing, 2.3) == 0
    assert normalized_surface_dice(pred, truth, spacing, 2.5) == pytest.approx(0.5, abs=0.03)
    assert normalized_surface_dice(pred, truth, spacing) == 1  # 3.0 mm is within 3 mm


def test_rmsd_by_hand():
    pred, truth = np.zeros((2, 4, 5, 6), bool)
    pred[1, 1, 1] = True
    truth[1, 1, 1], truth[3, 1, 1], truth[1, 4, 1] = True, True, True
    # pred to truth: 0; truth to pred: 0, 2 slices of 2.5 mm, 3 rows of 1 mm
    expected = math.sqrt((0 + 0 + 5.0**2 + 3.0**2) / 4)
    assert root_mean_square_surface_distance(pred, truth, (2.5, 1.0, 0.7)) == pytest.approx(
        expected, rel=FLOAT32
    )


@settings(max_examples=25, deadline=None)
@given(
    masks=npst.arrays(bool, (2, 4, 5, 6)),
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
)
def test_rmsd_is_the_brute_force_one_and_symmetric(masks, spacing):
    pred, truth = masks
    measured = root_mean_square_surface_distance(pred, truth, spacing)
    if not (pred.any() and truth.any()):
        assert math.isnan(measured)
        return
    borders = []
    for mask in (pred, truth):
        padded = np.pad(mask, 1)
        inner = np.logical_and.reduce(
            [np.roll(padded, step, axis) for axis in range(3) for step in (-1, 1)]
        )
        borders.append((np.argwhere(padded & ~inner) * spacing).astype(float))
    distances = cdist(*borders)
    squares = np.concatenate([distances.min(axis=0), distances.min(axis=1)]) ** 2
    assert measured == pytest.approx(math.sqrt(squares.mean()), rel=FLOAT32, abs=FLOAT32)
    assert root_mean_square_surface_distance(truth, pred, spacing) == pytest.approx(
        measured, rel=FLOAT32
    )


def test_a_mask_agrees_with_itself_even_at_the_arrays_edge():
    full = np.ones((3, 4, 5), bool)
    assert normalized_surface_dice(full, full, UNIT, tolerance_mm=0) == 1
    assert root_mean_square_surface_distance(full, full, UNIT) == 0


def test_background_round_the_masks_changes_nothing():
    pred, truth = two_lesions()
    wide_pred, wide_truth = np.pad(pred, (3, 9)), np.pad(truth, (3, 9))
    spacing = (2.0, 0.8, 0.8)
    for measure in (normalized_surface_dice, root_mean_square_surface_distance):
        assert measure(wide_pred, wide_truth, spacing) == measure(pred, truth, spacing)


def test_empty_masks():
    _, some = two_lesions()
    nothing = np.zeros_like(some)
    assert normalized_surface_dice(nothing, some, UNIT) == 0
    assert normalized_surface_dice(some, nothing, UNIT) == 0
    assert math.isnan(normalized_surface_dice(nothing, nothing, UNIT))
    for pred, truth in itertools.permutations((some, nothing)):
        assert math.isnan(root_mean_square_surface_distance(pred, truth, UNIT))


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [
        ((3, 3, 3), (1, 0, 1), "expected three positive numbers"),
        ((3, 3, 3), (1, math.nan, 1), "expected three positive numbers"),
        ((3, 3, 3), (1, 1), "three spacings"),
        ((3, 3), (1, 1, 1), r"expected \(D, H, W\) masks"),
    ],
)
def test_what_has_no_distance_is_refused(shape, spacing, message):
    mask = np.ones(shape, bool)
    for measure in (normalized_surface_dice, root_mean_square_surface_distance):
        with pytest.raises(ValueError, match=message):
            measure(mask, mask, spacing)


def test_two_voxels_five_apart_by_hand():
    pred, truth = np.zeros((2, 3, 3, 9), bool)
    pred[1, 1, 1], truth[1, 1, 6] = True, True
    # Each is an octahedron of 8 equal surfels at its corners: of either, half are 4 voxels from the
    # other's nearest corners and half are 5.
    found = surface_distances(pred, truth, (2.0, 2.0, 2.0))
    assert found.average_mm() == pytest.approx(9)
    assert found.hausdorff_mm() == pytest.approx(10)
    assert found.hausdorff_mm(40) == pytest.approx(8)
    nsd = [found.normalized_dice(mm) for mm in (7.99, 8, 9.99, 10)]
    np.testing.assert_allclose(nsd, [0, 0.5, 0.5, 1])


def test_no_distance_without_a_surface():
    _, some = two_lesions()
    nothing = np.zeros_like(some)
    for pred, truth in ((some, nothing), (nothing, some), (nothing, nothing)):
        found = surface_distances(pred, truth, UNIT)
        assert math.isnan(found.hausdorff_mm())
        assert math.isnan(found.average_mm())
    # What is there is infinitely far from what is not, at any tolerance.
    assert surface_distances(nothing, some, UNIT).normalized_dice(1e9) == 0


def test_few_points_and_many_are_searched_alike(monkeypatch):
    pred, truth = two_lesions()
    monkeypatch.setattr(surface, "SEARCH_MM", math.inf)
    found = []
    for cost in (0, math.inf):  # a k-d tree, and a transform
        monkeypatch.setattr(surface, "VOXELS_A_SEARCH", cost)
        both = surface_distances(pred, truth, (2.5, 0.8, 1.3))
        rmsd = root_mean_square_surface_distance(pred, truth, (2.5, 0.8, 1.3))
        found.append([*both.pred_mm, *both.truth_mm, rmsd])
    np.testing.assert_allclose(*found, rtol=1e-6)  # edt's are float32


def test_200_random_pairs_are_deepminds():
    theirs = pytest.importorskip(
        "surface_distance", reason="surface-distance is not installed: pip install surface-distance"
    )
    for pair in random_pairs():
        found = surface_distances(*pair)
        oracle = theirs.compute_surface_distances(pair.truth, pair.pred, pair.spacing_mm)
        for tolerance in (1.0, 2.0, 3.0, 5.0):
            expected = theirs.compute_surface_dice_at_tolerance(oracle, tolerance)
            assert found.normalized_dice(tolerance) == pytest.approx(expected, abs=1e-6)
        # Distances to 1e-6 of themselves: edt's are float32.
        hausdorff = theirs.compute_robust_hausdorff(oracle, 95)
        assert found.hausdorff_mm() == pytest.approx(hausdorff, rel=1e-6)
        areas = oracle["surfel_areas_gt"].sum(), oracle["surfel_areas_pred"].sum()
        average = np.dot(theirs.compute_average_surface_distance(oracle), areas) / sum(areas)
        assert found.average_mm() == pytest.approx(average, rel=1e-6)
