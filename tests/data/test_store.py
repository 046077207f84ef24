"""The store: exact reads of any box, few bytes for a small one, and refusals."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorstore as ts

from deepsc_jax.config import DataConfig
from deepsc_jax.data import records, store, writing
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.runtime.errors import InputError

SHAPE = (37, 48, 40)
CHUNK = (8, 16, 16)
DATA = DataConfig(working_size=(48, 40), tile=(16, 16, 8))
SUMS = {"scan": "5ca", "lesion_mask": "1e5"}
GRID = WorkingGrid(SHAPE, (0.0, 0.1, -2.0), (1.0, 4 / 3, 2.5), (37, 64, 100))


def lesion() -> np.ndarray:
    return prepared().lung & (np.random.default_rng(9).random(SHAPE) < 0.2)


def prepared(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Prepared:
    rng = np.random.default_rng(seed)
    lung = rng.random(shape) < 0.8
    volume = rng.random(shape, np.float32) * lung
    volume[0, 0, :2] = 0, 1
    return Prepared(volume, lung, None, GRID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("out")
    partial = out / "store.partial"
    partial.mkdir()
    one = Case("one", "p", "train", 0, out / "scans/one.nii.gz", out / "m.nii.gz")
    two = Case("two", "q", "test", 2, pathlib.Path("/elsewhere/two.nii.gz"))
    with_lesions = dataclasses.replace(prepared(), lesion=lesion())
    records = [
        writing.write_case(partial, one, with_lesions, CHUNK, SUMS),
        writing.write_case(partial, two, prepared(1), CHUNK),
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
        opened.read_slices("one", indices),
        np.rint(opened.read("one", "volume")[indices] * 65535).astype(np.uint16),
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
    assert lesion().sum() > writing.SAMPLED_VOXELS
    assert voxels.shape == (writing.SAMPLED_VOXELS, 3)
    assert len(np.unique(voxels, axis=0)) == writing.SAMPLED_VOXELS
    assert lesion()[tuple(voxels.T)].all()
    np.testing.assert_array_equal(voxels, writing.sample_lesion_voxels(lesion(), "one"))
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


@pytest.mark.parametrize(("lacks", "read"), [("slices", True), ("hu_window", False)])
def test_a_store_of_before_an_option_was_is_read_where_that_decides_nothing_stored(
    folder, tmp_path, lacks, read
):
    shutil.copytree(folder, tmp_path / "store")
    index = tmp_path / "store" / "index.json"
    text = index.read_bytes()
    made_with = json.loads(text)["data"]
    without = {name: value for name, value in made_with.items() if name != lacks}
    before, after = (json.dumps(document).encode() for document in (made_with, without))
    body = text[: text.rstrip(b"\n").rfind(b"\n") + 1].replace(before, after)
    index.write_bytes(body + b'"sha256": "%b"}\n' % hashlib.sha256(body).hexdigest().encode())
    if read:
        assert store.Store(tmp_path / "store").data.slices == DataConfig().slices
    else:
        with pytest.raises(InputError, match=r"not an index of this version .*hu_window missing"):
            store.Store(tmp_path / "store")


def test_refuses_folders_that_are_no_store(folder, tmp_path):
    with pytest.raises(InputError, match="no index"):
        store.Store(tmp_path / "absent")
    for text, words in [("{", "not JSON"), ('{"version": 0}', "version 0"), ("[]", "version None")]:
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(InputError, match=words):
            store.Store(tmp_path)
    document = json.loads((folder / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(document | {"phantoms": True}))
    with pytest.raises(InputError, match=r"index.json: changed since it was written"):
        store.Store(tmp_path)
    shutil.copy(folder / "index.json", tmp_path)
    with pytest.raises(InputError, match=r"cases/one/volume/zarr.json: missing .* \(and 14 more"):
        store.Store(tmp_path)


@pytest.fixture
def copied(folder, tmp_path) -> pathlib.Path:
    """A copy of the store, to be damaged."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy/store"))


def test_a_truncated_or_missing_file_is_refused_at_open_and_named(copied):
    file = copied / "cases/one/volume/c/0/0/0"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    words = f"cases/one/volume/c/0/0/0: damaged \\({size - 100} bytes found, {size} expected\\)"
    with pytest.raises(InputError, match=words):
        store.Store(copied)
    file.unlink()
    with pytest.raises(InputError, match=r"cases/one/volume/c/0/0/0: missing .*prepare it again"):
        store.Store(copied)
    with pytest.raises(InputError, match=r"cases/one/volume/c/0/0/0: missing"):
        store.Store(copied.as_uri())
    assert store.Store(copied, complete=False).damage() == [
        f"{copied}/cases/one/volume/c/0/0/0: missing"
    ]


def test_a_file_that_goes_missing_later_is_not_read_as_zeros(copied):
    opened = store.Store(copied)
    (copied / "cases/one/lesion/c/0/0/0").unlink()
    with pytest.raises(InputError, match=r"cases/one/lesion: missing or damaged"):
        opened.read("one", "lesion", (0, 0, 0), (1, 1, 1))


def test_chunks_of_zeros_are_stored(folder):
    # The index of a shard says -1 for the place and size of a chunk that is not stored.
    shard = (folder / "cases/two/lesion/c/0/0/0").read_bytes()
    entries = np.frombuffer(shard[-4 - 5 * 3 * 3 * 16 : -4], np.int64)
    assert (entries >= 0).all()


def everything(opened: store.Store) -> dict[str, np.ndarray]:
    """All that is read of a store, whole."""
    found = {}
    for case in opened.cases():
        for array in ("volume", "lesion", "lung"):
            found[f"{case.name}/{array}"] = opened.read(case.name, array)
        found[f"{case.name}/voxels"] = opened.lesion_voxels(case.name)
    return found


def test_of_900_flipped_bits_all_are_found_and_none_changes_a_voxel(tmp_path):
    made = prepared(shape=(9, 20, 24))
    masked = dataclasses.replace(made, lesion=made.lung & (made.volume > 0.8))
    case = Case("one", "p", "train", 0, tmp_path / "one.nii.gz")
    store.write_index(tmp_path, DATA, [writing.write_case(tmp_path, case, masked)], tmp_path)
    expected = everything(store.Store(tmp_path))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(20)
    # Half of them over all bytes, half over the files, for most bytes are the volume's.
    places = [
        *rng.choice(len(files), 450, p=sizes / sizes.sum()),
        *rng.integers(len(files), size=450),
    ]
    opening = reading = verifying = 0
    for place in places:
        path, sound = files[place], files[place].read_bytes()
        damaged = bytearray(sound)
        damaged[rng.integers(len(sound))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        if path.name == "index.json":
            with pytest.raises(InputError, match=r"index.json: "):
                store.Store(tmp_path)
            opening += 1
        elif path.name == "zarr.json":  # is there for other programs
            opened = store.Store(tmp_path)
            for name, array in everything(opened).items():
                np.testing.assert_array_equal(array, expected[name])
            (line,) = opened.damage()
            assert line.startswith(f"{path}: not as it was written")
            verifying += 1
        else:
            opened = store.Store(tmp_path)
            name = str(path.relative_to(tmp_path)).partition("/c/")[0]
            with pytest.raises(
                InputError, match=f"{name}: (missing or damaged|not as it was written)"
            ):
                everything(opened)
            (line,) = opened.damage()
            assert line.startswith(f"{path}: not as it was written")
            reading += 1
        path.write_bytes(sound)
    assert opening + reading + verifying == 900
    assert min(opening, reading, verifying) > 50
    assert store.Store(tmp_path).damage() == []


def test_an_exchanged_volume_is_seen(folder, copied):
    one, two = (copied / f"cases/{name}/volume/c/0/0/0" for name in ("one", "two"))
    shutil.copy(two, one)
    with pytest.raises(InputError, match=r"cases/one/volume/c/0/0/0: damaged \("):
        store.Store(copied)


def test_a_volume_exchanged_for_another_of_equal_size_is_seen_when_it_is_read(tmp_path):
    """Chunks of less than 128 bytes are not compressed, so that all such volumes have one size."""
    case = Case("one", "p", "train", 0, tmp_path / "one.nii.gz")
    shape, chunk = (4, 8, 8), (2, 4, 4)
    lung, grid = np.ones(shape, bool), dataclasses.replace(GRID, shape=shape)
    for seed, name in enumerate(("store", "other")):
        noise = np.random.default_rng(seed).random(shape, np.float32)
        record = writing.write_case(tmp_path / name, case, Prepared(noise, lung, None, grid), chunk)
        store.write_index(tmp_path / name, DATA, [record], tmp_path / name)
    mine, theirs = (tmp_path / f"{n}/cases/one/volume/c/0/0/0" for n in ("store", "other"))
    store.Store(tmp_path / "store").read("one", "volume")
    assert mine.stat().st_size == theirs.stat().st_size
    shutil.copy(theirs, mine)
    opened = store.Store(tmp_path / "store")
    for read in (
        lambda: opened.read("one", "volume", (0, 0, 0), (1, 1, 1)),
        lambda: opened.read_slices("one", np.array([3])),
    ):
        with pytest.raises(InputError, match=r"cases/one/volume: not as it was written: copy it"):
            read()
    assert opened.read("one", "lung").all()


def test_a_store_without_seals_is_read(folder, copied):
    """As earlier versions wrote it."""
    (line,) = (text for text in [(copied / "index.json").read_text()] if '"seals"' in text)
    document = json.loads(line)
    for record in document["cases"]:
        del record["seals"]
    cases = [records.record_from_json(record, copied.parent) for record in document["cases"]]
    store.write_index(copied, DATA, cases, copied)
    np.testing.assert_array_equal(
        store.Store(copied).read("one", "volume"), store.Store(folder).read("one", "volume")
    )


def test_a_store_of_other_content_has_another_digest(tmp_path):
    def digest(seed: int) -> str:
        partial = tmp_path / "store"
        shutil.rmtree(partial, ignore_errors=True)
        case = Case("one", "p", "train", 0, tmp_path / "one.nii.gz")
        made = dataclasses.replace(prepared(), volume=prepared().lung * np.float32(seed / 4))
        record = writing.write_case(partial, case, made)
        store.write_index(partial, DATA, [record], partial)
        return store.Store(partial).digest

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_refuses_a_volume_that_is_not_normalised(tmp_path):
    made = prepared()
    made.volume[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not within"):
        writing.write_case(tmp_path, Case("a", "p", "train", 0, tmp_path), made)
