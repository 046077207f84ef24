"""What a store's index says of each case, and the index as text that cannot change unseen."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data.datasets import relative_path
from deepsc_jax.data.preprocess import WorkingGrid
from deepsc_jax.data.sums import meanwhile
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject

Ints3 = tuple[int, int, int]

VERSION = 5
_LATER = {"seals": {}, "boxes": [], "targets": []}  # what stores of earlier versions lack
SOURCES = ("scan", "lesion_mask", "lung_mask")


@dataclasses.dataclass(frozen=True)
class StoredCase:
    """A case's record in the index.

    Attributes:
      name, patient, split, label: as in `datasets.Case`.
      shape: (D, H, W) of the working arrays, D its true depth.
      chunk: of these arrays.
      grid: where the working voxels lie in the source.
      spacing_mm: of a working voxel.
      scan, lesion_mask, lung_mask: source files, absolute; a mask is None where none was given.
      lesions_known: whether the stored lesion mask is the truth: drawn, or of the lesion-free
        class.
      lesion_voxels, lung_voxels: voxels of each on the working grid.
      intensity: `intensity_of` the stored volume.
      lung_blocks: where its lungs are, as `occupancy.pack` says it.
      sums: `sums.source_sum` of the sources, by attribute; of those that are compared later.
      files: size and SHA-256 of what is stored, by path below the case's folder.
      seals: `arrays.seal` of each array; none in stores of earlier versions.
      boxes: around lesions, in pixels of the source; none in stores of earlier versions.
      targets: the case's indicators, in the order of `DataConfig.indicators`.
    """

    name: str
    patient: str
    split: str
    label: int
    shape: Ints3
    chunk: Ints3
    grid: WorkingGrid
    spacing_mm: tuple[float, float, float]
    scan: pathlib.Path
    lesion_mask: pathlib.Path | None
    lung_mask: pathlib.Path | None
    lesions_known: bool
    lesion_voxels: int
    lung_voxels: int
    intensity: tuple[float, float, float]
    lung_blocks: str
    sums: dict[str, str]
    files: dict[str, tuple[int, str]]
    seals: dict[str, str] = dataclasses.field(default_factory=dict)
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    targets: tuple[float, ...] = ()

    @property
    def depth(self) -> int:
        """The number of slices of the working arrays."""
        return self.shape[0]

    def sources(self) -> dict[str, pathlib.Path]:
        """The source files that there are, by the names of `SOURCES`."""
        paths = {kind: getattr(self, kind) for kind in SOURCES}
        return {kind: path for kind, path in paths.items() if path is not None}

    @contextlib.contextmanager
    def unchanged_sources(self) -> Iterator[None]:
        """While its sources are read, see whether they are what the case was made from.

        Raises:
          InputError: one is missing, or has changed, whatever the reader made of it.
        """
        advice = "put it back as it was, or prepare again with --overwrite"
        for kind, path in self.sources().items():
            if not os.path.exists(path):
                raise InputError(
                    f"{self.name}: its {kind.replace('_', ' ')} {path} is gone since it was "
                    f"prepared: {advice}"
                )
        with meanwhile(self.sources()) as sums:
            try:
                yield
            finally:
                for kind, now in sums.result().items():
                    if self.sums.get(kind, now) != now:
                        raise InputError(
                            f"{self.name}: its {kind.replace('_', ' ')} {self.sources()[kind]} has "
                            f"changed since it was prepared (another SHA-256): {advice}"
                        )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a store's scans are.

    Attributes:
      phantoms: whether they are phantoms; what is trained on the store will say so.
      lesion_contrast: of phantoms: how often lesions differ from lungs as they do; 1 is physical.
    """

    phantoms: bool = False
    lesion_contrast: float = 1.0

    def text(self, modality: str) -> str:
        """As every report of what was trained or scored on them says it."""
        kind = "X-ray" if modality == "xray" else ""
        if not self.phantoms:
            return f"{kind}s" if kind else "scans"
        text = f"{kind} phantoms".strip()
        if kind or self.lesion_contrast != 1:
            text += f", lesion contrast {self.lesion_contrast:g}"
        return text


SCANS = Contents()


def record_to_json(case: StoredCase, base: pathlib.Path) -> JsonObject:
    """A record as the index has it; source paths inside `base` become relative to it."""
    grid = {
        field.name: np.asarray(getattr(case.grid, field.name)).tolist()
        for field in dataclasses.fields(WorkingGrid)
    }
    paths = {name: relative_path(getattr(case, name), base) for name in SOURCES}
    record = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return record | paths | {"depth": case.depth, "grid": grid}


def record_from_json(record: JsonObject, base: pathlib.Path) -> StoredCase:
    """What `record_to_json` made. Raises KeyError, TypeError or ValueError if it did not."""
    fields = [f.name for f in dataclasses.fields(StoredCase) if f.name not in _LATER]
    values = {name: record[name] for name in fields} | {
        name: record.get(name, default) for name, default in _LATER.items()
    }
    values["boxes"] = tuple(map(tuple, values["boxes"]))
    for name in SOURCES:
        values[name] = base / values[name] if values[name] else None
    least, mean, deviation = values["intensity"]
    values["intensity"] = (float(least), float(mean), float(deviation))
    for name in ("shape", "chunk", "spacing_mm", "targets"):
        values[name] = tuple(values[name])
    values["grid"] = WorkingGrid(**{k: tuple(v) for k, v in values["grid"].items()})
    values["files"] = {name: (size, digest) for name, (size, digest) in values["files"].items()}
    return StoredCase(**values)


def index_bytes(
    data: DataConfig, cases: Sequence[StoredCase], base: pathlib.Path, *, contents: Contents
) -> bytes:
    """The index as JSON; its last line is the SHA-256 of all before it."""
    records = ",\n".join(json.dumps(record_to_json(case, base)) for case in cases)
    made_with = json.dumps(dataclasses.asdict(data))
    made_of = ",\n".join(
        f'"{name}": {json.dumps(value)}' for name, value in dataclasses.asdict(contents).items()
    )
    head = f'"version": {VERSION},\n{made_of},\n"data": {made_with}'
    return _summed(f'{{{head},\n"cases": [\n{records}\n],\n'.encode())


def parse_index(text: bytes, place: str) -> JsonObject:
    """An index as `index_bytes` wrote it.

    Raises:
      InputError: not an index, of another version, or changed since.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}): prepare again") from error
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise InputError(
            f"{place}: version {version} found, {VERSION} expected: prepare again with --overwrite"
        )
    body = text[: text.rstrip(b"\n").rfind(b"\n") + 1]
    if text != _summed(body):
        raise InputError(
            f"{place}: changed since it was written (its last line is not the SHA-256 of the "
            "others): copy the store again, or prepare again"
        )
    return document


def _summed(body: bytes) -> bytes:
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
