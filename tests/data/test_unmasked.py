"""Scans that are not masked by their lungs: grid, values, and the sides of the lungs."""

import nibabel as nib
import numpy as np
import pytest

from deepsc_jax.config import DataConfig
from deepsc_jax.data.classes import IDS, MIRRORED_IDS
from deepsc_jax.data.labels import class_map
from deepsc_jax.data.preprocess import intensity_of
from deepsc_jax.data.scans import Scan
from deepsc_jax.data.unmasked import prepare, whole_grid
from deepsc_jax.runtime.errors import InputError

DATA = DataConfig(
    mask="none", working_spacing_mm=(4, 2, 2), working_size=(16, 32), tile=(8, 16, 32),
    depth_bucket=8,
)  # fmt: skip
SHAPE, MM = (8, 24, 48), (4.0, 2.0, 2.0)


def lungs(gap: int = 8) -> np.ndarray:
    """Two boxes, 80 mm apart between their middles, or, without a gap, one."""
    mask = np.zeros(SHAPE, bool)
    mask[1:7, 6:18, 2 : 24 - gap // 2] = mask[1:7, 6:18, 24 + gap // 2 : 46] = True
    return mask


def scan_of(values: np.ndarray) -> Scan:
    affine = np.diag([-2.0, -2.0, 4.0, 1.0])
    header = nib.Nifti1Header()
    return Scan("case_017", values.astype(np.float32), MM, affine, values.shape[::-1], None, header)


def test_the_grid_holds_all_of_a_scan_in_its_middle():
    # 96 mm of width fill 32 voxels of 3 mm, and 24 rows of 2 mm are 16 of 3 mm.
    wider = whole_grid(SHAPE, MM, DATA)
    assert wider.shape == (8, 16, 32)
    np.testing.assert_allclose(wider.step, (1, 1.5, 1.5))
    np.testing.assert_allclose(wider.start, (0, 0, 0))
    # What is smaller keeps the wanted voxels, and lies in the middle.
    smaller = whole_grid((5, 12, 16), MM, DATA)
    assert smaller.step == (1, 1, 1)
    assert smaller.start == (0, -2, -8)
    assert whole_grid((10, 12, 16), (2.0, 2.0, 2.0), DATA).shape[0] == 5


def test_nothing_is_masked_and_lesions_may_lie_outside_of_the_lungs():
    values = np.full(SHAPE, -1000.0)
    values[:, 4:20, 1:47] = 0
    lesion = np.zeros(SHAPE, bool)
    lesion[3:5, 0:6, 20:28] = True
    prepared = prepare(scan_of(values), lungs(), DATA, lesion, {"lungs", "intensity"})
    low, high = DATA.hu_window
    np.testing.assert_allclose(prepared.volume[4, 8, 16], (0 - low) / (high - low), atol=1e-6)
    assert prepared.lesion is not None
    assert (prepared.lesion & ~prepared.lung).any()
    assert prepared.classes is not None
    np.testing.assert_array_equal(prepared.classes == IDS["lesion"], prepared.lesion)
    expected = (prepared.volume.min(), prepared.volume.mean(), prepared.volume.std())
    np.testing.assert_allclose(intensity_of(prepared.volume), expected, rtol=1e-5)
    again = prepare(scan_of(values), None, DATA)
    np.testing.assert_array_equal(again.volume, prepared.volume)
    assert again.classes is None


def test_a_lung_mask_that_is_empty_is_refused():
    with pytest.raises(InputError, match="its lung mask is empty on the working grid"):
        prepare(scan_of(np.zeros(SHAPE)), np.zeros(SHAPE, bool), DATA)


@pytest.mark.parametrize("gap", [8, 0], ids=["apart", "touching"])
def test_the_right_lung_is_the_first_along_the_width(gap: int):
    mask = lungs(gap)
    classes = class_map(mask, None, MM)
    expected = np.zeros(SHAPE, int)
    expected[..., :24], expected[..., 24:] = IDS["right_lung"], IDS["left_lung"]
    np.testing.assert_array_equal(classes, expected * mask)


def test_a_lesion_comes_before_a_lung():
    lesion = np.zeros(SHAPE, bool)
    lesion[4, 8:10, 4:6] = True
    classes = class_map(lungs(), lesion, MM)
    np.testing.assert_array_equal(classes == IDS["lesion"], lesion)
    assert [MIRRORED_IDS[i] for i in (0, 1, 2, 3)] == [0, 2, 1, 3]


def test_depth_is_divided_into_so_many_slices_linear_between_their_centres() -> None:
    """Numbers by hand: place i is (i + 1/2) D / slices - 1/2, its ends held."""
    ramp = np.array([-1400.0, -1240, -1080, -920])[:, None, None] * np.ones((1, 4, 4))
    for slices, expected in ((4, [0, 0.1, 0.2, 0.3]), (8, [0, 0.025, 0.075, 0.125])):
        data = DataConfig(
            mask="none",
            working_slices=slices,
            working_size=(4, 4),
            tile=(1, 4, 4),
            depth_bucket=1,
        )
        found = prepare(scan_of(ramp), None, data)
        assert found.volume.shape == (slices, 4, 4)
        np.testing.assert_allclose(found.volume[:4, 0, 0], expected, atol=1e-6)
        assert found.spacing_mm[0] == 16 / slices
    with pytest.raises(ValueError, match="working_slices is 8 and mask is lungs"):
        DataConfig(working_slices=8)
