"""The store: exact reads of any box, few bytes for a small one, and refusals."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorstore as ts

from deepsc_jax.config import DataConfig
from deepsc_jax.data import store
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.runtime.errors import InputError

SHAPE = (37, 48, 40)
CHUNK = (8, 16, 16)
DATA = DataConfig(working_size=(48, 40), tile=(16, 16, 8))
GRID = WorkingGrid(SHAPE, (0.0, 0.1, -2.0), (1.0, 4 / 3, 2.5), (37, 64, 100))


def lesion() -> np.ndarray:
    return prepared().lung & (np.random.default_rng(9).random(SHAPE) < 0.2)


def prepared(seed: int = 0) -> Prepared:
    rng = np.random.default_rng(seed)
    lung = rng.random(SHAPE) < 0.8
    volume = rng.random(SHAPE, np.float32) * lung
    volume[0, 0, :2] = 0, 1
    return Prepared(volume, lung, None, GRID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("out")
    partial = out / "store.partial"
    partial.mkdir()
    one = Case("one", "p", "train", 0, out / "scans/one.nii.gz", out / "m.nii.gz")
    two = Case("two", "q", "test", 2, pathlib.Path("/elsewhere/two.nii.gz"))
    records = [
        store.write_case(partial, one, dataclasses.replace(prepared(), lesion=lesion()), CHUNK),
        store.write_case(partial, two, prepared(1), CHUNK),
    ]
    store.write_index(partial, DATA, records, out / "store")
    return partial.rename(out / "store")


def test_volume_is_kept_to_half_a_level_and_masks_exactly(folder):
    opened, made = store.Store(folder, DATA), prepared()
    volume = opened.read("one", "volume")
    assert volume.dtype == np.float32
    # Half a level of 1/65535, and float32's rounding of a number below 1.
    np.testing.assert_allclose(volume, made.volume, rtol=0, atol=0.5 / 65535 + 6e-8)
    assert volume[0, 0, 0] == 0
    assert volume[0, 0, 1] == 1
    np.testing.assert_array_equal(opened.read("one", "lesion"), lesion())
    np.testing.assert_array_equal(opened.read("one", "lung"), made.lung)


def test_boxes_that_reach_outside_are_filled_with_zeros(folder):
    opened = store.Store(folder)
    whole = np.pad(opened.read("one", "volume"), 50)
    for start in [(0, 0, 0), (30, 40, 33), (-5, -3, 12), (40, 0, 0), (-20, 60, 0)]:
        z, y, x = start
        box = opened.read("one", "volume", start, (z + 9, y + 11, x + 13))
        a, b, c = z + 50, y + 50, x + 50
        np.testing.assert_array_equal(box, whole[a : a + 9, b : b + 11, c : c + 13])


def test_slices_may_repeat(folder):
    opened = store.Store(folder)
    indices = np.array([3, 3, 0, 36])
    np.testing.assert_array_equal(
        opened.read_slices("one", indices), opened.read("one", "volume")[indices]
    )


def test_records_say_what_is_stored(folder):
    one, two = store.Store(folder).cases()
    made = prepared()
    assert (one.name, one.patient, one.split, one.label) == ("one", "p", "train", 0)
    assert (one.shape, one.depth, one.grid) == (SHAPE, 37, GRID)
    assert (one.lesion_voxels, one.lung_voxels) == (lesion().sum(), made.lung.sum())
    assert (one.scan, one.lesion_mask) == (
        folder.parent / "scans/one.nii.gz",
        folder.parent / "m.nii.gz",
    )
    assert (two.scan, two.lesion_mask) == (pathlib.Path("/elsewhere/two.nii.gz"), None)
    assert (one.lesions_known, two.lesions_known, two.lesion_voxels) == (True, True, 0)
    assert [case.name for case in store.Store(folder).cases("test")] == ["two"]


def test_sampled_lesion_voxels_are_distinct_lesion_voxels_and_fixed(folder):
    opened = store.Store(folder)
    voxels = opened.lesion_voxels("one")
    assert lesion().sum() > store.SAMPLED_VOXELS
    assert voxels.shape == (store.SAMPLED_VOXELS, 3)
    assert len(np.unique(voxels, axis=0)) == store.SAMPLED_VOXELS
    assert lesion()[tuple(voxels.T)].all()
    np.testing.assert_array_equal(voxels, store.sample_lesion_voxels(lesion(), "one"))
    assert opened.lesion_voxels("two").shape == (0, 3)


def file_reads() -> tuple[int, int]:
    """Files read and bytes read by tensorstore so far in this process."""
    counts = {
        metric["name"].rsplit("/", 1)[1]: metric["values"][0]["value"]
        for metric in ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/")
        if metric["name"].endswith(("batch_read", "bytes_read"))
    }
    return counts["batch_read"], counts["bytes_read"]


def test_a_small_box_reads_only_the_chunks_it_touches(folder):
    opened = store.Store(folder)
    opened.read("one", "volume", (0, 0, 0), (1, 1, 1))  # opens the array
    _, before = file_reads()
    opened.read("one", "volume", (8, 16, 16), (16, 32, 32))
    _, after = file_reads()
    chunks = 5 * 3 * 3
    index = chunks * 16 + 4
    noise = np.prod(CHUNK) * 2  # random numbers hardly compress: an upper bound of one chunk
    assert 0 < after - before < index + 1.1 * noise


def test_the_cache_spares_the_second_read(folder):
    opened = store.Store(folder, cache_mib=16)
    opened.read("one", "volume")
    before = file_reads()
    opened.read("one", "volume", (3, 3, 3), (20, 20, 20))
    assert file_reads() == before


def test_refuses_other_preprocessing_but_not_other_reading(folder):
    other = DataConfig(working_size=(48, 40), tile=(16, 16, 8), hu_window=(-1000.0, 200.0))
    with pytest.raises(InputError, match=r"hu_window=-1400,200.*--hu_window=-1000,200"):
        store.Store(folder, other)
    store.Store(folder, DataConfig(working_size=(48, 40), tile=(8, 8, 8), slices=3, depth_bucket=8))


def test_refuses_folders_that_are_no_store(folder, tmp_path):
    with pytest.raises(InputError, match="no index"):
        store.Store(tmp_path / "absent")
    for text, words in [("{", "not JSON"), ('{"version": 0}', "version 0"), ("[]", "version None")]:
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(InputError, match=words):
            store.Store(tmp_path)
    document = json.loads((folder / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(document | {"data": {"colour": 3}}))
    with pytest.raises(InputError, match="prepare again"):
        store.Store(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"cases/one/volume: missing or damaged"):
        store.Store(tmp_path).read("one", "volume")


def test_a_truncated_array_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "store")
    file = tmp_path / "store/cases/one/volume/c/0/0/0"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cases/one/volume: missing or damaged"):
        store.Store(tmp_path / "store").read("one", "volume")


def test_refuses_a_volume_that_is_not_normalised(tmp_path):
    made = prepared()
    made.volume[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not within"):
        store.write_case(tmp_path, Case("a", "p", "train", 0, tmp_path), made)
