"""SHA-256 sums of the files that a case is made from, so that a change of theirs is seen."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping

from deepsc_jax.data.content import content_files
from deepsc_jax.runtime.errors import InputError


def source_sum(path: pathlib.Path) -> str:
    """The sum of a file; of several that make a source, of their sums, whatever their names.

    Which files those are: `content.content_files`.

    Raises:
      InputError: missing, not to be read, neither file nor folder, or changed meanwhile.
    """
    try:
        parts = content_files(path)
        if parts == [path]:
            return _file_sum(path)
        sums = sorted(map(_file_sum, parts))
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
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while it was read: try again when it is written")
    return digest
