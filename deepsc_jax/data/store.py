"""Preprocessed scans on disk, so that training reads only the voxels it uses.

A store is a folder:

    index.json                what it was made with, one record per case, and the sums of all files
    cases/NAME/volume         (D, H, W) uint16: the masked, normalised scan times 65535
    cases/NAME/lesion         (D, H, W) uint8, 0 or 1
    cases/NAME/lung           (D, H, W) uint8, 0 or 1
    cases/NAME/classes        (D, H, W) uint8: ids of voxels' classes, of scans that are not masked
    cases/NAME/lesion_voxels  (N, 3) int16: up to `SAMPLED_VOXELS` lesion voxels, to centre tiles on

Each array is a zarr v3 array of one file (a shard) whose chunks are read on their own: a reader
fetches the chunks it touches, from a local disk or an object store, and a thousand scans are a few
thousand files, not millions. Volumes are 16-bit fixed point: the same size as float16, but with an
error of 0.012 HU everywhere (of a 1600 HU window) where float16 errs by 0.4 HU near 1; 0 and 1 are
exact, so what is masked stays 0.

Damage is found. Every chunk carries a CRC-32C, which is compared when it is read; chunks of zeros
are stored like others, so that a lost one is not taken for zeros. A missing or shortened file is
refused when the store is opened, one that was exchanged for another when it is first read, and
`damage` compares the SHA-256 of every file.
"""

import concurrent.futures
import copy
import dataclasses
import hashlib
import mmap
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import tensorstore as ts

from deepsc_jax.config import DataConfig
from deepsc_jax.config.options import from_document
from deepsc_jax.data import folds
from deepsc_jax.data.arrays import (
    DTYPES,
    LEVELS,
    array_spec,
    chunks,
    kvstore,
    reason,
    seal,
    shard_name,
)
from deepsc_jax.data.datasets import SPLITS
from deepsc_jax.data.records import (
    SCANS,
    Contents,
    Ints3,
    StoredCase,
    index_bytes,
    parse_index,
    record_from_json,
)
from deepsc_jax.data.writing import SAMPLED_VOXELS
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.names import counted
from deepsc_jax.runtime.progress import Progress
from deepsc_jax.runtime.types import JsonObject, Untyped

ArrayName = Literal["volume", "lesion", "lung", "classes"]


# The fields of DataConfig that decide nothing about what is stored, only how it is read. A store of
# before one of them was thought of lacks it, and is read as ever.
READ_FIELDS = frozenset(
    {
        "allow",
        "intensity_mean",
        "intensity_sd",
        "tile",
        "slices",
        "depth_bucket",
        "depth_buckets",
    }
)


LATER_FIELDS = frozenset({"modality", "working_slices", "patches", "frame_size", "indicators"})


def _completed(document: JsonObject) -> JsonObject:
    """What a store was made with, and the defaults of those `READ_FIELDS` that it lacks.

    Of before `LATER_FIELDS` were thought of, stores are what their defaults say.
    """
    defaults = dataclasses.asdict(DataConfig())
    lacking = {name: defaults[name] for name in (READ_FIELDS | LATER_FIELDS) - document.keys()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in lacking.items()} | document


def write_index(
    folder: pathlib.Path,
    data: DataConfig,
    cases: Sequence[StoredCase],
    final: pathlib.Path,
    *,
    contents: Contents = SCANS,
) -> None:
    """Write `folder`/index.json: the last step before `folder` is renamed to `final`.

    Source paths inside the folder that holds `final` are stored relative to it. `contents`
    says what the scans are.
    """
    text = index_bytes(data, cases, final.absolute().parent, contents=contents)
    with aside(folder / "index.json") as partial:
        partial.write_bytes(text)


class Store:
    """A store, open for reading. Safe to use from several threads.

    Args:
      path: its folder, or the URL of one (`gs://...`, `s3://...`) as tensorstore spells it.
      data: the configuration of the run; None takes whatever the store was made with.
      cache_mib: MiB of decoded chunks kept in memory; 0 keeps none.
      fold: `TrainConfig.folds`: by which training and validation are split anew.
      complete: refuse it if a file is missing, or, of a local store, shorter or longer than it was.

    Attributes:
      data: the configuration it was made with.
      contents: what its scans are, as reports say it: `scans`, `phantoms` and the like.
      digest: SHA-256 of its index, in which the sums of all files are: another one is another
        store, or the same with other content.

    Raises:
      InputError: not a store, incomplete, made with other preprocessing than `data` asks for, or of
        fewer patients than folds.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        data: DataConfig | None = None,
        cache_mib: int = 0,
        *,
        fold: tuple[int, int] | None = None,
        complete: bool = True,
    ):
        self.path = str(path)
        document = self._read_index()
        base = pathlib.Path(path).absolute().parent
        try:
            self.data: DataConfig = from_document(DataConfig, _completed(document["data"]))
            phantoms, contrast = bool(document["phantoms"]), document.get("lesion_contrast", 1.0)
            self.contents = Contents(phantoms, float(contrast)).text(self.data.modality)
            self._cases = [record_from_json(record, base) for record in document["cases"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.path}/index.json: not an index of this version ({error!r}): prepare again"
            ) from error
        if fold is not None:
            self._cases = folds.of_cases(self._cases, *fold)
        self._case = {case.name: case for case in self._cases}
        if data is not None:
            self.require(data)
        if complete:
            self._require_complete()
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

    def of_fold(self, index: int, count: int, *, held_out: bool) -> "Store":
        """The same store, of whose training split a fold is left, or all others.

        See `folds.of_training`. Other splits stay as they are.
        """
        part = copy.copy(self)
        part._cases = folds.of_training(self._cases, index, count, held_out=held_out)
        return part

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
        return _decode(self.read_boxes(case, array, [start], size)[0], array)

    def read_boxes(
        self, case: str, array: ArrayName, starts: Sequence[Ints3] | np.ndarray, size: Ints3
    ) -> np.ndarray:
        """Boxes of one size as they are stored, (len(starts), *size), fetched together.

        What lies outside of the array is 0. Returns uint16 for `volume`, else uint8.
        """
        source = self._array(case, array)
        boxes = np.zeros((len(starts), *size), DTYPES[array])
        pending = []
        for box, start in zip(boxes, np.asarray(starts, int), strict=True):
            low = np.clip(start, 0, source.shape)
            high = np.clip(start + np.asarray(size), low, source.shape)
            inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            wanted = tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
            # Chunks are unpacked to where they belong: no box is held a second time.
            pending.append(ts.array(box[inside]).write(source[wanted]))
        for future in pending:
            self._result(future, case, array)
        return boxes

    def read_slices(self, case: str, indices: np.ndarray) -> np.ndarray:
        """Slices of the volume as stored, (len(indices), H, W) uint16, repeats allowed."""
        unique, place = np.unique(indices, return_inverse=True)
        future = self._array(case, "volume")[unique].read()
        return np.asarray(self._result(future, case, "volume"))[place]

    def lesion_voxels(self, case: str) -> np.ndarray:
        """Up to `SAMPLED_VOXELS` lesion voxels, (N, 3) int32."""
        future = self._array(case, "lesion_voxels").read()
        return np.asarray(self._result(future, case, "lesion_voxels"), np.int32)

    def damage(self, workers: int = 8) -> list[str]:
        """A line for each file that is missing, or not as it was written; all bytes are read.

        Args:
          workers: threads.

        Raises:
          InputError: the store cannot be reached.
        """
        folder = ts.KvStore.open(kvstore(self.path, "")).result()

        def look(file: tuple[str, int, str]) -> str | None:
            name, _, expected = file
            try:
                read = folder.read(name).result()
            except (ValueError, OSError) as error:
                return f"{self.path}/{name}: cannot be read ({reason(error)})"
            if read.state != "value":
                return f"{self.path}/{name}: missing"
            if hashlib.sha256(read.value).hexdigest() != expected:
                return f"{self.path}/{name}: not as it was written (another SHA-256)"
            return None

        files, damaged = self.files(), []
        with (
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            Progress("verify", len(files)) as progress,
        ):
            for line in pool.map(look, files):
                progress.advance()
                damaged += [] if line is None else [line]
        return damaged

    def files(self) -> list[tuple[str, int, str]]:
        """Path below the store, size and SHA-256 of every file, the index apart."""
        return [
            (f"cases/{case.name}/{name}", size, expected)
            for case in self.cases()
            for name, (size, expected) in case.files.items()
        ]

    def _require_complete(self) -> None:
        wrong, files = [], self.files()
        if "://" in self.path:
            there = {
                k.decode() for k in ts.KvStore.open(kvstore(self.path, "")).result().list().result()
            }
            wrong = [f"{name}: missing" for name, _, _ in files if name not in there]
        else:
            for name, expected, _ in files:
                try:
                    size = os.stat(f"{self.path}/{name}").st_size
                except OSError as error:
                    wrong.append(f"{name}: missing ({error.strerror})")
                    continue
                if size != expected:
                    wrong.append(f"{name}: damaged ({size} bytes found, {expected} expected)")
        if wrong:
            others = f" (and {counted(len(wrong) - 1, 'more file')})" if len(wrong) > 1 else ""
            raise InputError(
                f"{self.path}/{wrong[0]}{others}: copy the store again, or prepare it again"
            )

    def _array(self, case: str, array: str) -> ts.TensorStore:
        with self._lock:
            opened = self._open.get((case, array))
            if opened is None:
                record = self._case[case]
                shape, chunk = record.shape, record.chunk
                if array == "lesion_voxels":
                    shape = chunk = (min(record.lesion_voxels, SAMPLED_VOXELS), 3)
                self._require_sealed(case, array, chunks(shape, chunk))
                place = kvstore(self.path, f"cases/{case}/{array}/")
                spec = array_spec(place, array, shape, chunk) | {
                    # zarr.json is there for other programs: a change of it changes nothing here.
                    "assume_metadata": True,
                    # A finished store does not change: what was read once needs no second look.
                    "recheck_cached_data": False,
                    "fill_missing_data_reads": False,
                }
                opening = ts.open(spec, read=True, context=self._context)
                opened = self._open[case, array] = self._result(opening, case, array)
        return opened

    def _require_sealed(self, case: str, array: str, count: int) -> None:
        """Raise InputError if a local array's file is another one, whole as it may be."""
        expected = self._case[case].seals.get(array, "")
        if not expected or "://" in self.path:
            return
        place = f"{self.path}/cases/{case}"
        path = f"{place}/{shard_name(array, 2 if array == 'lesion_voxels' else 3)}"
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                problem = "" if seal(data, count) == expected else "not as it was written"
        except (OSError, ValueError) as error:
            problem = f"missing or damaged ({error})"
        if problem:
            raise InputError(
                f"{place}/{array}: {problem}: copy it again, or prepare the store again"
            )

    def _result(self, future: ts.Future | ts.WriteFutures, case: str, array: str) -> Untyped:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self.path}/cases/{case}/{array}: missing or damaged ({reason(error)}): copy it "
                "again, or prepare the store again"
            ) from error

    def _read_index(self) -> JsonObject:
        try:
            read = ts.KvStore.open(kvstore(self.path, "")).result().read("index.json").result()
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({reason(error)}): check the path"
            ) from error
        if read.state != "value":
            raise InputError(
                f"{self.path}: no index.json found, so this is not a store: make one with "
                "python -m deepsc_jax.prepare"
            )
        self.digest = hashlib.sha256(read.value).hexdigest()
        return parse_index(read.value, f"{self.path}/index.json")


def _decode(values: np.ndarray, array: ArrayName) -> np.ndarray:
    if array != "volume":
        return np.asarray(values)
    return np.divide(values, np.float32(LEVELS), dtype=np.float32)


def _flag_text(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(v if isinstance(v, str) else f"{v:g}" for v in value)
