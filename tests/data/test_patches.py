"""Where patches are cut, and what is in them."""

import dataclasses

import numpy as np
import pytest
from smallest_cnncf import PATCHES

from deepsc_jax.config import DataConfig
from deepsc_jax.data import patches
from deepsc_jax.data.images import Box
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.runtime.errors import InputError

DATA = dataclasses.replace(
    PATCHES, frame_size=(48, 64), working_size=(16, 16), tile=(1, 16, 16), indicators=()
)


def prepared(depth: int, lesion: np.ndarray | None = None, scale: float = 1.0) -> Prepared:
    """A case whose voxels all differ; its source has `scale` times the sides."""
    shape = (depth, 48, 64)
    volume = np.linspace(0.1, 1, depth * 48 * 64, dtype=np.float32).reshape(shape)
    source = (depth, int(48 * scale), int(64 * scale))
    grid = WorkingGrid(shape, (0.0, 0.0, 0.0), (1.0, scale, scale), source)
    return Prepared(volume, np.ones(shape, bool), lesion, grid)


def lesion_of(depth: int, *places: tuple[int, int, int, int, int]) -> np.ndarray:
    mask = np.zeros((depth, 48, 64), bool)
    for at, top, left, bottom, right in places:
        mask[at, top:bottom, left:right] = True
    return mask


def test_without_patches_a_case_stays_as_it_is() -> None:
    case = prepared(2)
    assert patches.cut(case, DataConfig()) is case


def test_a_window_is_about_the_middle_of_its_box_and_0_past_the_frame() -> None:
    case = prepared(1)
    found = patches.cut(case, DATA, [(16, 20, 32, 40), (0, 0, 16, 10)])
    assert found.volume.shape == (2, 16, 16)
    np.testing.assert_array_equal(found.volume[0], case.volume[0, 16:32, 22:38])
    np.testing.assert_array_equal(found.volume[1][:, 3:], case.volume[0, :16, :13])
    assert not found.volume[1][:, :3].any()
    assert found.lung[1][:, 3:].all()
    assert not found.lung[1][:, :3].any()


def test_boxes_are_in_the_sources_pixels() -> None:
    once = patches.cut(prepared(1), DATA, [(8, 20, 30, 44)])
    twice = patches.cut(prepared(1, scale=2), DATA, [(16, 40, 60, 88)])
    np.testing.assert_array_equal(once.volume, twice.volume)


def test_a_resized_box_fills_its_patch() -> None:
    resize = dataclasses.replace(DATA, patches="resize")
    case = prepared(1, lesion_of(1, (0, 8, 8, 40, 40)))
    found = patches.cut(case, resize, [(8, 8, 40, 40), (8, 8, 24, 24)])
    assert found.lesion is not None
    assert found.lesion[0].all()
    # Sixteen pixels a side are copied; twice as many have the mean level of their place.
    np.testing.assert_array_equal(found.volume[1], case.volume[0, 8:24, 8:24])
    inside = case.volume[0, 8:40, 8:40].reshape(16, 2, 16, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(found.volume[0][2:-2, 2:-2], inside[2:-2, 2:-2], atol=1e-5)


def test_each_lesion_of_a_picture_has_a_patch_the_largest_first() -> None:
    lesion = lesion_of(1, (0, 0, 0, 4, 4), (0, 20, 30, 40, 50), (0, 30, 2, 36, 10))
    found = patches.by_mask(lesion)
    assert [place.box for place in found] == [
        Box(20, 30, 40, 50),
        Box(25, 0, 41, 16),
        Box(0, 0, 16, 16),
    ]
    many = lesion_of(1, *((0, 0, 8 * i, 2, 8 * i + 3) for i in range(8)))
    assert len(patches.by_mask(many)) == patches.MOST


def test_a_scan_has_patches_evenly_over_the_volume_of_its_lesions() -> None:
    """100 voxels in slice 1, 400 in slice 6: of tenths 1, 3, 5, 7 and 9 the first is in slice 1."""
    lesion = lesion_of(9, (1, 4, 4, 14, 14), (6, 20, 20, 40, 38), (6, 0, 40, 4, 50))
    assert [place.depth for place in patches.by_mask(lesion)] == [1, 6]
    assert patches.by_mask(lesion)[1].box == Box(20, 20, 40, 38)
    even = lesion_of(10, *((i, 4, 4, 14, 14) for i in range(10)))
    assert [place.depth for place in patches.by_mask(even)] == [0, 2, 4, 6, 8]


def test_boxes_come_before_the_mask() -> None:
    case = prepared(1, lesion_of(1, (0, 20, 30, 40, 50)))
    by_box = patches.cut(case, DATA, [(0, 0, 16, 16)])
    np.testing.assert_array_equal(by_box.volume[0], case.volume[0, :16, :16])


@pytest.mark.parametrize("lesion", [None, np.zeros((1, 48, 64), bool)])
def test_a_case_without_a_lesion_is_refused(lesion: np.ndarray | None) -> None:
    said = r"no box and no lesion to cut patches of, at least 1 expected \(--patches=window\)"
    with pytest.raises(InputError, match=said):
        patches.cut(prepared(1, lesion), DATA)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": "lungs"}, "patches is window and mask is lungs"),
        ({"frame_size": (15, 64)}, "working_size is 16,16 and patches is window: give a square"),
        ({"working_size": (16, 32), "tile": (1, 16, 16)}, "working_size is 16,32 and patches"),
        ({"indicators": ("crp", "crp")}, "indicators is crp,crp: give names of small letters"),
        ({"indicators": ("C RP",)}, "indicators is C RP: give names of small letters"),
    ],
)
def test_what_cannot_be_cut_or_named_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(DATA, **changes)
