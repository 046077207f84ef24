"""Centres of salient regions: by hand."""

import numpy as np
import pytest

from deepsc_jax.evaluation.centres import figures, match, salient_centres


def test_regions_have_their_centre_of_mass_and_the_hottest_comes_first():
    heat = np.zeros((8, 16))
    heat[1:3, 2:4] = 0.6
    heat[5:7, 10:13] = 1.0
    heat[6, 12] = 0.7
    heat[0, 15] = 1.0  # a cell alone is no region
    heat[4, 4] = 0.49  # nor is what is below half of the maximum
    rows = (3 * 5.5 + 2 * 6.5 + 0.7 * 6.5) / 5.7
    columns = (2 * 10.5 + 2 * 11.5 + 12.5 + 0.7 * 12.5) / 5.7
    expected = [[rows / 8, columns / 16], [2 / 8, 3 / 16]]
    np.testing.assert_allclose(salient_centres(heat), expected)


def test_diagonal_neighbours_are_one_region_and_those_two_cells_apart_are_not():
    heat = np.zeros((12, 12))
    heat[[0, 1, 2, 3], [0, 1, 2, 3]] = 1  # each end has but one neighbour
    assert len(salient_centres(heat)) == 0
    heat[0:2, 0:2] = heat[2:4, 2:4] = 1
    heat[6:8, 2:4] = 1
    assert len(salient_centres(heat)) == 2


def test_a_map_of_zeros_has_none_and_a_volume_has_three_coordinates():
    assert salient_centres(np.zeros((4, 4))).shape == (0, 2)
    heat = np.zeros((4, 4, 4))
    heat[:2, :2, 2:] = 1
    np.testing.assert_allclose(salient_centres(heat), [[0.25, 0.25, 0.75]])


def test_pairs_have_the_least_total_distance():
    truth = np.array([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]])
    # To the first of them both are nearest; the pairs are still one to one.
    given = np.array([[0.2, 0.2], [0.12, 0.1]])
    found = match(truth, given)
    pairs = {tuple(t): tuple(g) for t, g in zip(found.truth, found.given, strict=True)}
    assert pairs == {(0.1, 0.1): (0.12, 0.1), (0.5, 0.5): (0.2, 0.2)}
    assert (found.missed, found.extra) == (1, 0)
    nothing = match(truth, np.empty((0, 2)))
    assert (len(nothing.truth), nothing.missed, nothing.extra) == (0, 3, 0)


def test_figures_are_of_each_axis_and_pooled():
    truth, given = np.array([[0.1, 0.8], [0.3, 0.9]]), np.array([[0.2, 0.8], [0.4, 0.7]])
    found = figures([match(truth[:1], given[:1]), match(truth[1:], given[1:])])
    assert found["axis 0"].mae == pytest.approx(0.1)
    assert found["axis 1"].mse == pytest.approx(0.02)
    assert found["axis 1"].r == pytest.approx(-1)
    assert found["pooled"].n == 4
    assert found["pooled"].r > 0.8
