"""SHA-256 sums of the files that a case is made from, so that a change of theirs is seen."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping

from deepsc_jax.runtime.errors import InputError


def source_sum(path: pathlib.Path) -> str:
    """The sum of a file; of a folder of DICOM slices, of its files' sums, whatever their names.

    Hidden files of a folder are left out: file browsers leave them there, and GDCM skips them.

    Raises:
      InputError: missing, not to be read, neither file nor folder, or changed meanwhile.
    """
    try:
        if not path.is_dir():
            return _file_sum(path)
        with os.scandir(path) as entries:
            files = [e.path for e in entries if not e.name.startswith(".") and e.is_file()]
        sums = sorted(_file_sum(pathlib.Path(file)) for file in files)
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


def _file_sum(path: pathlib.Path) -> str:
    # Before it is opened: a FIFO would wait for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path}: not a regular file, a scan or a mask expected: check the path")
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        found = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while it was read: try again when it is written")
    return found
