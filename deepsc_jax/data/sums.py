"""SHA-256 sums of the files that a case is made from, so that a change of theirs is seen."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping

from deepsc_jax.runtime.errors import InputError

# In a header of NRRD or MetaImage: the file of the voxels.
_DATA_FILE = re.compile(rb"^(?:data ?file:|ElementDataFile *=)[ \t]*([^\r\n]*\S)", re.I | re.M)


def source_sum(path: pathlib.Path) -> str:
    """The sum of a file; of several that make a source, of their sums, whatever their names.

    Several are the slices in a folder of DICOM, a pair .hdr and .img, and a header that names the
    file of its voxels.

    Raises:
      InputError: missing, not to be read, neither file nor folder, or changed meanwhile.
    """
    try:
        parts = _parts(path)
        if parts == [path]:
            return _file_sum(path)
        sums = sorted(map(_file_sum, parts))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: check the path") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}): check its permissions and its disk"
        ) from error
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


@contextlib.contextmanager
def meanwhile(
    sources: Mapping[str, pathlib.Path],
) -> Iterator["concurrent.futures.Future[dict[str, str]]"]:
    """Sum files in a thread while they are also read: so their bytes come from the disk once."""

    def all_sums() -> dict[str, str]:
        return {kind: source_sum(path) for kind, path in sources.items()}

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(all_sums)


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a source."""
    if path.is_dir():
        with os.scandir(path) as entries:
            # File browsers leave hidden files behind, and GDCM does not read them.
            return [path / e.name for e in entries if not e.name.startswith(".") and e.is_file()]
    suffix, other = path.suffix.lower(), None
    if suffix in (".hdr", ".img"):
        pair = {path.with_suffix(each) for each in (".hdr", ".img", ".HDR", ".IMG")}
        return sorted({path, *(part for part in pair if part.is_file())})
    if suffix in (".nhdr", ".mhd"):
        _require_regular(path)
        with path.open("rb") as file:
            other = _DATA_FILE.search(file.read(1 << 16))
    if other is None or not (data := path.parent / os.fsdecode(other[1])).is_file():
        return [path]  # if it names a file that is not there, its reader says so
    return [path, data]


def _require_regular(path: pathlib.Path) -> None:
    """Raise InputError if it is a FIFO or the like, before opening it waits for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path}: not a regular file, a scan or a mask expected: check the path")


def _file_sum(path: pathlib.Path) -> str:
    _require_regular(path)
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while it was read: try again when it is written")
    return digest
