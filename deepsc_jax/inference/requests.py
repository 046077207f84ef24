"""Which scans to predict, what their results are called, and which of them are this process's."""

import collections
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deepsc_jax.data.scans import scan_name
from deepsc_jax.inference.identity import is_dicom
from deepsc_jax.runtime.errors import InputError


@dataclass(frozen=True)
class Request:
    """A scan to predict."""

    name: str
    """Of its result: a path relative to the folder of results."""
    path: Path
    """A NIfTI file or a folder of DICOM slices."""
    lung_mask: Path | None = None
    """Found where it is None."""


def of_paths(paths: Sequence[Path], lung_masks: Sequence[Path]) -> list[Request]:
    """A request for each path, named after it; `lung_masks` are none or one for each.

    Raises:
        InputError: another number of lung masks; two scans of one name.
    """
    masks = lung_masks or [None] * len(paths)
    if len(masks) != len(paths):
        raise InputError(
            f"--lung_mask: {len(masks)} given for {len(paths)} scans: give one per --scan, in order"
        )
    requests = [Request(scan_name(p), p, m) for p, m in zip(paths, masks, strict=True)]
    return _without_collisions(requests, "--scan")


def below(folder: Path, results: Path) -> list[Request]:
    """Every scan below a folder, sorted, each named by its path relative to it.

    Those are all .nii and .nii.gz files and all folders that hold DICOM files. What begins with a
    dot is left out, and the folder of results, should it lie there. Links are followed, but no
    folder is entered twice.

    Raises:
        InputError: a folder may not be read; no scan; results that would collide.
    """
    left_out = os.path.realpath(results)
    if os.path.realpath(folder) == left_out:
        raise InputError(f"--out={results}: is the folder of the scans, expected another")
    found: list[Request] = []
    entered = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        place = os.path.realpath(here)
        if place in entered or place == left_out:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen = sorted(name for name in files if not name.startswith("."))
        scans = [name for name in seen if name.endswith((".nii", ".nii.gz"))]
        paths = [Path(here, name) for name in scans]
        if _are_dicom(Path(here), [name for name in seen if name not in scans]):
            paths.append(Path(here))
        for path in paths:
            parent = path.relative_to(folder).parent
            found.append(Request((parent / scan_name(path)).as_posix(), path))
    if not found:
        raise InputError(
            f"--scans={folder}: no .nii or .nii.gz file and no folder of DICOM slices below it: "
            "check the path"
        )
    return _without_collisions(sorted(found, key=lambda request: request.name), "--scans")


def listed(file: Path) -> list[Request]:
    """The scans of a text file that lists one path a line; relative ones begin at its folder.

    Results are named by the paths as they are listed; those of absolute ones without the first /.

    Raises:
        InputError: the file cannot be read or lists nothing; results that would collide.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--scans={file}: cannot be read ({error}), expected a folder of scans, or a text file "
            "that lists one path a line"
        ) from error
    found = []
    for line in filter(None, map(str.strip, lines)):
        path = file.parent / line
        shown = Path(os.path.normpath(line))
        if shown.is_absolute() or ".." in shown.parts:
            shown = Path(os.path.abspath(path)).relative_to("/")
        found.append(Request((shown.parent / scan_name(shown)).as_posix(), path))
    if not found:
        raise InputError(f"--scans={file}: an empty list, expected a path of a scan in each line")
    return _without_collisions(found, "--scans")


def share(requests: Sequence[Request], text: str) -> list[Request]:
    """Those of the share `I/N`, I from 0: every N-th. Shares are disjoint and cover all.

    Raises:
        InputError: the text is no such share.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count:
        raise InputError(f"--share={text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return list(requests[index::count])


def _without_collisions(requests: list[Request], flag: str) -> list[Request]:
    """The requests, if no result would take the place of another or lie in it."""
    paths = collections.defaultdict(list)
    for request in requests:
        paths[request.name].append(request.path)
    for name, found in paths.items():
        around = [str(parent) for parent in PurePosixPath(name).parents if str(parent) in paths]
        if len(found) > 1 or around:
            first = found[0] if len(found) > 1 else paths[around[0]][0]
            kind = f"would both be {name}" if len(found) > 1 else f"would lie in {around[0]}"
            raise InputError(
                f"{flag}: the results of {first} and {found[-1]} {kind}: predict them into "
                "different --out, or list the scans to predict in a file: --scans=FILE"
            )
    return requests


def _are_dicom(folder: Path, names: Sequence[str]) -> bool:
    """Whether one of the files is DICOM, by its name or content; an index of others is not."""
    if any(name.lower().endswith(".dcm") for name in names):
        return True
    return any(is_dicom(folder / name) for name in names if name != "DICOMDIR")


def _unreadable(error: OSError) -> None:
    raise InputError(f"--scans: {error.filename} may not be read ({error.strerror}): check it")
