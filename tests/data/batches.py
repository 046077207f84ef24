"""A small store, and its batches as they travel and as a network sees them."""

import dataclasses
import functools
import itertools
import pathlib

import jax
import numpy as np

from deepsc_jax.config import Config, DataConfig, TrainConfig
from deepsc_jax.data import pipeline, store, writing
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.systems.decoding import decode

# What the stages of a joint network read.
STAGES = {
    "segmentation": Reads(tiles="drawn"),
    "classification": Reads(slices=True),
    "joint": Reads(tiles="all", slices=True),
}
HEIGHT, WIDTH = 32, 48
TILE = (8, 16, 24)
PLAIN = TrainConfig(tiles_per_scan=5, flip_probability=0, intensity_shift=0, intensity_scale=0)
CONFIG = Config(
    model=Options(),
    data=DataConfig(working_size=(HEIGHT, WIDTH), tile=TILE, slices=12, depth_bucket=16),
    train=PLAIN,
)
FLIPPED = dataclasses.replace(CONFIG, train=dataclasses.replace(PLAIN, flip_probability=1.0))
AUGMENTED = dataclasses.replace(CONFIG, train=TrainConfig(tiles_per_scan=5, intensity_scale=0.2))
DECODE = {
    stage: jax.jit(functools.partial(decode, reads=reads, data=CONFIG.data, train=PLAIN))
    for stage, reads in STAGES.items()
}
# Name, split, label, depth, whether a lesion mask is given.
CASES = [
    ("a", "train", 0, 21, True),
    ("b", "train", 1, 5, True),
    ("c", "train", 2, 16, False),
    ("d", "train", 0, 17, True),
    ("e", "train", 1, 30, False),
    *((f"t{i}", "test", i % 3, 6 + i, True) for i in range(5)),
]


def write(out: pathlib.Path) -> store.Store:
    """A store of random voxels below `out`."""
    records = []
    for seed, (name, split, label, depth, drawn) in enumerate(CASES):
        rng = np.random.default_rng(seed)
        shape = (depth, HEIGHT, WIDTH)
        lung = rng.random(shape) < 0.7
        lesion = np.zeros(shape, bool)
        if drawn and label < 2:
            lesion[depth // 2, 3:5, 40:42] = True
        volume = rng.uniform(0.1, 0.9, shape).astype(np.float32) * lung
        grid = WorkingGrid(shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), shape)
        mask = out / "m.nii.gz" if drawn else None
        case = Case(name, f"p{name}", split, label, out / f"{name}.nii.gz", mask)
        records.append(writing.write_case(out, case, Prepared(volume, lung, lesion, grid)))
    store.write_index(out, CONFIG.data, records, out)
    return store.Store(out, cache_mib=64)


def sent(opened, count, stage, config=CONFIG, *, seed=7, batch_size=2, **keywords):
    """Batches as they travel."""
    batches = pipeline.batches(
        opened, "train", STAGES[stage], config, seed=seed, batch_size=batch_size, **keywords
    )
    return list(itertools.islice(batches, count))


def take(opened, count, stage, config=CONFIG, **keywords):
    """Batches as a network sees them."""
    return [as_seen(batch, stage) for batch in sent(opened, count, stage, config, **keywords)]


def as_seen(batch, stage):
    return jax.device_get(DECODE[stage](batch))


def scan_of(opened, batch, row):
    """Name and padded arrays of the training case in a batch's row, known by its depth."""
    (case,) = [c for c in opened.cases("train") if c.depth == batch["depth"][row]]
    assert batch["label"][row] == case.label
    box = ((0, 0, 0), (64, HEIGHT, WIDTH))
    return (
        case.name,
        opened.read(case.name, "volume", *box),
        opened.read(case.name, "lesion", *box),
    )


def crop(array, origin):
    z, y, x = origin
    return array[z : z + TILE[0], y : y + TILE[1], x : x + TILE[2]]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
