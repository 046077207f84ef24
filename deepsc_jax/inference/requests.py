"""Which scans to predict, what their results are called, and which of them are this process's."""

import collections
import importlib.util
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deepsc_jax.config import Modality
from deepsc_jax.data import itk
from deepsc_jax.data.content import companions, is_dicom
from deepsc_jax.data.datasets import LARGEST_LIST
from deepsc_jax.data.images import PICTURES
from deepsc_jax.data.scans import SUFFIXES, is_scan, scan_name
from deepsc_jax.inference.identity import Boxes, read_result
from deepsc_jax.inference.request import Request, named
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import counted, shown

_WANTED = {
    "ct": f"no file of {', '.join(SUFFIXES)} and no folder of DICOM slices",
    "xray": f"no X-ray, a file of {', '.join(PICTURES)} or DICOM,",
}
_NAMED = 3  # of what is left out, the first few


@dataclass(frozen=True)
class Found:
    """The scans below a folder or in a list.

    Attributes:
      requests: one for each.
      notes: what is to be said before they are predicted, a line each: what was left out, and why.
      left_out: how many files and folders that was.
    """

    requests: list[Request]
    notes: tuple[str, ...] = ()
    left_out: int = 0


def of_paths(
    paths: Sequence[Path],
    lung_masks: Sequence[Path],
    lesion_masks: Sequence[Path] = (),
    boxes: Sequence[Boxes] = (),
) -> list[Request]:
    """A request for each path, named after it; of the others there are none, or one for each.

    Raises:
        InputError: another number of masks or boxes; two scans of one name.
    """
    given = {"lung_mask": lung_masks, "lesion_mask": lesion_masks, "boxes": boxes}
    for flag, values in given.items():
        if values and len(values) != len(paths):
            raise InputError(
                f"--{flag}: {len(values)} given for {counted(len(paths), 'scan')}: give one "
                "per --scan, in order"
            )
    none = [None] * len(paths)
    rows = zip(
        paths,
        lung_masks or none,
        lesion_masks or none,
        boxes or [()] * len(paths),
        strict=True,
    )
    requests = [named(scan_name(row[0]), *row) for row in rows]
    return _without_collisions(requests, "--scan")


def below(folder: Path, results: Path, modality: Modality = "ct") -> Found:
    """Every scan below a folder, sorted, each named by its path relative to it.

    Those are all files of `SUFFIXES` and all folders that hold DICOM files; of X-rays all files of
    `PICTURES` and DICOM files, each. Left out are the folder
    of results, should it lie there, folders that hold an earlier result, what begins with a dot,
    and what is no regular file. Links are followed, but no folder is entered twice.

    Raises:
        InputError: a folder may not be read; no scan; results that would collide.
    """
    top = os.path.realpath(results)
    if os.path.realpath(folder) == top:
        raise InputError(f"--out={results}: is the folder of the scans, expected another")
    wanted: list[Request] = []
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    entered = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        place = os.path.realpath(here)
        if place in entered or place == top:
            if place in entered:
                left_out["links to what is here anyway"].append(str(Path(here).relative_to(folder)))
            folders.clear()
            continue
        entered.add(place)
        where = Path(here).relative_to(folder)
        if "result.json" in files and read_result(Path(here)) is not None:
            left_out["earlier results"].append(str(where))
            folders.clear()
            continue
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        left_out["hidden"] += [str(where / name) for name in sorted(hidden)]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        regular = _regular(Path(here), sorted(set(files) - set(hidden)), where, left_out)
        if modality == "xray":
            scans = [name for name in regular if _is_xray(Path(here, name))]
            others = [name for name in regular if name not in scans]
        else:
            scans, others = _sorted_out(Path(here), regular)
        paths = [Path(here, name) for name in scans]
        if modality == "ct" and _are_dicom(Path(here), others):
            paths.append(Path(here))
        else:
            left_out["not scans by name"] += [str(where / name) for name in others]
        for path in paths:
            parent = path.relative_to(folder).parent
            wanted.append(named((parent / scan_name(path)).as_posix(), path))
    said = [_left_out(kind, names) for kind, names in left_out.items() if names]
    if not wanted:
        raise InputError(
            f"--scans={folder}: {_WANTED[modality]} below it"
            f"{''.join(f'; {line}' for line in said)}: check the path"
        )
    wanted = _without_collisions(sorted(wanted, key=lambda request: request.name), "--scans")
    notes = [f"{folder}: {line}" for line in said] + _without_reader(wanted)
    return Found(wanted, tuple(notes), sum(map(len, left_out.values())))


def listed(file: Path) -> Found:
    """The scans of a text file that lists one path a line; relative ones begin at its folder.

    Blank lines and those that begin with # are no paths, unless files have those names. Results are
    named by the paths as they are listed; those of absolute ones without the first /.

    Raises:
        InputError: the file cannot be read or lists nothing; results that would collide.
    """
    wanted = []
    for line in _lines(file):
        text = _spelled(line, file.parent)
        if text is None:
            continue
        path = Path(file.parent, os.path.expanduser(text))
        name = Path(os.path.normpath(os.path.expanduser(text)))
        if name.is_absolute() or ".." in name.parts:
            name = Path(os.path.abspath(path)).relative_to("/")
        wanted.append(named((name.parent / scan_name(name)).as_posix(), path))
    if not wanted:
        raise InputError(f"--scans={file}: an empty list, expected a path of a scan in each line")
    wanted = _without_collisions(wanted, "--scans")
    return Found(wanted, tuple(_without_reader(wanted)))


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


def _lines(file: Path) -> list[str]:
    """The lines of a list that say something, whatever an editor or a spreadsheet made of them.

    Bytes that are no UTF-8 stay what they are: a name is bytes.
    """
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(
                f"--scans={file}: no regular file, expected a folder of scans, or a text file that "
                "lists one path a line"
            )
        content = file.read_bytes() if facts.st_size <= LARGEST_LIST else b"\0"
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--scans={file}: cannot be read ({error}), expected a folder of scans, or a text file "
            "that lists one path a line"
        ) from error
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    if b"\0" in content and not wide:
        raise InputError(
            f"--scans={file}: not a text file, expected a folder of scans, or a text file that "
            "lists one path a line: give a scan as --scan"
        )
    text = content.decode(
        "utf-16" if wide else "utf-8-sig", "replace" if wide else "surrogateescape"
    )
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip()]


def _spelled(line: str, folder: Path) -> str | None:
    """The path that a line of a list gives; None if it is a comment.

    A name may begin or end with a blank or begin with a #, and spreadsheets put quotes around one
    with a comma; what is there decides.
    """
    bare = line.strip()
    quoted = re.fullmatch('"(.+)"', bare)
    spellings = [line, bare, quoted[1].replace('""', '"') if quoted else bare]
    for text in spellings:
        if os.path.exists(folder / os.path.expanduser(text)):
            return text
    return None if bare.startswith("#") else bare


def _regular(
    here: Path, names: Sequence[str], where: Path, left_out: dict[str, list[str]]
) -> list[str]:
    """The names of regular files; of links to such too."""
    regular = []
    for name in names:
        try:
            mode = (here / name).stat().st_mode
        except OSError:  # a link to nothing, or a loop of them
            mode = 0
        if stat.S_ISREG(mode):
            regular.append(name)
        else:
            left_out["not regular files"].append(str(where / name))
    return regular


def _sorted_out(here: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of a folder's files are scans, and which are neither that nor the rest of one."""
    scans, belonging = [], set()
    for name in names:
        if is_scan(name):
            others = companions(here / name)
            if name.lower().endswith(".img") and not others:
                continue  # half of a pair, or a slice of DICOM
            scans.append(name)
            belonging |= {other.name for other in others if other.parent == here}
    return scans, [name for name in names if name not in belonging and name not in scans]


def _is_xray(path: Path) -> bool:
    """Whether a file is a picture by its name, or DICOM by its name or content."""
    if path.name.lower().endswith((*PICTURES, ".dcm")):
        return True
    return path.name != "DICOMDIR" and not is_scan(path.name) and is_dicom(path)


def _left_out(kind: str, names: Sequence[str]) -> str:
    """That some files or folders are left out: how many, why, and the first few."""
    rest = ", …" if len(names) > _NAMED else ""
    return f"{len(names)} left out, {kind}: {', '.join(map(shown, names[:_NAMED]))}{rest}"


def _without_reader(requests: Sequence[Request]) -> list[str]:
    """A line where SimpleITK is needed and not installed."""
    if importlib.util.find_spec("SimpleITK") is not None:
        return []
    need = [
        request
        for request in requests
        if request.path.name.lower().endswith(itk.SUFFIXES) or os.path.isdir(request.path)
    ]
    if not need:
        return []
    first = ", ".join(shown(request.path.name) for request in need[:_NAMED])
    return [
        f"{len(need)} of {len(requests)} scans cannot be read without SimpleITK, which is not "
        f"installed ({first}{', …' if len(need) > _NAMED else ''}): "
        "pip install 'deepsc_jax[dicom]'"
    ]


def _without_collisions(requests: list[Request], flag: str) -> list[Request]:
    """The requests, if no result would take the place of another or lie in it."""
    paths = collections.defaultdict(list)
    for request in requests:
        paths[request.name].append(request.path)
    for name, colliding in paths.items():
        around = [str(parent) for parent in PurePosixPath(name).parents if str(parent) in paths]
        if len(colliding) > 1 or around:
            first = colliding[0] if len(colliding) > 1 else paths[around[0]][0]
            kind = f"would both be {name}" if len(colliding) > 1 else f"would lie in {around[0]}"
            raise InputError(
                f"{flag}: the results of {first} and {colliding[-1]} {kind}: predict them into "
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
