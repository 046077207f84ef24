"""How one array is stored: zarr v3, its chunks in one file, each with a checksum."""

import hashlib
import math
import mmap
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from deepsc_jax.runtime.types import JsonObject

DTYPES = {
    "volume": "uint16",
    "lesion": "uint8",
    "lung": "uint8",
    "classes": "uint8",
    "lesion_voxels": "int16",
}
LEVELS = 65535
"""Volumes are stored as this times what they are."""


def kvstore(path: str, child: str) -> ts.KvStore.Spec:
    """`child` of the folder at `path`, or of what tensorstore takes for one by its URL."""
    if "://" in path:
        return ts.KvStore.Spec(path.rstrip("/") + "/") / child
    root = {"driver": "file", "path": f"{pathlib.Path(path).absolute()}/"}
    return ts.KvStore.Spec(root) / child


def array_spec(
    place: ts.KvStore.Spec, name: str, shape: Sequence[int], chunk: Sequence[int]
) -> JsonObject:
    """The array `name` of a case at `place`, of one shard; chunks are clipped to the array."""
    sides = [max(side, 1) for side in shape]
    chunk = [max(min(c, s), 1) for c, s in zip(chunk, sides, strict=True)]
    shard = [-(-s // c) * c for s, c in zip(sides, chunk, strict=True)]
    dtype = DTYPES[name]
    compression = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle"}
    checked = {"name": "crc32c"}
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {
        "name": "blosc",
        "configuration": compression | {"typesize": np.dtype(dtype).itemsize},
    }
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunk,
            "codecs": [plain, blosc, checked],
            "index_codecs": [plain, checked],
        },
    }
    return {
        "driver": "zarr3",
        "kvstore": place.to_json(),
        # Chunks of zeros are stored, so that one that is not there is known for lost.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [sharding],
        },
    }


def write_array(
    folder: pathlib.Path, name: str, values: np.ndarray, chunk: Sequence[int]
) -> tuple[dict[str, tuple[int, str]], str]:
    """Write the array `name` of the case at `folder`.

    Returns:
      Size and SHA-256 of its files, by path; and its `seal`, "" of one that has no shard.

    Raises:
      OSError: it cannot be written.
    """
    spec = array_spec(kvstore(str(folder), f"{name}/"), name, values.shape, chunk)
    try:
        ts.open(spec, create=True, delete_existing=True).result().write(values).result()
    except ValueError as error:
        raise _os_error(error, folder / name) from error
    shard = shard_name(name, values.ndim)
    contents = {
        file: (folder / file).read_bytes()
        for file in [f"{name}/zarr.json"] + ([shard] if values.size else [])
    }
    sums = {k: (len(v), hashlib.sha256(v).hexdigest()) for k, v in contents.items()}
    return sums, seal(contents[shard], chunks(values.shape, chunk)) if values.size else ""


def shard_name(name: str, axes: int) -> str:
    """The file of an array's chunks, below its case's folder."""
    return "/".join([name, "c"] + ["0"] * axes)


def chunks(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """How many chunks an array has."""
    return math.prod(-(-max(s, 1) // max(min(c, s), 1)) for s, c in zip(shape, chunk, strict=True))


def seal(shard: bytes | mmap.mmap, count: int) -> str:
    """A digest of what tells a shard of `count` chunks from another: their places and checksums.

    A chunk's CRC-32C says that it is whole, not that it is this array's. To read them all costs a
    tenth of what a sum of all bytes does, or less.

    Raises:
      ValueError: it is no such shard.
    """
    begin = len(shard) - 16 * count - 4  # each chunk's place and size, and the CRC-32C of these
    if begin < 0:
        raise ValueError("it is too short")
    ends = np.frombuffer(shard[begin:-4], "<u8").reshape(count, 2).sum(axis=1)
    there = (ends >= 4) & (ends <= begin)  # of a chunk that is not there the end is beyond
    last = np.where(there, ends, 4).astype(np.int64)[:, None] - np.arange(4, 0, -1)
    checksums = np.frombuffer(shard, np.uint8)[last] * there[:, None]
    return hashlib.sha256(shard[begin:] + checksums.tobytes()).hexdigest()


def reason(error: Exception) -> str:
    """What tensorstore says, without its specifications."""
    return " ".join(str(error).partition(" [")[0].split())


def _os_error(error: ValueError, path: pathlib.Path) -> OSError:
    """What tensorstore says of a failed write, as Python would."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
        return OSError(str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))
