"""The lesions of a table, by hand."""

import numpy as np

from deepsc_jax.report.lesions import lesions


def test_lesions_are_measured_largest_first_and_the_rest_is_counted() -> None:
    mask = np.zeros((6, 8, 9), bool)
    mask[1, 1:3, 1:3] = True
    mask[2, 3, 3] = True  # by a corner of the same: 26 neighbours
    mask[4:6, 5:8, 5:9] = True
    mask[0, 7, 0] = True
    values = np.where(mask, -400.0, 0.0).astype(np.float32)
    values[2, 3, 3] = -900
    found, total = lesions(mask, values, (2.0, 1.0, 0.5), 2)
    assert total == 3
    assert [each.ml for each in found] == [0.024, 0.005]  # 24 and 5 voxels of 1 mm³
    assert [each.extent_mm for each in found] == [(4.0, 3.0, 2.0), (4.0, 3.0, 1.5)]
    assert [each.mean for each in found] == [-400.0, -500.0]
    assert all(mask[each.at] for each in found)


def test_a_lesion_that_is_hollow_is_shown_in_its_rim() -> None:
    mask = np.ones((3, 9, 9), bool)
    mask[:, 2:7, 2:7] = False
    found, _ = lesions(mask, mask.astype(np.float32), (1.0, 1.0, 1.0), 1)
    assert mask[found[0].at]


def test_no_lesion_is_none() -> None:
    empty = np.zeros((3, 4, 5), bool)
    assert lesions(empty, empty.astype(np.float32), (1, 1, 1), 5) == ([], 0)
