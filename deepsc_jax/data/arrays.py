"""How one array is stored: zarr v3, its chunks in one file, each with a checksum."""

import hashlib
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
) -> dict[str, tuple[int, str]]:
    """Write the array `name` of the case at `folder`; size and SHA-256 of its files, by path.

    Raises:
      OSError: it cannot be written.
    """
    spec = array_spec(kvstore(str(folder), f"{name}/"), name, values.shape, chunk)
    try:
        ts.open(spec, create=True, delete_existing=True).result().write(values).result()
    except ValueError as error:
        raise _os_error(error, folder / name) from error
    shard = "/".join(["c"] + ["0"] * values.ndim)
    contents = {
        file: (folder / file).read_bytes()
        for file in [f"{name}/zarr.json"] + ([f"{name}/{shard}"] if values.size else [])
    }
    return {k: (len(v), hashlib.sha256(v).hexdigest()) for k, v in contents.items()}


def reason(error: Exception) -> str:
    """What tensorstore says, without its specifications."""
    return " ".join(str(error).partition(" [")[0].split())


def _os_error(error: ValueError, path: pathlib.Path) -> OSError:
    """What tensorstore says of a failed write, as Python would."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
        return OSError(str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))
