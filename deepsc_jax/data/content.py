"""The files that a scan or a mask is in, for those who sum them or look at their times."""

import glob
import os
import re
import stat
from pathlib import Path

from deepsc_jax.runtime.errors import InputError

# In a header of NRRD or MetaImage: the file of the voxels.
_DETACHED = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.MULTILINE | re.I)


def content_files(path: Path) -> list[Path]:
    """The files that a scan's content is in, sorted by name: itself, a folder's, or its header's.

    None of them is opened but headers that name other files.

    Raises:
      InputError: there is none, or one is not a regular file.
    """
    if os.path.isdir(path):  # pathlib's raises for a name that is too long
        try:
            names = sorted(os.listdir(path), key=os.fsencode)
        except OSError as error:
            raise InputError(f"{path}: may not be read ({error.strerror}): check it") from error
        files = [path / name for name in names]
        # What a file browser leaves there (.DS_Store) is no part of it.
        files = [f for f in files if not f.is_dir() and (f.name[0] != "." or is_dicom(f))]
        if not files:
            raise InputError(f"{path}: an empty folder, expected one of DICOM slices")
    else:
        _require_regular(path)
        files = [path, *sorted(companions(path), key=lambda file: os.fsencode(file.name))]
    for file in files:
        _require_regular(file)
    return files


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM's do; one that is no regular file is not opened."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return False
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _require_regular(file: Path) -> None:
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as error:
        what = "a link to nothing" if file.is_symlink() else "no such file"
        raise InputError(f"{file}: {what}: check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be looked at ({reason}): check the path") from error
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device, a socket or a folder"
        raise InputError(f"{file}: is {kind}, expected a file: give the scan as a file")


def companions(path: Path) -> set[Path]:
    """The files that belong to a header, or the header of a file of voxels: not `path` itself."""
    suffix, folder = path.suffix.lower(), path.parent
    if suffix in (".img", ".hdr"):
        other = {".img": ".hdr", ".hdr": ".img"}[suffix]
        beside = folder.glob(f"{glob.escape(path.stem)}.*")
        return {file for file in beside if file.suffix.lower() == other}
    if suffix not in (".mhd", ".nhdr"):
        return set()
    try:
        with path.open("rb") as file:
            header = file.read(1 << 20)
    except OSError:  # whoever reads the scan says it
        return set()
    detached = _DETACHED.search(header)
    if detached is None or detached[1].upper() == b"LOCAL":
        return set()
    if (
        detached[1].upper().startswith(b"LIST") or b"%" in detached[1]
    ):  # files, or a pattern of names
        return {file for file in folder.iterdir() if file.is_file()} - {path}
    return {folder / os.fsdecode(detached[1])} - {path}
