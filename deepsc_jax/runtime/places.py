"""Files that a command writes at its end, looked at before its work begins."""

import pathlib

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, require_own, require_writable


def output_file(flag: str, text: str | None) -> pathlib.Path | None:
    """The file that an option `--flag` names, whose folder is made; None where it names none.

    Raises:
      InputError: it is an address, a folder, a file that was written or changed by somebody else,
        or where nothing can be written.
    """
    if text is None:
        return None
    path = local_path(flag, text)
    if path.exists() and not path.is_file():
        raise InputError(f"--{flag}: {path} is no file, expected one that is written or replaced")
    require_writable(flag, path.parent)
    require_own(path)
    return path


def output_folder(flag: str, text: str, *names: str) -> pathlib.Path:
    """The folder that an option `--flag` names, which is made.

    Args:
      flag: the option.
      text: its value.
      names: of the files that will be written there.

    Raises:
      InputError: it is an address, nothing can be written there, or one of the files is there and
        was written or changed by somebody else.
    """
    path = local_path(flag, text)
    require_writable(flag, path)
    for name in names:
        require_own(path / name)
    return path
