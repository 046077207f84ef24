"""The arrays of one case, written into a store."""

import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data import occupancy
from deepsc_jax.data.arrays import DTYPES, LEVELS, write_array
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, intensity_of
from deepsc_jax.data.records import Ints3, StoredCase

CHUNK: Ints3 = (16, 64, 64)
SAMPLED_VOXELS = 2000


def write_case(
    folder: pathlib.Path,
    case: Case,
    prepared: Prepared,
    chunk: Ints3 = CHUNK,
    sums: Mapping[str, str] | None = None,
    lesion_free: int = DataConfig().lesion_free_id,
) -> StoredCase:
    """Write a case's arrays below `folder`, the store, and return its record for the index.

    Args:
      folder: of the store.
      case: what is stored.
      prepared: its arrays.
      chunk: of the arrays.
      sums: `sums.source_sum` of its sources, by the names of `records.SOURCES`.
      lesion_free: the class whose scans have no lesion.

    Raises:
      OSError: the arrays cannot be written.
    """
    shape = prepared.volume.shape
    if not (prepared.volume.min() >= 0 and prepared.volume.max() <= 1):
        raise ValueError(f"{case.name}: volume is not within [0, 1]")
    lesion = np.zeros(shape, bool) if prepared.lesion is None else prepared.lesion
    arrays = {
        "volume": np.rint(prepared.volume * np.float32(LEVELS)),
        "lesion": lesion,
        "lung": prepared.lung,
        "lesion_voxels": sample_lesion_voxels(lesion, case.name),
    }
    if prepared.classes is not None:
        arrays["classes"] = prepared.classes
    files: dict[str, tuple[int, str]] = {}
    seals: dict[str, str] = {}
    for name, array in arrays.items():
        sums_of_files, seals[name] = write_array(
            folder / "cases" / case.name,
            name,
            array.astype(DTYPES[name]),
            chunk if array.ndim == 3 else array.shape,
        )
        files |= sums_of_files
    depth, height, width = shape
    return StoredCase(
        name=case.name,
        patient=case.patient,
        split=case.split,
        label=case.label,
        shape=(depth, height, width),
        chunk=chunk,
        grid=prepared.grid,
        spacing_mm=prepared.spacing_mm,
        scan=case.scan,
        lesion_mask=case.lesion_mask,
        lung_mask=case.lung_mask,
        lesions_known=case.lesion_mask is not None or case.label == lesion_free,
        lesion_voxels=int(lesion.sum()),
        lung_voxels=int(prepared.lung.sum()),
        intensity=intensity_of(prepared.volume),
        lung_blocks=occupancy.pack(prepared.lung),
        sums=dict(sums or {}),
        files=files,
        seals=seals,
        boxes=case.boxes,
        targets=case.targets,
    )


def sample_lesion_voxels(lesion: np.ndarray, name: str) -> np.ndarray:
    """Up to `SAMPLED_VOXELS` distinct voxels of `lesion`, (N, 3), in order; fixed by `name`."""
    voxels = np.flatnonzero(lesion)
    if voxels.size > SAMPLED_VOXELS:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        voxels = np.sort(rng.choice(voxels, SAMPLED_VOXELS, replace=False))
    return np.stack(np.unravel_index(voxels, lesion.shape), axis=-1)
