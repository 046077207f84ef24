"""What the lungs of a chest CT can be, on a drawn chest of 2 mm voxels."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from deepsc_jax.config import DataConfig
from deepsc_jax.data.plausibility import check_lungs
from deepsc_jax.data.preprocess import prepare_scan
from deepsc_jax.data.scans import Scan
from deepsc_jax.runtime.errors import InputError

SHAPE = (120, 110, 160)
MM = (2.0, 2.0, 2.0)


def box(low, high):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(map(slice, low, high))] = True
    return mask


RIGHT = box((10, 20, 20), (110, 90, 70))  # 100 × 70 × 50 voxels of 8 µl: 2.8 l
LEFT = box((10, 20, 90), (110, 90, 140))


def chest(lung_hu=-850.0, spacing_mm=MM, notes=()) -> Scan:
    values = np.full(SHAPE, 40, np.float32)
    values[RIGHT | LEFT] = lung_hu
    values[:, :5] = -1000
    affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1])
    shape = (SHAPE[2], SHAPE[1], SHAPE[0])
    return Scan("case", values, spacing_mm, affine, shape, None, nib.Nifti1Header(), notes)


def test_healthy_lungs_need_no_note():
    assert check_lungs(chest(), RIGHT | LEFT, ()) == ()


@pytest.mark.parametrize(
    ("spacing_mm", "litres"), [((0.3, 2, 2), "0.84"), ((0.1, 2, 2), "0.28"), ((5, 2, 2), "14")]
)
def test_lungs_of_another_volume_than_lungs_have_are_refused_unless_allowed(spacing_mm, litres):
    scan = chest(spacing_mm=spacing_mm)
    if litres == "0.84":
        assert check_lungs(scan, RIGHT | LEFT, ()) == ()
        return
    with pytest.raises(InputError, match=rf"case: its lungs have {litres} l.*--allow=lungs") as it:
        check_lungs(scan, RIGHT | LEFT, ())
    assert "\n" not in str(it.value)
    (note,) = check_lungs(scan, RIGHT | LEFT, {"lungs"})
    assert note == f"its lungs have {litres} l, expected 0.3 to 12: allowed"


@pytest.mark.parametrize(
    ("lung_hu", "fits"),
    [(-850, True), (-950, True), (-300, True), (174, False), (-1000, False), (-850 + 1024, False)],
)
def test_a_mean_that_no_lungs_have_is_refused_unless_allowed(lung_hu, fits):
    scan = chest(lung_hu)
    if fits:
        assert check_lungs(scan, RIGHT | LEFT, ()) == ()
        return
    with pytest.raises(InputError, match=rf"mean of {lung_hu} HU, expected -970 to -150.*offset"):
        check_lungs(scan, RIGHT | LEFT, ())
    (note,) = check_lungs(scan, RIGHT | LEFT, {"intensity"})
    assert note.endswith("allowed")


def test_a_whitened_lung_found_at_half_its_volume_is_noted():
    half = LEFT & box((60, 0, 0), SHAPE)
    (note,) = check_lungs(chest(), RIGHT | half, ())
    assert note.startswith("its right lung has 2.80 l, its left 1.40 l")
    (note,) = check_lungs(chest(), RIGHT, ())
    assert note.startswith("one lung is found")


def test_lungs_that_touch_are_told_apart():
    bridge = box((90, 50, 70), (100, 60, 90))
    assert check_lungs(chest(), RIGHT | LEFT | bridge, ()) == ()


CONFIG = DataConfig(
    working_size=(64, 64), tile=(8, 16, 16), slices=8, depth_bucket=8, working_spacing_mm=(4, 4, 4)
)


def test_a_prepared_scan_brings_the_scans_notes_and_the_lungs():
    scan = chest(notes=("its header counts in metres",))
    prepared = prepare_scan(scan, RIGHT, CONFIG)
    assert prepared.notes[0] == "its header counts in metres"
    assert prepared.notes[1].startswith("one lung is found")


def test_hu_plus_1024_is_refused_although_a_lung_mask_is_given():
    with pytest.raises(InputError, match="case: its lungs have a mean of 174 HU"):
        prepare_scan(chest(-850 + 1024), RIGHT | LEFT, CONFIG)
    assert prepare_scan(chest(174), RIGHT | LEFT, CONFIG, allow={"intensity"}).volume.max() <= 1


def test_images_without_hu_or_spacing_are_not_judged():
    scan = chest(spacing_mm=(1, 1, 1))
    scan = dataclasses.replace(scan, values=np.abs(scan.values) % 255)
    unit = dataclasses.replace(CONFIG, intensity="unit", working_spacing_mm=(0, 0, 0))
    assert prepare_scan(scan, box((10, 20, 20), (30, 40, 40)), unit).notes == ()


@pytest.mark.parametrize("thickness", [2e3, 2e6])
def test_a_working_grid_of_too_many_slices_is_refused_before_it_is_made(thickness):
    """44,888 of them once, or 375 GiB."""
    unit = dataclasses.replace(CONFIG, intensity="unit")
    scan = chest(spacing_mm=(thickness, 2, 2))
    slices = round(np.ptp(np.nonzero(RIGHT | LEFT)[0]) + 1) * round(thickness) // 4
    with pytest.raises(InputError, match=rf"are {slices} on the working grid, expected at most"):
        prepare_scan(scan, RIGHT | LEFT, unit)
