"""What is measured of the lesions of one scan, by hand."""

import numpy as np
import pytest

from deepsc_jax.metrics.findings import HU_EDGES, THICKNESSES_MM, depth_in_lung, scan_findings

SPACING = (10.0, 5.0, 5.0)  # 0.25 ml a voxel


@pytest.fixture
def chest() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lesion, lung, hu): a lung of 5 slices of 9x9, a lesion at its edge, one in its middle."""
    lesion, lung = np.zeros((2, 7, 13, 13), bool)
    lung[1:6, 2:11, 2:11] = True
    lesion[3, 2:4, 2:4] = True  # 4 voxels: three 5 mm from outside, one 10 mm
    lesion[2:4, 6, 6] = True  # 2 voxels in the middle: 25 mm
    return lesion, lung, np.where(lung, -850.0, 40.0)


def test_findings_of_a_scan_by_hand(chest):
    lesion, lung, hu = chest
    hu[3, 2:4, 2:4], hu[2:4, 6, 6] = -700.0, 30.0
    found = scan_findings(lesion, lung, hu, SPACING)
    assert found.count == 2
    assert found.lesion_ml == pytest.approx(6 * 0.25)
    assert found.lung_ml == pytest.approx(5 * 81 * 0.25)
    assert found.lvr == pytest.approx(6 / (5 * 81))
    assert found.outside_lung == 0
    assert sorted(map(tuple, found.sizes_mm)) == [(10, 10, 10), (20, 5, 5)]
    # Centres (3.5, 3, 3) and (3, 6.5, 6.5) voxels: half of their distance.
    assert found.spread_mm == pytest.approx(np.hypot(5, np.hypot(17.5, 17.5)) / 2)
    at = dict(zip(THICKNESSES_MM, found.plr, strict=True))
    assert [at[mm] for mm in (0, 4, 5, 9, 10, 24, 25, 35)] == pytest.approx(
        [0, 0, 3 / 6, 3 / 6, 4 / 6, 4 / 6, 1, 1]
    )
    assert found.hu_ml is not None
    bins = {HU_EDGES[i]: ml for i, ml in enumerate(found.hu_ml) if ml}
    assert bins == {-700: pytest.approx(1.0), 20: pytest.approx(0.5)}


def test_a_ball_reaches_what_a_disc_does_not(chest):
    _, lung, _ = chest
    by_slice, by_volume = (
        depth_in_lung(lung, SPACING, volumetric=volumetric) for volumetric in (False, True)
    )
    assert by_slice[1, 6, 6] == pytest.approx(25)
    assert by_volume[1, 6, 6] == pytest.approx(10)  # the slice below is no lung
    assert by_volume[3, 6, 6] == pytest.approx(25)


def test_small_lesions_are_in_no_figure(chest):
    lesion, lung, hu = chest
    found = scan_findings(lesion, lung, hu, SPACING, min_ml=0.6)
    assert found.count == 1
    assert found.lesion_ml == pytest.approx(1.0)
    assert found.spread_mm == 0
    assert found.hu_ml is not None
    assert found.hu_ml.sum() == pytest.approx(1.0)


def test_lesions_outside_the_lung_mask_are_counted_and_not_peripheral(chest):
    lesion, lung, hu = chest
    lesion[3, 0, 0:2] = True
    found = scan_findings(lesion, lung, hu, SPACING)
    assert found.outside_lung == pytest.approx(2 / 8)
    assert found.plr[-1] == pytest.approx(6 / 8)


def test_without_a_lesion_ratios_are_undefined(chest):
    _, lung, hu = chest
    found = scan_findings(np.zeros_like(lung), lung, hu, SPACING)
    assert (found.count, found.lesion_ml, found.lvr) == (0, 0, 0)
    assert np.isnan([found.outside_lung, found.spread_mm, *found.plr]).all()


def test_values_beyond_the_last_bins_count_in_them(chest):
    lesion, lung, hu = chest
    hu[lesion] = 1500.0
    found = scan_findings(lesion, lung, hu, SPACING)
    assert found.hu_ml is not None
    assert found.hu_ml[-1] == pytest.approx(1.5)
    assert scan_findings(lesion, lung, None, SPACING).hu_ml is None
