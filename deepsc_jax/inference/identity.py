"""What a result was made from, and what of it is still as it was written.

A scan is known by its content and its place, since names, sizes and times can be another's. A
result says which scan it is of and holds the sums of its files, so that the result of one scan
never passes for another's, and what a user changed or added is never replaced.
"""

import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from deepsc_jax.data.content import content_files
from deepsc_jax.inference import privacy
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import sha256
from deepsc_jax.runtime.types import JsonObject, JsonValue

RESULT = "result.json"
Boxes = tuple[tuple[int, int, int, int], ...]

AT_REST_NS = 2_000_000_000
"""How long a file must have been left alone for its times to tell of the next change: a file system
counts them in steps, of 4 ms on ext4 and of 2 s at worst (FAT), and a change within one is not
seen."""

_LARGEST_RESULT = 16 << 20  # bytes of a result.json; ours have thousands


@dataclass(frozen=True)
class Identity:
    """A scan or a lung mask, as it was when it was looked at.

    Attributes:
      path: as it was given.
      place: its path, with links resolved; of DICOM and its lung mask a pseudonym.
      sha256: of its bytes. Of several files (a folder of DICOM slices, a header with its data) that
        of the lines which `LC_ALL=C sha256sum *` writes of them.
      state: of the sizes, times (mtime, ctime) and inodes of its files.
      at_rest: whether any later change of content must change `state`.
    """

    path: Path
    place: str
    sha256: str
    state: str
    at_rest: bool

    def require_unchanged(self) -> None:
        """Raise InputError if the files have changed since."""
        if _state(content_files(self.path)) != self.state:
            raise InputError(
                f"{self.path}: changed while it was read: wait until it is written whole, then "
                "start again"
            )


@dataclass(frozen=True)
class Sources:
    """What a scan is predicted from."""

    scan: Identity
    lung_mask: Identity | None
    lesion_mask: Identity | None = None
    boxes: Boxes = ()
    identifiers: str | None = None
    """Of DICOM: whether its objects have a patient module, `kept`, or a blank one, `removed`."""

    @property
    def files(self) -> list[Identity]:
        """Those that there are."""
        given = (self.scan, self.lung_mask, self.lesion_mask)
        return [each for each in given if each is not None]

    def facts(self) -> JsonObject:
        """As result.json says it; of lesions only where some were given."""
        mask, lesions = self.lung_mask, self.lesion_mask
        of_lesions: JsonObject = {"boxes": [list(box) for box in self.boxes]} if self.boxes else {}
        if lesions is not None:
            of_lesions |= {"lesion_mask": lesions.place, "lesion_mask_sha256": lesions.sha256}
        return of_lesions | {
            "scan": self.scan.place,
            "sha256": self.scan.sha256,
            "lung_mask": None if mask is None else mask.place,
            "lung_mask_sha256": None if mask is None else mask.sha256,
            **({} if self.identifiers is None else {"identifiers": self.identifiers}),
            "states": {each.place: each.state for each in self.files if each.at_rest},
        }

    def are_of(self, result: JsonObject) -> bool:
        """Whether a result was made from the same content."""
        facts = self.facts()
        names = ("sha256", "lung_mask_sha256", "lesion_mask_sha256", "boxes", "identifiers")
        return all(result.get(name) == facts.get(name) for name in names)

    def require_unchanged(self) -> None:
        """Raise InputError if a file of them has changed since."""
        for each in self.files:
            each.require_unchanged()


def identify(
    scan: Path,
    lung_mask: Path | None = None,
    earlier: JsonObject | None = None,
    *,
    lesion_mask: Path | None = None,
    boxes: Boxes = (),
    keep_identifiers: bool = False,
) -> Sources:
    """Which scan and masks are at these paths; with the boxes around its lesions.

    Files are read for it, unless they are those of an `earlier` result (its result.json), and
    nothing of them has changed: path, size, inode, and both times. No program can set a file's
    ctime, so a change shows there, but for one in the same step of the clock (see `AT_REST_NS`).

    Raises:
      InputError: there is no such file, it may not be read, or is none that can be (a FIFO).
    """
    known: dict[str, tuple[object, object]] = {}
    if earlier is not None:
        for path in ("scan", "lung_mask", "lesion_mask"):
            place, sums = earlier.get(path), "sha256" if path == "scan" else f"{path}_sha256"
            if isinstance(place, str) and isinstance(earlier.get("states"), dict):
                known[place] = (earlier["states"].get(place), earlier.get(sums))
    private = privacy.is_private(scan)
    identifiers = ("kept" if keep_identifiers else "removed") if private else None
    lungs, lesions = (
        None
        if mask is None
        else _identity(mask, privacy.place(mask, private=private, kind="mask-"), known)
        for mask in (lung_mask, lesion_mask)
    )
    place = privacy.place(scan, private=private)
    return Sources(_identity(scan, place, known), lungs, lesions, boxes, identifiers)


def _identity(path: Path, place: str, known: dict[str, tuple[object, object]]) -> Identity:
    files, now = content_files(path), time.time_ns()
    state = _state(files)
    before, digest = known.get(place, (None, None))
    if before != state or not isinstance(digest, str):
        try:
            sums = [(file.name, sha256(file)) for file in files]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}): check it") from error
        digest = sums[0][1]
        if os.path.isdir(path) or len(sums) > 1:
            lines = b"".join(b"%b  %b\n" % (s.encode(), os.fsencode(name)) for name, s in sums)
            digest = hashlib.sha256(lines).hexdigest()
        at_rest = all(now - file.stat().st_ctime_ns > AT_REST_NS for file in files)
    else:
        at_rest = True
    return Identity(path, place, digest, state, at_rest)


def _state(files: list[Path]) -> str:
    stats = [(os.fsencode(file.name).hex(), file.stat()) for file in files]
    facts = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_result(folder: Path) -> JsonObject | None:
    """The result.json in `folder`, if this program wrote one there; of an earlier version too."""
    path = folder / RESULT
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _LARGEST_RESULT:
            return None
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(result, dict):
        return None
    ours = all(isinstance(result.get(key), dict) for key in ("made_from", "files"))
    return result if ours and isinstance(result.get("scan"), str) else None


def manifest(folder: Path) -> dict[str, JsonObject]:
    """Size and SHA-256 of every file in `folder`, by name."""
    files = sorted(folder.iterdir())
    return {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in files}


def signed(result: JsonObject) -> JsonObject:
    """A result with its own sum, by which a change of result.json itself is seen."""
    text = json.dumps({key: value for key, value in result.items() if key != "sum"})
    return result | {"sum": hashlib.sha256(text.encode()).hexdigest()}


def missing_and_changed(folder: Path, result: JsonObject) -> tuple[list[str], list[str]]:
    """Which of a result's files are gone, and which are of another size than they were."""
    missing, changed = [], []
    for name, facts in result["files"].items():
        try:
            if (folder / name).stat().st_size != facts["size"]:
                changed.append(name)
        except OSError:
            missing.append(name)
        except (TypeError, KeyError):  # of an earlier version, which had no sums
            missing.append(name)
    return missing, changed


def require_replaceable(
    folder: Path, sources: Sources, *, overwrite: bool, read: set[str] | None = None
) -> set[str]:
    """The names of the files in `folder` that a new result of that scan takes the place of.

    A result is replaced by one of the same content. By one of the same path whose content has
    changed it is with `overwrite`. Another scan's is never replaced, nor is a file that is not as
    it was written.

    Args:
      folder: of the result.
      sources: what the new result is made from.
      overwrite: see above.
      read: the states of files that were read and are as they were written. They are not read
        again, and others are added.

    Raises:
      InputError: saying which of that it is.
    """
    read = set() if read is None else read
    if not os.path.lexists(folder):
        return set()
    result = None if folder.is_symlink() else read_result(folder)
    if result is None:
        raise InputError(
            f"{folder}: exists and holds no earlier result, expected a new folder: give another "
            "--out"
        )
    scan = sources.scan
    if "sha256" not in result:
        raise InputError(
            f"{folder}: holds a result of an earlier version, which did not record what it is of: "
            "give another --out"
        )
    if result["sha256"] != scan.sha256:
        if result["scan"] != scan.place:
            raise InputError(
                f"{scan.path}: its result would take the place of that of another scan, "
                f"{result['scan']}, in {folder}: give another --out"
            )
        if not overwrite:
            raise InputError(
                f"{scan.path}: its content has changed since it was predicted into {folder}: give "
                "--overwrite to replace that result, or another --out"
            )
    changed = [] if signed(result) == result else [RESULT]
    for name, facts in result["files"].items():
        file = folder / name
        if os.path.lexists(file) and not _is_as_written(file, facts, read):
            changed.append(name)
    if changed:
        raise InputError(
            f"{folder / changed[0]}: has changed since it was written, and is not overwritten: "
            "move it elsewhere, or give another --out"
        )
    return {RESULT, *result["files"]}


def _is_as_written(file: Path, facts: JsonValue, read: set[str]) -> bool:
    try:
        about = file.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size != facts["size"]:
            return False
        state = _state([file])
        if state not in read and sha256(file) != facts["sha256"]:
            return False
    except (OSError, KeyError, TypeError):
        return False
    read.add(state)
    return True
