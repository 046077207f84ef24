"""Files that a command writes at its end, looked at before its work begins."""

import pathlib

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, require_writable


def output_file(flag: str, text: str | None) -> pathlib.Path | None:
    """The file that an option `--flag` names, whose folder is made; None where it names none.

    Raises:
      InputError: it is an address, a folder, or where nothing can be written.
    """
    if text is None:
        return None
    path = local_path(flag, text)
    if path.exists() and not path.is_file():
        raise InputError(f"--{flag}: {path} is no file, expected one that is written or replaced")
    require_writable(flag, path.parent)
    return path


def output_folder(flag: str, text: str) -> pathlib.Path:
    """The folder that an option `--flag` names, which is made.

    Raises:
      InputError: it is an address, or nothing can be written there.
    """
    path = local_path(flag, text)
    require_writable(flag, path)
    return path
