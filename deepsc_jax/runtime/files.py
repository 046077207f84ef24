"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import glob
import json
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from deepsc_jax.runtime.errors import InputError

_BESIDE = ("partial", "replaced")  # a folder's names before and after its own


@contextlib.contextmanager
def aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, beside `path`; renamed to it at the end, removed where that fails."""
    partial = path.with_name(f"partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, beside `path`; it takes the place of what is at `path` at the end.

    Of several processes that do so at once, each fills its own. The first to end removes what the
    others have beside `path`: it is what killed ones left there, or else will not be needed.
    """
    token = secrets.token_hex(4)
    partial, replaced = (path.with_name(f"{kind}-{token}-{path.name}") for kind in _BESIDE)
    partial.mkdir(parents=True)
    try:
        yield partial
        while True:
            try:
                partial.rename(path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            shutil.rmtree(replaced, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                path.rename(replaced)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for kind in _BESIDE:
        for left in path.parent.glob(f"{kind}-????????-{glob.escape(path.name)}"):
            shutil.rmtree(left, ignore_errors=True)


def require_writable(flag: str, folder: pathlib.Path) -> None:
    """Make `folder`, of an option `--flag`, where it is missing, and try it.

    Raises:
      InputError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"--{flag}: {folder} cannot be written to ({error.strerror}): name another folder"
        ) from error


def write_json(document: Any, path: pathlib.Path) -> None:
    """Write strict JSON; None stands for what is not a number.

    Raises:
      ValueError: the document holds NaN or an infinity.
    """
    with aside(path) as partial:
        partial.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
