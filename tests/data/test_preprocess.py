import dataclasses
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsc_jax.config import DataConfig
from deepsc_jax.data.preprocess import (
    DARKEST,
    WorkingGrid,
    normalise,
    prepare_scan,
    to_source,
    to_working,
    working_grid,
)
from deepsc_jax.data.scans import Scan
from deepsc_jax.data.source import KINDS
from deepsc_jax.runtime.errors import InputError


def config(**changes) -> DataConfig:
    small = DataConfig(working_size=(64, 64), tile=(8, 16, 16), slices=8, depth_bucket=8)
    return dataclasses.replace(small, **changes)


def grid_of(shape, source_shape, start=(0.0, 0.0, 0.0), step=None) -> WorkingGrid:
    step = step or tuple(n / m for n, m in zip(source_shape, shape, strict=True))
    return WorkingGrid(tuple(shape), tuple(start), tuple(step), tuple(source_shape))


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def make_scan(values: np.ndarray, spacing_mm=(2.0, 1.0, 1.0)) -> Scan:
    return Scan(
        name="case_017",
        values=values.astype(np.float32),
        spacing_mm=spacing_mm,
        affine=np.diag([-1.0, -1.0, 2.0, 1.0]),
        source_shape=values.shape[::-1],
        path=None,
        header=nib.Nifti1Header(),
    )


# The grid


def test_slices_as_they_come_begin_with_the_lungs():
    lung = np.zeros((40, 128, 96), bool)
    lung[5:31, 40:80, 20:70] = True
    grid = working_grid(lung.shape, (2.0, 0.7, 0.7), lung, config())
    assert grid.shape == (26, 64, 64)
    assert grid.start == (5, 40, 20)
    assert grid.step == (1, 1, 1)
    values = noise(lung.shape)
    working = to_working(values, grid)
    np.testing.assert_array_equal(working, values[5:31, 40:104, 20:84])


def test_the_fewest_voxels_that_hold_the_lungs_are_centred_on_them():
    lung = np.zeros((40, 128, 128), bool)
    lung[2:33, 30:50, 60:100] = True
    wanted = config(working_spacing_mm=(3.0, 1.0, 1.0))
    grid = working_grid(lung.shape, (2.0, 0.8, 0.8), lung, wanted)
    assert grid.step == (1.5, 1.25, 1.25)
    # 31 slices are 20.7 of 1.5, 20 rows are 16 of 1.25, 40 columns are 32.
    assert grid.shape == (21, 64, 64)
    assert grid.start == pytest.approx((2 - 0.25, 30, 60))


@pytest.mark.parametrize("spacing", [(0.0, 0.0, 0.0), (3.0, 1.5, 1.5)])
@pytest.mark.parametrize("border", [1, 3, 8, 24])
def test_a_border_around_the_scan_changes_nothing(spacing, border):
    rng = np.random.default_rng(0)
    values, lung = rng.integers(-1024, 200, (20, 48, 48)), np.zeros((20, 48, 48), bool)
    lung[4:17, 6:40, 9:41] = rng.uniform(size=(13, 34, 32)) < 0.7
    wide = np.pad(values, border, constant_values=-1000)
    plain, found = (
        prepare_scan(make_scan(v), m, config(working_spacing_mm=spacing), allow=KINDS)
        for v, m in ((values, lung), (wide, np.pad(lung, border)))
    )
    np.testing.assert_array_equal(found.volume, plain.volume)
    assert found.grid.start == pytest.approx([s + border for s in plain.grid.start])


def test_lungs_that_do_not_fit_coarsen_both_axes_just_enough():
    lung = np.zeros((10, 256, 256), bool)
    lung[:, 100:150, 10:246] = True
    wanted = config(working_spacing_mm=(0.0, 1.0, 1.0))
    grid = working_grid(lung.shape, (2.0, 1.0, 1.0), lung, wanted)
    assert grid.step == pytest.approx((1, 236 / 64, 236 / 64))
    assert grid.start[2] == pytest.approx(10)
    columns = to_working(lung, grid).max(axis=(0, 1))
    assert (columns >= 0.5).all()


def test_a_step_of_one_copies_whole_voxels_although_the_box_is_odd():
    lung = np.zeros((10, 128, 128), bool)
    lung[:, 30:51, 60:97] = True
    wanted = config(working_spacing_mm=(0.0, 0.7, 0.7))
    spacing = float(np.float32(0.7))  # what a float32 affine makes of it
    grid = working_grid(lung.shape, (2.0, spacing, spacing), lung, wanted)
    assert grid.step == (1, 1, 1)
    values = noise(lung.shape)
    top, left = int(grid.start[1]), int(grid.start[2])
    np.testing.assert_array_equal(
        to_working(values, grid), values[:, top : top + 64, left : left + 64]
    )


@pytest.mark.parametrize(("spacing", "slices"), [(2.0, 40), (2.5, 32), (1.0, 80), (500.0, 1)])
def test_all_slices_with_lungs_are_on_the_grid(spacing, slices):
    lung = np.ones((40, 64, 64), bool)
    grid = working_grid(
        lung.shape, (2.0, 1.0, 1.0), lung, config(working_spacing_mm=(spacing, 0.0, 0.0))
    )
    assert grid.shape[0] == slices
    assert grid.start[0] <= 0
    assert grid.start[0] + grid.step[0] * slices >= 40


# Resampling


def test_coinciding_grids_copy_bit_for_bit():
    values = noise((9, 20, 30)) * 1e4
    grid = grid_of(values.shape, values.shape)
    np.testing.assert_array_equal(to_working(values, grid), values)
    np.testing.assert_array_equal(to_source(values, grid), values)


def test_halving_by_hand():
    row = np.array([0, 0, 8, 8, 0, 16], np.float32).reshape(1, 1, 6)
    half = to_working(row, grid_of((1, 1, 3), row.shape))
    # A triangle of half-width 2 at 1, 3, 5: weights 1/8 3/8 3/8 1/8 of the voxels at -1.5 … +1.5;
    # at the border the three in reach, normalised to 1.
    expected = [(3 * 0 + 3 * 0 + 8) / 7, (0 + 3 * 8 + 3 * 8 + 0) / 8, (8 + 3 * 0 + 3 * 16) / 7]
    np.testing.assert_allclose(half[0, 0], expected, rtol=1e-6)


def test_doubling_by_hand():
    row = np.array([0, 4], np.float32).reshape(1, 1, 2)
    np.testing.assert_array_equal(to_source(row, grid_of((1, 1, 2), (1, 1, 4)))[0, 0], [0, 1, 3, 4])
    np.testing.assert_array_equal(
        to_working(row, grid_of((1, 1, 4), (1, 1, 2)))[0, 0], [0, 1, 3, 4]
    )


@pytest.mark.parametrize(("height", "width"), [(64, 48), (50, 37), (200, 131), (96, 128)])
def test_in_plane_resampling_agrees_with_pillow(height, width):
    image = pytest.importorskip("PIL.Image")
    values = noise((1, 96, 128))
    expected = image.fromarray(values[0]).resize((width, height), image.Resampling.BILINEAR)
    resampled = to_working(values, grid_of((1, height, width), values.shape))
    # Pillow sums in double precision.
    np.testing.assert_allclose(resampled[0], np.asarray(expected), atol=1e-6)


def test_depth_is_resampled_like_the_other_axes():
    values = noise((20, 24, 28))
    grid = grid_of((9, 30, 12), values.shape, (0, -2.5, 1.25), (20 / 9, 0.9, 1.7))
    turned = grid_of((12, 30, 9), (28, 24, 20), (1.25, -2.5, 0), (1.7, 0.9, 20 / 9))
    there = to_working(values, grid)
    np.testing.assert_allclose(to_working(values.T, turned).T, there, atol=1e-6)
    np.testing.assert_allclose(to_source(there.T, turned).T, to_source(there, grid), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    source=st.integers(1, 40),
    working=st.integers(1, 40),
    start=st.floats(-20, 20),
    step=st.floats(0.3, 5),
)
def test_a_constant_stays_constant_within_reach_and_is_0_beyond(source, working, start, step):
    grid = grid_of((1, 1, working), (1, 1, source), (0, 0, start), (1, 1, step))
    centres = start + (np.arange(working) + 0.5) * step
    inside = (centres >= 0) & (centres <= source)
    forward = to_working(np.ones(grid.source_shape, bool), grid)[0, 0]
    np.testing.assert_allclose(forward, inside, atol=1e-6)
    edges = (np.arange(source) + 0.5 - start) / step
    inside = (edges >= 0) & (edges <= working)
    backward = to_source(np.ones(grid.shape, np.float32), grid)[0, 0]
    np.testing.assert_allclose(backward, inside, atol=1e-6)


def test_positions_are_kept_there_and_back():
    source_shape = (40, 60, 60)
    grid = grid_of((27, 32, 32), source_shape, (0, 3.3, 5.7), (40 / 27, 1.6, 1.6))
    ramps = np.meshgrid(*[np.arange(n) + 0.5 for n in source_shape], indexing="ij")
    blob = np.exp(-sum((r - c) ** 2 for r, c in zip(ramps, (18, 25, 33), strict=True)) / 60)
    back = to_source(to_working(blob.astype(np.float32), grid), grid)
    for ramp, centre in zip(ramps, (18, 25, 33), strict=True):
        # An eighth of a voxel: the blob's tail is cut by the window.
        assert float((ramp * back).sum() / back.sum()) == pytest.approx(centre, abs=0.125)


def test_memory_stays_near_the_result():
    values = np.zeros((48, 256, 256), np.float32)
    grid = grid_of((48, 128, 128), values.shape)
    tracemalloc.start()
    to_source(to_working(values, grid), grid)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * values.nbytes  # the two results are 1.25 of it


def test_arrays_of_another_shape_are_refused():
    grid = grid_of((4, 8, 8), (4, 16, 16))
    with pytest.raises(ValueError, match="its grid"):
        to_working(noise((4, 8, 8)), grid)
    with pytest.raises(ValueError, match="its grid"):
        to_source(noise((4, 16, 16)), grid)


# Intensities


def test_hu_are_clipped_and_scaled_as_in_the_paper():
    values = np.array([-3000, -1400, -600, 200, 3000], np.int16)
    np.testing.assert_array_equal(normalise(values, config()), [0, 0, 0.5, 1, 1])
    assert normalise(values, config()).dtype == np.float32


def test_unit_images_are_scaled_by_their_range_without_a_window():
    unit = config(intensity="unit")
    expected = np.array([0, 0.2, 1], np.float32)
    np.testing.assert_array_equal(normalise(np.array([0, 51, 255]), unit), expected)
    np.testing.assert_array_equal(normalise(np.array([0, 0.25, 1]), unit), [0, 0.25, 1])


def test_normalising_leaves_the_scan_alone():
    values = np.full((2, 3, 4), -600, np.float32)
    normalise(values, config())
    assert (values == -600).all()


# The whole


@pytest.mark.parametrize("spacing", [(0.0, 0.0, 0.0), (3.0, 1.5, 1.5)])
def test_prepared_scan_is_0_outside_the_lungs_and_in_range(spacing):
    rng = np.random.default_rng(0)
    scan = make_scan(rng.integers(-1024, 500, (24, 96, 96)))
    lung = np.zeros(scan.values.shape, bool)
    lung[3:21, 20:71, 10:82] = True  # of whole working voxels, of 1.5 source voxels each
    lesion = np.zeros_like(lung)
    lesion[8:14, 30:45, 20:35] = True
    prepared = prepare_scan(scan, lung, config(working_spacing_mm=spacing), lesion, KINDS)
    assert prepared.volume.dtype == np.float32
    assert prepared.volume.shape == prepared.grid.shape == prepared.lung.shape
    assert (prepared.volume[~prepared.lung] == 0).all()
    assert prepared.volume[prepared.lung].min() >= DARKEST  # also of voxels at -1400 HU and below
    assert prepared.volume.max() <= 1
    assert prepared.lesion is not None
    voxel = np.prod(prepared.grid.step)
    # A box's sides move by at most half a working voxel each.
    assert prepared.lesion.sum() * voxel == pytest.approx(lesion.sum(), rel=0.35)
    back = to_source(prepared.lung, prepared.grid) >= 0.5
    assert (back & lung).sum() * 2 / (back.sum() + lung.sum()) > 0.97


@pytest.mark.parametrize("spacing", [(0.0, 0.0, 0.0), (3.0, 2.3, 2.3)])
def test_the_lungs_border_looks_and_is_found_as_their_middle(spacing):
    """Neither the wall beside them nor the zeros there are mixed in."""
    z, y, x = np.ogrid[-12:12, -30:30, -24:24]
    lung = (z / 10) ** 2 + (y / 28) ** 2 + (x / 21) ** 2 < 1
    scan = make_scan(np.where(lung, -850, 60))
    wanted = config(working_spacing_mm=spacing)
    prepared = prepare_scan(scan, lung, wanted, lung, KINDS)
    np.testing.assert_allclose(prepared.volume[prepared.lung], 550 / 1600, atol=1e-6)
    assert prepared.lesion is not None
    np.testing.assert_array_equal(prepared.lesion, prepared.lung)  # all of them is lesion
    back = to_source(prepared.lesion, prepared.grid, prepared.lung)
    assert back.max() <= 1
    reached = to_source(prepared.lung, prepared.grid) > 0
    np.testing.assert_allclose(back[reached], 1, atol=1e-6)
    assert (reached & lung).sum() > 0.99 * lung.sum()


def test_how_dense_the_lungs_are_is_taken_out_where_that_is_asked_for():
    rng = np.random.default_rng(3)
    lung = np.zeros((8, 64, 64), bool)
    lung[:, 10:50, 12:60] = True
    values = rng.normal(-870, 20, lung.shape).round()
    values[:, 20:30, 20:30] += 300  # a lesion, less than a quarter of them
    plain, dense = (make_scan(values + more) for more in (0, 65))
    level = config(lung_level_hu=-860.0)
    one, other = (prepare_scan(scan, lung, level, allow=KINDS).volume for scan in (plain, dense))
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.quantile(one[one > 0], 0.25) == pytest.approx((1400 - 860) / 1600, abs=1e-6)
    as_it_is = prepare_scan(dense, lung, config(), allow=KINDS).volume
    assert abs(as_it_is[as_it_is > 0].mean() - one[one > 0].mean()) > 0.02


def test_full_size_preparation_is_the_papers_formula():
    rng = np.random.default_rng(1)
    scan = make_scan(rng.integers(-1024, 500, (8, 64, 64)))
    lung = rng.random(scan.values.shape) > 0.5
    lung[[0, -1], 0, 0] = lung[0, [0, -1], 0] = lung[0, 0, [0, -1]] = True
    prepared = prepare_scan(scan, lung, config(), allow=KINDS)
    expected = (np.clip(scan.values, -1400, 200) + 1400) / 1600 * lung
    np.testing.assert_array_equal(prepared.volume, expected.astype(np.float32))
    assert prepared.lesion is None


def test_an_empty_lung_mask_names_the_scan():
    scan = make_scan(np.zeros((8, 64, 64)))
    with pytest.raises(InputError, match="case_017: its lung mask is empty"):
        prepare_scan(scan, np.zeros(scan.values.shape, bool), config())


def test_a_saturated_scan_stays_within_range_on_any_grid():
    """Interpolation weights sum to 1 only up to rounding."""
    for step in (3.1, 4.5, 4.7):
        scan = make_scan(np.full((24, 70, 70), 3000.0), spacing_mm=(5.3, 3.4, 3.4))
        lung = np.ones(scan.values.shape, bool)
        settings_ = config(working_spacing_mm=(4.9, step, step))
        volume = prepare_scan(scan, lung, settings_, allow=KINDS).volume
        assert volume.min() >= 0
        assert volume.max() <= 1
