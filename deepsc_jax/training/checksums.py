"""SHA-256 sums of a checkpoint's files: Orbax loads a file with a flipped byte without a word.

They lie in the checkpoint as SHA256SUMS, in the form that `sha256sum --check SHA256SUMS` reads.
"""

import hashlib
import json
import pathlib

SUMS = "SHA256SUMS"
# What Orbax writes when it commits a checkpoint, after the sums: times and names, no data.
STAMP, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"


def write_sums(folder: pathlib.Path) -> None:
    """Write the sums of all files below `folder`, except for Orbax's stamps on it."""
    lines = [f"{_sum(folder / name)}  {name}\n" for name in sorted(_summed(folder))]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def damage(folder: pathlib.Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is as it was written.

    Without `contents`, only whether all files are there.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return f"{SUMS} is missing"
    listed = set()
    for line in sums.read_text("utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        if not (folder / name).is_file():
            return f"{name} is missing"
        if contents and _sum(folder / name) != expected:
            return f"{name} is not as it was written"
        listed.add(name)
    if unlisted := _summed(folder) - listed:
        return f"{SUMS} lacks {min(unlisted)}"
    try:
        json.loads((folder / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return f"{STAMP} is missing or damaged"
    return None


def _summed(folder: pathlib.Path) -> set[str]:
    """The names of the files that have sums."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files} - {SUMS, STAMP, COMMITTED}


def _sum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
