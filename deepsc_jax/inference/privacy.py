"""What results of DICOM input are called and say, so that nothing in them names a patient.

Exports are often in folders and files that are named after patients. So a result of DICOM is named
by a hash, and no path, file's name or tag's text is in what is written and printed of it.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepsc_jax.data.content import content_files, is_dicom
from deepsc_jax.data.scans import is_scan
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import sha256
from deepsc_jax.runtime.names import shown

PREFIX = "dicom-"
_LEAST_NAME = 4  # letters of a file's name that is taken out of a text; shorter ones are in words


def is_private(path: Path) -> bool:
    """Whether a scan is DICOM, which a folder is, or an X-ray by its content or name."""
    if os.path.isdir(path):
        return True
    return not is_scan(path.name) and (path.name.lower().endswith(".dcm") or is_dicom(path))


def pseudonym(path: Path, text: str, kind: str = PREFIX) -> str:
    """A name for what is at `path`, the same as long as `text` and its largest file are the same.

    The file is in the hash since a hash of a name alone is found by trying names. `text` is, so
    that two copies of a series have two names.

    Args:
      path: a file, or a folder.
      text: what is to be hidden, such as its path.
      kind: what the name begins with.
    """
    digest = hashlib.sha256(os.fsencode(text))
    try:
        largest = max(content_files(path), key=lambda file: file.stat().st_size)
        digest.update(sha256(largest).encode())
    except (InputError, OSError):  # whoever reads the scan says it
        pass
    return f"{kind}{digest.hexdigest()[:16]}"


def place(path: Path, *, private: bool, kind: str = PREFIX) -> str:
    """The path with links resolved, by which a result says what it is of; or its pseudonym."""
    real = os.path.realpath(path)
    return pseudonym(path, real, kind) if private else real


def without_names(text: str, name: str, path: Path, masks: Mapping[str, Path | None]) -> str:
    """A text without the paths of a scan and its masks, and without the names of its files.

    Args:
      text: such as a message.
      name: what the scan is called in its place.
      path: of the scan.
      masks: by what they are called.
    """
    given = {called: mask for called, mask in masks.items() if mask is not None}
    for called, mask in given.items():
        for spelling in _spellings(mask):
            text = _replaced(text, spelling, called)
    try:
        entries = sorted(os.listdir(path)) if os.path.isdir(path) else []
    except OSError:
        entries = []
    for number, entry in enumerate(entries, 1):
        for spelling in _spellings(path / entry):
            text = _replaced(text, spelling, f"{name} (file {number})")
    for spelling in _spellings(path):
        text = _replaced(text, spelling, name)
    bare = {entry: f"file {number}" for number, entry in enumerate(entries, 1)}
    bare |= {path.name: name} | {mask.name: called for called, mask in given.items()}
    for entry in sorted(bare, key=len, reverse=True):
        if len(entry) >= _LEAST_NAME and re.search(r"[^\W\d]", entry):
            text = _replaced(text, entry, bare[entry])
    return text


def _spellings(path: Path) -> Sequence[str]:
    """How a path may be written, the longest first."""
    ways = {os.fspath(path), os.path.abspath(path), os.path.realpath(path)}
    return sorted(ways, key=len, reverse=True)


def _replaced(text: str, words: str, by: str) -> str:
    """The text with a path or a name, as it is or as shown, replaced where it stands alone."""
    for spelling in {words, shown(words)}:
        text = re.sub(rf"(?<![\w.-]){re.escape(spelling)}(?![\w-])", lambda _: by, text)
    return text
