"""What a batch is said to hold, and that the pipeline's batches hold just that."""

import itertools
import pathlib

import numpy as np
import pytest
import stored
from stored import Scan

from deepsc_jax.config import Config, DataConfig, TrainConfig
from deepsc_jax.data import augment, pipeline
from deepsc_jax.data import batch as batches
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.store import Store
from deepsc_jax.models.deepsc.config import Options

CONFIG = Config(
    model=Options(),
    data=DataConfig(working_size=(32, 48), tile=(8, 16, 24), slices=12, depth_bucket=16),
    train=TrainConfig(tiles_per_scan=5),
)
EVERY = [
    Reads(tiles, slices)
    for tiles, slices in itertools.product(("none", "drawn", "all"), (False, True))
]
every_reads = pytest.mark.parametrize("reads", EVERY, ids=str)
FLOAT, INT, BOOL = (np.dtype(kind) for kind in ("float32", "int32", "bool"))
LEVELS, BYTE = np.dtype("uint16"), np.dtype("uint8")
Described = dict[str, tuple[tuple[int, ...], np.dtype]]


def described(fields: dict[str, batches.Field]) -> Described:
    return {name: (field.shape, field.dtype) for name, field in fields.items()}


FACTS: Described = {"depth": ((), INT), "label": ((), INT)}
TILES: Described = {
    "tiles": ((7, 8, 16, 24), FLOAT),
    "lesions": ((7, 8, 16, 24), FLOAT),
    "origins": ((7, 3), INT),
}
SLICES: Described = {"slices": ((12, 32, 48), FLOAT)}
AUGMENTATION: Described = {"augmentation": ((augment.SIZE,), FLOAT)}
EVALUATION: Described = {"valid": ((), BOOL), "case": ((), INT)}
# What travels, by the tiles that are read.
TRAVELS: dict[str, Described] = {
    "none": {},
    "drawn": {
        "tiles": ((7, 8, 16, 24), LEVELS),
        "lesions": ((7, 8, 16, 24), BYTE),
        "origins": ((7, 3), INT),
    },
    "all": {
        "volume": ((4, 8, 32, 48), LEVELS),
        "lesion": ((4, 8, 32, 48), BYTE),
        "origins": ((7, 3), INT),
    },
}


@every_reads
def test_a_system_sees_what_its_stage_reads(reads: Reads):
    expected = (TILES if reads.tiles != "none" else {}) | (SLICES if reads.slices else {}) | FACTS
    found = described(batches.seen(reads, CONFIG.data, 7))
    assert found == expected
    assert list(found) == list(expected)


@every_reads
def test_scans_travel_once_and_as_they_are_stored(reads: Reads):
    expected = dict(TRAVELS[reads.tiles])
    if reads.slices and reads.tiles != "all":
        expected["slices"] = ((12, 32, 48), LEVELS)
    found = described(batches.fields(reads, CONFIG.data, 7, 32))
    assert found == expected | FACTS | AUGMENTATION
    found = described(batches.fields(reads, CONFIG.data, 7, 32, evaluation=True))
    assert found == expected | FACTS | EVALUATION


def test_drawn_tiles_that_move_travel_with_a_margin():
    found = batches.fields(Reads("drawn"), CONFIG.data, 7, 0, margin=(1, 2, 3))
    assert found["tiles"].shape == found["lesions"].shape == (7, 10, 20, 30)
    assert found["starts"] == batches.Field((7, 3), INT)


def test_a_fields_bytes_are_those_of_one_example():
    found = batches.fields(Reads("all", slices=True), CONFIG.data, 2, 16)
    assert found["volume"].nbytes == 16 * 32 * 48 * 2
    assert found["lesion"].nbytes == 16 * 32 * 48
    assert found["origins"].nbytes == 2 * 3 * 4
    assert found["depth"].nbytes == 4


def test_depth_is_an_axis_of_scans_tiles_and_slices():
    slabs, tiles = ("volume", "lesion", "class_map"), ("tiles", "lesions", "classes")
    expected = dict.fromkeys((*slabs, *tiles), 2) | {"slices": 1}
    assert expected == batches.DEPTH_AXES
    arrays = batches.zeros(Reads("all", slices=True), CONFIG.data, batch=3)
    axes = {name: axis for name, axis in batches.DEPTH_AXES.items() if name in arrays}
    depths = {name: arrays[name].shape[axis] for name, axis in axes.items()}
    assert depths == {"tiles": 8, "lesions": 8, "slices": 12}


def test_only_tiles_come_with_lesions_and_an_evaluation_reads_all_of_them():
    assert [reads.lesions for reads in EVERY] == [False, False, True, True, True, True]
    assert Reads("drawn", slices=True).whole() == Reads("all", slices=True)
    assert Reads("drawn").whole() == Reads("all").whole() == Reads("all")
    assert Reads("none", slices=True).whole() == Reads("none", slices=True)


@pytest.mark.parametrize(("depth", "padded"), [(1, 16), (16, 16), (17, 32), (40, 48)])
def test_tiles_are_counted_by_what_is_read(depth: int, padded: int):
    for slices in (False, True):
        assert batches.count_tiles(Reads("none", slices), CONFIG, depth) == 0
        assert batches.count_tiles(Reads("drawn", slices), CONFIG, depth) == 5
        # Of 8 x 16 x 24 voxels, in 32 x 48 voxels and a depth in buckets of 16.
        assert batches.count_tiles(Reads("all", slices), CONFIG, depth) == padded // 8 * 2 * 2


@every_reads
def test_zeros_are_scans_of_one_tile(reads: Reads):
    found = batches.zeros(reads, CONFIG.data, batch=3)
    assert {name: (x.shape[1:], x.dtype) for name, x in found.items()} == described(
        batches.seen(reads, CONFIG.data, 1)
    )
    assert {len(x) for x in found.values()} == {3}
    assert found.pop("depth").tolist() == [8, 8, 8]
    assert not any(x.any() for x in found.values())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Scans of one, two and three buckets; the deepest is of training alone."""
    folder: pathlib.Path = tmp_path_factory.mktemp("store")
    scans = [Scan("train", 0, 40), Scan("train", 1, 5), Scan("train", 2, 16)]
    scans += [Scan("validation", label, depth) for label, depth in enumerate((9, 30, 17))]
    return stored.write(folder, CONFIG.data, scans)


@pytest.mark.parametrize("split", ["train", "validation"])
@every_reads
def test_the_pipelines_batches_are_as_described(store: Store, reads: Reads, split: str):
    evaluation = split == "validation"
    dataset = pipeline.batches(
        store,
        split,
        reads,
        CONFIG,
        seed=0,
        batch_size=2,
        train=not evaluation,
        read_threads=0,
    )
    read = reads.whole() if evaluation else reads
    shapes = []
    for bucket in dataset.buckets:
        tiles = bucket.tiles or batches.count_tiles(read, CONFIG, bucket.depth)
        fields = batches.fields(read, CONFIG.data, tiles, bucket.depth, evaluation=evaluation)
        shapes.append({name: ((2, *field.shape), field.dtype) for name, field in fields.items()})
    taken = list(itertools.islice(iter(dataset), 3))
    assert len(taken) == (2 if evaluation else 3)  # an evaluation ends, and is filled up
    for batch in taken:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} in shapes
