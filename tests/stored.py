"""A store of random scans, for tests that read batches."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data import store, writing
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, WorkingGrid


class Scan(NamedTuple):
    """A scan of random voxels; with a lesion, if its class has any and the lesions are known."""

    split: str
    label: int
    depth: int
    lesions_known: bool = True


def write(folder: pathlib.Path, data: DataConfig, scans: Sequence[Scan]) -> store.Store:
    """A store of `scans`, in order, on the working grid of `data`."""
    records = []
    for seed, scan in enumerate(scans):
        rng, shape = np.random.default_rng(seed), (scan.depth, *data.working_size)
        lung = rng.random(shape) < 0.7
        lesion = np.zeros(shape, bool)
        if scan.lesions_known and scan.label != data.lesion_free_id:
            lesion[scan.depth // 2, 3:5, 4:6] = True
        volume = rng.uniform(0.1, 0.9, shape).astype(np.float32) * lung
        grid = WorkingGrid(shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), shape)
        name, mask = f"scan-{seed}", folder / "mask.nii.gz" if scan.lesions_known else None
        case = Case(name, name, scan.split, scan.label, folder / f"{name}.nii.gz", mask)
        records.append(writing.write_case(folder, case, Prepared(volume, lung, lesion, grid)))
    store.write_index(folder, data, records, folder)
    return store.Store(folder, data)
