"""The built-in lung mask on drawn chests, phantoms and, where it lies beside the repo, real CT."""

import os
import sys
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.random import default_rng

from deepsc_jax.data.lungs import find_lungs, lung_mask
from deepsc_jax.data.scans import Scan, load_mask, load_scan
from deepsc_jax.phantoms.lesions import make_phantom
from deepsc_jax.runtime.errors import InputError

SHAPE, SPACING = (64, 104, 128), (5.0, 3.5, 3.5)
REAL_DATA = Path(os.environ.get("DEEPSC_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"real CT is not at {REAL_DATA} (DEEPSC_REAL_DATA)"
)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def ellipsoid(centre_mm, radius_mm, grow=0.0):
    """Voxels in an ellipsoid; millimetres from the middle of the scan, (depth, height, width)."""
    axes = np.ogrid[tuple(slice(n) for n in SHAPE)]
    total = sum(
        (((x - n / 2 + 0.5) * s - c) / (r + grow)) ** 2
        for x, n, s, c, r in zip(axes, SHAPE, SPACING, centre_mm, radius_mm, strict=True)
    )
    return np.broadcast_to(total, SHAPE) <= 1


def chest(*consolidations):
    """HU, lungs, heart: a chest with arms, couch and blanket, trachea, heart, liver, stomach gas.

    The couch is a hollow shell that touches the back; an arm makes a pocket of air with the chest.
    """
    hu = np.full(SHAPE, -1000.0)
    cylinder = np.broadcast_to(ellipsoid((0, 0, 0), (1e9, 115, 165))[32], SHAPE)
    fat = np.broadcast_to(ellipsoid((0, 0, 0), (1e9, 108, 158))[32], SHAPE)
    hu[cylinder] = -90
    hu[fat] = 40
    hu[:, 40:66, 112:122] = 30  # an arm; the pocket between it and the chest is closed above, below
    hu[:, 30:40, 100:120] = 30
    lungs = ellipsoid((0, 0, -78), (130, 85, 62)) | ellipsoid((0, 0, 78), (130, 85, 62))
    heart = ellipsoid((-40, -15, 20), (60, 45, 55))
    liver = ellipsoid((-150, 0, -80), (95, 95, 90)) | ellipsoid((-160, 0, 80), (90, 95, 80))
    lungs &= ~heart & ~liver
    hu[lungs] = -850
    hu[
        np.broadcast_to(ellipsoid((0, 0, 0), (1e9, 9, 9))[32], SHAPE)
        & (np.arange(64) > 34)[:, None, None]
    ] = -1000
    hu[ellipsoid((-135, -30, 80), (35, 40, 40))] = -990
    hu[np.broadcast_to(ellipsoid((0, 95, 0), (1e9, 14, 14))[32], SHAPE)] = 500  # spine
    hu[:, 85, 10:118] = hu[:, 95, 10:118] = 200  # couch
    hu[:, 85:96, 10] = hu[:, 85:96, 117] = 200
    hu[:, 86:95, 11:117] = -980
    hu[:, 8, 20:90] = -400  # blanket
    for centre, radius in consolidations:
        hu[ellipsoid(centre, radius) & lungs] = 30
    hu += default_rng(0).normal(0, 20, SHAPE)
    return hu.astype(np.float32), lungs, heart


def as_scan(hu):
    """A scan as `load_scan` gives it, of an image in LPS voxel order."""
    affine = np.diag([-3.5, -3.5, 5.0, 1.0])
    image = nib.Nifti1Image(hu.T, affine)
    return Scan("case", hu, SPACING, affine, hu.T.shape, None, image.header)


@pytest.fixture(scope="module")
def healthy():
    """A chest without lesions and its mask: HU, lungs, mask."""
    hu, lungs, _ = chest()
    return hu, lungs, lung_mask(hu, SPACING, "case")


def test_lungs_are_found_and_couch_arms_trachea_and_stomach_gas_are_not(healthy):
    _, lungs, mask = healthy
    assert mask.dtype == bool
    assert mask.shape == SHAPE
    assert dice(mask, lungs) > 0.97
    assert not mask[:, :, 110:].any()  # arm and the pocket of air beside it
    assert not mask[:, 84:].any()  # couch
    assert not mask[:, 51:53, 63:65].any()  # trachea
    assert not mask[ellipsoid((-140, -30, 80), (20, 25, 25))].any()  # stomach gas


def test_int16_gives_what_float32_gives(healthy):
    hu, _, mask = healthy
    rounded = lung_mask(np.round(hu).astype(np.int16), SPACING, "case")
    assert dice(rounded, mask) > 0.9999  # rounding moves voxels within 0.5 HU of the threshold


@pytest.mark.parametrize(
    ("centre", "radius"),
    [
        ((20, 0, -80), (30, 30, 30)),  # inside the lung
        ((10, 0, -125), (40, 45, 40)),  # broad, on the chest wall
        ((10, 60, 85), (25, 30, 30)),  # at the back, where fluid collects
        ((60, 0, 40), (20, 20, 20)),  # beside the mediastinum
    ],
)
def test_consolidations_stay_inside_and_the_heart_outside(centre, radius):
    hu, lungs, heart = chest((centre, radius))
    consolidation = ellipsoid(centre, radius) & lungs
    assert (hu[consolidation] > -300).all()
    mask = lung_mask(hu, SPACING, "case")
    # The cap beyond the chord of a wall this curved is lost: up to 6 % of the broadest one.
    assert mask[consolidation].mean() > 0.93
    assert mask[heart].mean() < 0.1
    assert dice(mask, lungs) > 0.97


@pytest.mark.parametrize("padding", [-3024, -2000, -1024])
def test_padding_outside_a_circular_field_is_no_air(padding):
    hu, lungs, _ = chest()
    rows, columns = np.ogrid[: SHAPE[1], : SHAPE[2]]
    circle = (rows - 51.5) ** 2 + (columns - 63.5) ** 2 < 52**2
    hu[:, ~circle] = padding
    lungs[:, ~circle] = False
    mask = lung_mask(hu, SPACING, "case")
    assert dice(mask, lungs) > 0.97


def test_a_field_of_view_that_cuts_the_body_and_a_lung():
    hu, lungs, _ = chest()
    cut = (slice(None), slice(22, 84), slice(26, 100))  # the right lung loses its outer 10 mm
    assert lungs[:, :, 26].any()
    mask = lung_mask(np.ascontiguousarray(hu[cut]), SPACING, "case")
    assert dice(mask, lungs[cut]) > 0.95


def test_one_lung_alone_is_found():
    hu, lungs, _ = chest()
    left = lungs & (np.arange(SHAPE[2]) > 63)
    hu[left] = 30
    assert dice(lung_mask(hu, SPACING, "case"), lungs & ~left) > 0.97


def test_thin_voxels_are_decided_at_their_own_resolution():
    hu, lungs, _ = chest()
    fine = np.repeat(np.repeat(hu, 4, 1), 4, 2)[:, 40:380]
    truth = np.repeat(np.repeat(lungs, 4, 1), 4, 2)[:, 40:380]
    mask = lung_mask(fine, (5.0, 0.875, 0.875), "case")
    assert mask.shape == fine.shape
    assert dice(mask, truth) > 0.97


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_patient_gives_the_mirrored_mask(axis, healthy):
    """Axis 1 is a prone patient with the couch in front."""
    hu, _, mask = healthy
    mirrored = lung_mask(np.ascontiguousarray(np.flip(hu, axis)), SPACING, "case")
    assert dice(np.flip(mirrored, axis), mask) > 0.99  # ties between the two lungs may fall apart


@pytest.mark.parametrize("axes", ["RAS", "PIR"])
def test_the_mask_does_not_depend_on_the_orientation_of_the_file(tmp_path, axes, healthy):
    hu, _, mask = healthy
    image = nib.Nifti1Image(hu.T, np.diag([-3.5, -3.5, 5.0, 1.0]))
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn.astype(int).tolist()), tmp_path / "scan.nii")
    scan = load_scan(tmp_path / "scan.nii")
    np.testing.assert_array_equal(find_lungs(scan), mask)


def test_no_lung_is_one_line_that_names_the_scan_and_the_flag():
    water = np.full(SHAPE, 40.0, np.float32)
    with pytest.raises(InputError, match=r"case_7: found 0 ml of lung.*--lung_mask") as raised:
        lung_mask(water, SPACING, "case_7")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="found 0 ml"):
        lung_mask(np.full(SHAPE, -1000.0, np.float32), SPACING, "case_7")
    water[20:30, 40:50, 40:50] = -850  # 61 ml
    with pytest.raises(InputError, match=r"found \d\d ml of lung, expected at least 200 ml"):
        lung_mask(water, SPACING, "case_7")


def test_images_that_are_not_hu_need_a_lung_mask():
    with pytest.raises(InputError, match=r"case: .*'unit'.*--lung_mask"):
        find_lungs(as_scan(np.zeros(SHAPE, np.float32)), "unit")


def test_the_lungmask_package_is_preferred_and_its_failure_is_told(monkeypatch, healthy):
    hu, lungs, built_in = healthy
    package = types.ModuleType("lungmask")
    monkeypatch.setitem(sys.modules, "lungmask", package)

    class Works:
        def __init__(self, tqdm_disable):
            assert tqdm_disable

        def apply(self, image):
            assert image.min() >= -1024
            return np.where(lungs, 1 + (np.arange(SHAPE[2]) > 63), 0).astype(np.uint8)

    monkeypatch.setattr(package, "LMInferer", Works, raising=False)
    np.testing.assert_array_equal(find_lungs(as_scan(hu)), lungs)

    def no_weights(tqdm_disable):
        raise OSError("no network")

    monkeypatch.setattr(package, "LMInferer", no_weights)
    with pytest.warns(UserWarning, match=r"case: lungmask failed \(OSError: no network\)"):
        mask = find_lungs(as_scan(hu))
    np.testing.assert_array_equal(mask, built_in)


def test_phantom_lungs_and_their_consolidations():
    """Phantoms 4, 49 and 28 hold consolidations of about 200 ml, the others small ones or none."""
    kept = total = 0
    for index in (0, 2, 4, 7, 28, 49):
        phantom = make_phantom(7, index)
        mask = lung_mask(phantom.hu, phantom.spacing_mm, f"phantom {index}")
        assert dice(mask, phantom.lung_mask) > 0.97
        consolidation = phantom.lesion_mask & (phantom.hu > -300)
        kept += (consolidation & mask).sum()
        total += consolidation.sum()
    assert total > 0
    assert kept / total >= 0.95


@needs_real_data
@pytest.mark.parametrize("case", ["case_000", "case_001"])
def test_dice_against_radiotherapy_contours(case):
    scan = load_scan(REAL_DATA / "lctsc" / f"{case}_image.nii.gz")
    truth = load_mask(REAL_DATA / "lctsc" / f"{case}_lung.nii.gz", scan, "lung mask")
    assert dice(lung_mask(scan.values, scan.spacing_mm, scan.name), truth) > 0.97


@needs_real_data
def test_stomach_and_oesophagus_full_of_air_are_no_lung():
    scan = load_scan(REAL_DATA / "covid-ct-md" / "cap001.nii.gz")
    mask = lung_mask(scan.values, scan.spacing_mm, scan.name)
    litres = mask.sum() * np.prod(scan.spacing_mm) / 1e6
    assert 5.9 < litres < 6.5  # 6.23 where the outline was looked at
    assert (scan.values[:30][mask[:30]] < -980).mean() < 0.02  # stomach gas lies in these slices
    assert not (scan.values[157][mask[157]] < -960).any()  # trachea and oesophagus in this one
