"""Preprocessed scans on disk, so that training reads only the voxels it uses.

A store is a folder:

    index.json                what it was made with, and one record per case
    cases/NAME/volume         (D, H, W) uint16: the masked, normalised scan times 65535
    cases/NAME/lesion         (D, H, W) uint8, 0 or 1
    cases/NAME/lung           (D, H, W) uint8, 0 or 1
    cases/NAME/lesion_voxels  (N, 3) int16: up to `SAMPLED_VOXELS` lesion voxels, to centre tiles on

Each array is a zarr v3 array of one file (a shard) whose chunks are read on their own: a reader
fetches the chunks it touches, from a local disk or an object store, and a thousand scans are a few
thousand files, not millions. Volumes are 16-bit fixed point: the same size as float16, but with an
error of 0.012 HU everywhere (of a 1600 HU window) where float16 errs by 0.4 HU near 1; 0 and 1 are
exact, so what is masked stays 0.
"""

import dataclasses
import hashlib
import json
import pathlib
import threading
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from deepsc_jax.config import CLASSES, DataConfig
from deepsc_jax.config.options import from_document
from deepsc_jax.data.datasets import SPLITS, Case, relative_path
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.runtime.errors import InputError

ArrayName = Literal["volume", "lesion", "lung"]
Ints3 = tuple[int, int, int]

VERSION = 2
CHUNK: Ints3 = (16, 64, 64)
SAMPLED_VOXELS = 2000
_LEVELS = 65535

# The fields of DataConfig that decide nothing about what is stored, only how it is read.
READ_FIELDS = frozenset({"tile", "slices", "depth_bucket"})


@dataclasses.dataclass(frozen=True)
class StoredCase:
    """A case's record in the index.

    Attributes:
      name, patient, split, label: as in `datasets.Case`.
      shape: (D, H, W) of the working arrays, D its true depth.
      grid: where the working voxels lie in the source.
      scan, lesion_mask, lung_mask: source files, absolute; a mask is None where none was given.
      lesion_voxels, lung_voxels: voxels of each on the working grid.
    """

    name: str
    patient: str
    split: str
    label: int
    shape: Ints3
    grid: WorkingGrid
    scan: pathlib.Path
    lesion_mask: pathlib.Path | None
    lung_mask: pathlib.Path | None
    lesion_voxels: int
    lung_voxels: int

    @property
    def depth(self) -> int:
        """The number of slices of the working arrays."""
        return self.shape[0]

    @property
    def lesions_known(self) -> bool:
        """Whether the stored lesion mask is the truth: drawn, or of a lesion-free class."""
        return self.lesion_mask is not None or CLASSES[self.label] == "non-pneumonia"


def write_case(
    folder: pathlib.Path, case: Case, prepared: Prepared, chunk: Ints3 = CHUNK
) -> StoredCase:
    """Write a case's arrays below `folder`, the store, and return its record for the index."""
    shape = prepared.volume.shape
    if not (prepared.volume.min() >= 0 and prepared.volume.max() <= 1):
        raise ValueError(f"{case.name}: volume is not within [0, 1]")
    lesion = np.zeros(shape, bool) if prepared.lesion is None else prepared.lesion
    root = ts.KvStore.Spec(_root(folder)) / f"cases/{case.name}/"
    arrays = {
        "volume": np.rint(prepared.volume * np.float32(_LEVELS)).astype(np.uint16),
        "lesion": lesion.astype(np.uint8),
        "lung": prepared.lung.astype(np.uint8),
        "lesion_voxels": sample_lesion_voxels(lesion, case.name).astype(np.int16),
    }
    for name, array in arrays.items():
        spec = _array_spec(root / name, array, chunk if array.ndim == 3 else array.shape)
        ts.open(spec, create=True, delete_existing=True).result().write(array).result()
    depth, height, width = shape
    return StoredCase(
        name=case.name,
        patient=case.patient,
        split=case.split,
        label=case.label,
        shape=(depth, height, width),
        grid=prepared.grid,
        scan=case.scan,
        lesion_mask=case.lesion_mask,
        lung_mask=case.lung_mask,
        lesion_voxels=int(lesion.sum()),
        lung_voxels=int(prepared.lung.sum()),
    )


def sample_lesion_voxels(lesion: np.ndarray, name: str) -> np.ndarray:
    """Up to `SAMPLED_VOXELS` distinct voxels of `lesion`, (N, 3), in order; fixed by `name`."""
    voxels = np.flatnonzero(lesion)
    if voxels.size > SAMPLED_VOXELS:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        voxels = np.sort(rng.choice(voxels, SAMPLED_VOXELS, replace=False))
    return np.stack(np.unravel_index(voxels, lesion.shape), axis=-1)


def write_index(
    folder: pathlib.Path,
    data: DataConfig,
    cases: Sequence[StoredCase],
    final: pathlib.Path,
    *,
    phantoms: bool = False,
) -> None:
    """Write `folder`/index.json: the last step before `folder` is renamed to `final`.

    Source paths inside the folder that holds `final` are stored relative to it. `phantoms` says
    that the scans are phantoms; what is trained on the store will say so.
    """
    base = final.absolute().parent
    records = ",\n".join(json.dumps(record_to_json(case, base)) for case in cases)
    made_with = json.dumps(dataclasses.asdict(data))
    head = f'"version": {VERSION},\n"phantoms": {json.dumps(phantoms)},\n"data": {made_with}'
    text = f'{{{head},\n"cases": [\n{records}\n]}}\n'
    (folder / "index.json").write_text(text, encoding="utf-8")


class Store:
    """A store, open for reading. Safe to use from several threads.

    Args:
      path: its folder, or the URL of one (`gs://...`, `s3://...`) as tensorstore spells it.
      data: the configuration of the run; None takes whatever the store was made with.
      cache_mib: MiB of decoded chunks kept in memory; 0 keeps none.

    Attributes:
      data: the configuration it was made with.
      phantoms: whether its scans are phantoms.
      digest: SHA-256 of its index: another one is another store.

    Raises:
      InputError: not a store, or made with other preprocessing than `data` asks for.
    """

    def __init__(
        self, path: str | pathlib.Path, data: DataConfig | None = None, cache_mib: int = 0
    ):
        self.path = str(path)
        document = self._read_index()
        base = pathlib.Path(path).absolute().parent
        try:
            self.data: DataConfig = from_document(DataConfig, document["data"])
            self.phantoms = bool(document["phantoms"])
            self._cases = [record_from_json(record, base) for record in document["cases"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}/index.json: not an index of this version ({error!r}): prepare again"
            ) from error
        if data is not None:
            self.require(data)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_mib * 2**20}})
        self._open: dict[tuple[str, str], ts.TensorStore] = {}
        self._lock = threading.Lock()

    def cases(self, split: str | None = None) -> list[StoredCase]:
        """The cases of a split, or all of them, in the order of the case list."""
        if split is None:
            return list(self._cases)
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return [case for case in self._cases if case.split == split]

    def require(self, data: DataConfig) -> None:
        """Raise InputError if `data` asks for other preprocessing than the store was made with.

        How scans are read (`READ_FIELDS`) is free.
        """
        for field in dataclasses.fields(DataConfig):
            made, asked = getattr(self.data, field.name), getattr(data, field.name)
            if field.name not in READ_FIELDS and made != asked:
                raise InputError(
                    f"{self.path}: made with {field.name}={_flag_text(made)}, this run says "
                    f"--{field.name}={_flag_text(asked)}: use the store's value or prepare again"
                )

    def read(
        self, case: str, array: ArrayName, start: Ints3 | None = None, stop: Ints3 | None = None
    ) -> np.ndarray:
        """The box from `start` up to `stop`, all of the array by default.

        What lies outside of the array is 0. Returns float32 in [0, 1] for `volume`, else uint8.
        """
        shape = self._array(case, array).shape
        start = (0, 0, 0) if start is None else start
        stop = (shape[0], shape[1], shape[2]) if stop is None else stop
        size = (stop[0] - start[0], stop[1] - start[1], stop[2] - start[2])
        return self.read_boxes(case, array, [start], size)[0]

    def read_boxes(
        self, case: str, array: ArrayName, starts: Sequence[Ints3] | np.ndarray, size: Ints3
    ) -> np.ndarray:
        """Boxes of one size, (len(starts), *size), fetched together; otherwise as `read`."""
        source = self._array(case, array)
        boxes = np.zeros((len(starts), *size), np.float32 if array == "volume" else np.uint8)
        pending = []
        for box, start in zip(boxes, np.asarray(starts, int), strict=True):
            low = np.clip(start, 0, source.shape)
            high = np.clip(start + np.asarray(size), low, source.shape)
            inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            wanted = tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
            pending.append((box[inside], source[wanted].read()))
        for target, future in pending:
            target[...] = _decode(self._result(future, case, array), array)
        return boxes

    def read_slices(self, case: str, indices: np.ndarray) -> np.ndarray:
        """Whole slices of the volume, (len(indices), H, W) float32 in [0, 1], repeats allowed."""
        unique, place = np.unique(indices, return_inverse=True)
        future = self._array(case, "volume")[unique].read()
        return _decode(self._result(future, case, "volume"), "volume")[place]

    def lesion_voxels(self, case: str) -> np.ndarray:
        """Up to `SAMPLED_VOXELS` lesion voxels, (N, 3) int32."""
        future = self._array(case, "lesion_voxels").read()
        return np.asarray(self._result(future, case, "lesion_voxels"), np.int32)

    def _array(self, case: str, array: str) -> ts.TensorStore:
        with self._lock:
            found = self._open.get((case, array))
            if found is None:
                spec = {
                    "driver": "zarr3",
                    "kvstore": _kvstore(self.path, f"cases/{case}/{array}/").to_json(),
                    # A finished store does not change: what was read once needs no second look.
                    "recheck_cached_data": False,
                    "recheck_cached_metadata": False,
                }
                opening = ts.open(spec, open=True, read=True, context=self._context)
                found = self._open[case, array] = self._result(opening, case, array)
        return found

    def _result(self, future: ts.Future, case: str, array: str) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self.path}/cases/{case}/{array}: missing or damaged: copy it again, or prepare "
                "the store again"
            ) from error

    def _read_index(self) -> dict[str, Any]:
        try:
            read = ts.KvStore.open(_kvstore(self.path, "")).result().read("index.json").result()
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path}: cannot be read ({error}): check the path") from error
        if read.state != "value":
            raise InputError(
                f"{self.path}: no index.json found, so this is not a store: make one with "
                "python -m deepsc_jax.prepare"
            )
        try:
            document = json.loads(read.value)
            self.digest = hashlib.sha256(read.value).hexdigest()
        except ValueError as error:
            raise InputError(
                f"{self.path}/index.json: not JSON ({error}): prepare again"
            ) from error
        found = document.get("version") if isinstance(document, dict) else None
        if found != VERSION:
            raise InputError(
                f"{self.path}/index.json: version {found} found, {VERSION} expected: prepare again"
            )
        return document


def _root(folder: pathlib.Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder.absolute()}/"}


def _kvstore(path: str, child: str) -> ts.KvStore.Spec:
    if "://" in path:
        return ts.KvStore.Spec(path.rstrip("/") + "/") / child
    return ts.KvStore.Spec(_root(pathlib.Path(path))) / child


def _array_spec(
    kvstore: ts.KvStore.Spec, array: np.ndarray, chunk: Sequence[int]
) -> dict[str, Any]:
    """A zarr v3 array of one shard; chunks are clipped to the array."""
    shape = [max(side, 1) for side in array.shape]
    chunk = [max(min(c, s), 1) for c, s in zip(chunk, shape, strict=True)]
    shard = [-(-s // c) * c for s, c in zip(shape, chunk, strict=True)]
    compression = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle"}
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": compression | {"typesize": array.itemsize}},
    ]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": chunk, "codecs": codecs},
    }
    return {
        "driver": "zarr3",
        "kvstore": kvstore.to_json(),
        "metadata": {
            "shape": list(array.shape),
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [sharding],
        },
    }


def _decode(values: Any, array: ArrayName) -> np.ndarray:
    if array != "volume":
        return np.asarray(values)
    return np.divide(values, np.float32(_LEVELS), dtype=np.float32)


def _flag_text(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def record_to_json(case: StoredCase, base: pathlib.Path) -> dict[str, Any]:
    """A record as the index has it; source paths inside `base` become relative to it."""
    grid = {
        field.name: np.asarray(getattr(case.grid, field.name)).tolist()
        for field in dataclasses.fields(WorkingGrid)
    }
    paths = {
        name: relative_path(getattr(case, name), base)
        for name in ("scan", "lesion_mask", "lung_mask")
    }
    record = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return record | paths | {"label": CLASSES[case.label], "depth": case.depth, "grid": grid}


def record_from_json(record: dict[str, Any], base: pathlib.Path) -> StoredCase:
    """What `record_to_json` made. Raises KeyError, TypeError or ValueError if it did not."""
    values = {name: record[name] for name in (f.name for f in dataclasses.fields(StoredCase))}
    for name in ("scan", "lesion_mask", "lung_mask"):
        values[name] = base / values[name] if values[name] else None
    values["label"] = CLASSES.index(values["label"])
    values["shape"] = tuple(values["shape"])
    values["grid"] = WorkingGrid(**{k: tuple(v) for k, v in values["grid"].items()})
    return StoredCase(**values)
