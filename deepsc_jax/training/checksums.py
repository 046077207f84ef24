"""SHA-256 sums of a checkpoint's files: Orbax loads a file with a flipped byte without a word.

They lie in the checkpoint as SHA256SUMS, in the form that `sha256sum --check SHA256SUMS` reads. Its
validation result is added later, in a file whose sum is added then: without it, it is none.
"""

import hashlib
import json
import pathlib

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import PARTIAL, aside, write_json
from deepsc_jax.runtime.types import JsonObject

SUMS, RECORD = "SHA256SUMS", "validation.json"
# What Orbax writes when it commits a checkpoint, after the sums: times and names, no data.
STAMP, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"


def write_sums(folder: pathlib.Path) -> None:
    """Write the sums of all files below `folder`, except for Orbax's stamps on it."""
    lines = [f"{_sum(folder / name)}  {name}\n" for name in sorted(_summed(folder))]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def add_record(folder: pathlib.Path, record: JsonObject) -> None:
    """Add a validation result to a checkpoint, and its sum to the others, at which it counts."""
    write_json(record, folder / RECORD)
    others = [f"{digest}  {name}\n" for name, digest in _listed(folder).items() if name != RECORD]
    with aside(folder / SUMS) as partial:
        partial.write_text("".join([*others, f"{_sum(folder / RECORD)}  {RECORD}\n"]), "utf-8")


def read_record(folder: pathlib.Path) -> JsonObject | None:
    """The validation result of a checkpoint; None where it has none.

    Raises:
      InputError: it is not as it was written.
    """
    expected, path = _listed(folder).get(RECORD), folder / RECORD
    if expected is None or not path.is_file():
        return None
    if _sum(path) != expected:
        raise InputError(
            f"{path}: is not as it was written: copy it again, or move that checkpoint away"
        )
    return json.loads(path.read_text("utf-8"))


def digest(folder: pathlib.Path) -> str:
    """The SHA-256 of a checkpoint's sums, its validation result apart: of what was computed."""
    listed = sorted((n, d) for n, d in _listed(folder).items() if n != RECORD)
    return hashlib.sha256("".join(f"{d}  {n}\n" for n, d in listed).encode()).hexdigest()


def damage(folder: pathlib.Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is as it was written.

    Without `contents`, only whether all files are there.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return f"{SUMS} is missing"
    listed = _listed(folder)
    for name, expected in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if contents and _sum(folder / name) != expected:
            return f"{name} is not as it was written"
    if unlisted := _summed(folder) - listed.keys():
        return f"{SUMS} lacks {min(unlisted)}"
    try:
        json.loads((folder / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return f"{STAMP} is missing or damaged"
    return None


def _summed(folder: pathlib.Path) -> set[str]:
    """The names of the files that have sums from the start."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in files}
    later = {name for name in names if name.startswith(PARTIAL)}  # a record's, of a killed run
    return names - {SUMS, STAMP, COMMITTED, RECORD} - later


def _listed(folder: pathlib.Path) -> dict[str, str]:
    """The sums, by the names of their files; none where there is no file of sums."""
    sums = folder / SUMS
    if not sums.is_file():
        return {}
    lines = sums.read_text("utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _sum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
