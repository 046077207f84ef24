"""The case list: which scans there are, whose they are, what they show, and which split has them.

A case list is a CSV file with the columns of `COLUMNS`. Paths are relative to the file's folder; a
mask that does not exist is an empty cell. A scan may be a NIfTI file or a folder of DICOM files, or
an X-ray. Columns of `OPTIONAL` may be left out. Columns of indicators have the names that
`DataConfig.indicators` gives them; others are not read.
What spreadsheets make of such a file is read too: semicolons or tabs for commas, UTF-16, the
encoding of western Windows, other line ends, blanks and capitals in the first line.
"""

import collections
import csv
import dataclasses
import math
import os
import pathlib
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import get_args

from deepsc_jax.config import CLASSES, Modality
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.names import counted, shown

COLUMNS = ("case", "patient", "split", "label", "scan", "lesion_mask", "lung_mask")
OPTIONAL = ("modality", "boxes")
MODALITIES = get_args(Modality)
SPLITS = ("train", "validation", "test")

# A case's name becomes a folder of the store and the stem of result files.
_NAME = re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 200  # bytes, of 255 that file systems take

LARGEST_LIST = 64 << 20
"""Bytes of a case list, or of a list of scans: a million lines. A scan given as one is larger."""

_WINDOWS = "cp1252"
_BOX = re.compile(r"(-?\d+) +(-?\d+) +(-?\d+) +(-?\d+)")
_BEYOND = "\0"  # no column has this name


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a case list.

    Attributes:
      name: unique; letters of any script, digits, `.`, `_` and `-`; in Unicode's form NFC.
      patient: whose scan it is; all scans of a patient are in one split.
      split: one of `SPLITS`.
      label: index into `DataConfig.classes`.
      scan: NIfTI file or DICOM folder, absolute.
      lesion_mask: None where no lesions were drawn; for non-pneumonia that means there are none.
      lung_mask: None where the lungs are to be found.
      modality: one of `MODALITIES`; empty where the list does not say it.
      boxes: around lesions of an X-ray, as `images.Box`.
      targets: the values of the indicators that were asked for, in order.
    """

    name: str
    patient: str
    split: str
    label: int
    scan: pathlib.Path
    lesion_mask: pathlib.Path | None = None
    lung_mask: pathlib.Path | None = None
    modality: str = ""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    targets: tuple[float, ...] = ()

    def files(self) -> list[pathlib.Path]:
        """The paths that must exist."""
        return [path for path in (self.scan, self.lesion_mask, self.lung_mask) if path is not None]


def read_cases(
    csv_path: str | pathlib.Path,
    exclude: Sequence[str] = (),
    check_files: bool = True,
    failures: list[str] | None = None,
    classes: Sequence[str] = CLASSES,
    indicators: Sequence[str] = (),
) -> list[Case]:
    """Read a case list, in the order of its lines.

    Args:
      csv_path: the CSV file.
      exclude: names of cases to leave out; what is wrong with them does not matter.
      check_files: refuse the list if one of its files is missing.
      failures: where given, lines with an unknown label or the like are left out, and what is
        wrong with each is added here.
      classes: the names that a label may have.
      indicators: the columns of `Case.targets`.

    Raises:
      InputError: no such file, a column is missing, an unknown label or split, an indicator that
        is missing or no number, a case named twice
        or not at all, a scan named twice, a patient in two splits, a missing file, a name in
        `exclude` that is not there.
    """
    csv_path = pathlib.Path(csv_path)
    rows, encoding = _read_rows(csv_path, indicators)
    folder = csv_path.absolute().parent
    excluded = {unicodedata.normalize("NFC", name) for name in exclude}
    unknown = sorted(excluded - {row["case"] for _, row in rows})
    if unknown:
        raise InputError(f"--exclude={unknown[0]}: no such case in {csv_path}: mend the name")
    cases = []
    for line, row in rows:
        if row["case"] in excluded:
            continue
        try:
            place = f"{csv_path}, line {line}"
            case = _case(row, folder, encoding, classes, place)
            cases.append(dataclasses.replace(case, targets=_targets(row, indicators, place)))
        except InputError as error:
            if failures is None:
                raise
            failures.append(str(error))
    _refuse_repeats(cases, csv_path)
    if not cases and not failures:
        raise InputError(f"{csv_path}: no cases found, at least 1 expected: add a line per scan")
    _refuse_leaks(cases, csv_path)
    if check_files:
        missing = [
            (case, path) for case in cases for path in case.files() if not os.path.exists(path)
        ]
        if missing:
            case, path = missing[0]
            others = f" (and {counted(len(missing) - 1, 'more file')})" if len(missing) > 1 else ""
            raise InputError(f"{missing_file(case, path)}{others}")
    return cases


def missing_file(case: Case, path: pathlib.Path) -> str:
    """The line that says so."""
    return (
        f"{case.name}: {path} does not exist: mend the path or drop the case with "
        f"--exclude={case.name}"
    )


def write_cases(
    cases: Sequence[Case],
    csv_path: pathlib.Path,
    classes: Sequence[str] = CLASSES,
    indicators: Sequence[str] = (),
) -> None:
    """Write a case list, with a column for each of the `indicators` that its cases have.

    Paths inside the list's folder are written relative to it, so that the folder can be moved; the
    others as absolute paths.
    """
    folder = csv_path.absolute().parent
    with aside(csv_path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        more = [name for name in OPTIONAL if any(getattr(case, name) for case in cases)]
        writer.writerow([*COLUMNS, *more, *indicators])
        for case in cases:
            paths = (case.scan, case.lesion_mask, case.lung_mask)
            boxes = "; ".join(" ".join(map(str, box)) for box in case.boxes)
            optional = {"modality": case.modality, "boxes": boxes}
            writer.writerow(
                [case.name, case.patient, case.split, classes[case.label]]
                + [relative_path(path, folder) for path in paths]
                + [optional[name] for name in more]
                + [repr(value) for value in case.targets]
            )


def relative_path(path: pathlib.Path | None, folder: pathlib.Path) -> str:
    """`path` relative to `folder` where it lies inside, else absolute; "" for None."""
    if path is None:
        return ""
    path = path.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _read_rows(
    csv_path: pathlib.Path, indicators: Sequence[str]
) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """Line numbers and rows, whitespace stripped, blank lines left out; and the encoding.

    Cells beyond the last column are joined as the column `_BEYOND`.
    """
    if not os.path.isfile(csv_path):
        raise InputError(f"{csv_path}: no such case list: give a CSV file with {','.join(COLUMNS)}")
    try:
        text, encoding = _decode(_content(csv_path), csv_path)
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        first = 1 if lines[0].startswith("sep=") else 0  # what Excel says the separator is
        separator = max(
            ",;\t", key=lambda mark: len(set(COLUMNS) & set(_columns(lines[first], mark)))
        )
        names = _columns(lines[first], separator)
        absent = [name for name in (*COLUMNS, *indicators) if name not in names]
        known = (*COLUMNS, *OPTIONAL, *indicators)
        twice = [name for name in known if names.count(name) > 1]
        if absent or twice:
            problem = f"no column {', '.join(absent)}" if absent else f"two columns {twice[0]}"
            raise InputError(
                f"{csv_path}: {problem} in its first line; expected "
                f"{','.join((*COLUMNS, *indicators))}, with "
                "commas, semicolons or tabs between: mend it (mask cells may be empty)"
            )
        reader = csv.DictReader(
            (f"{line}\n" for line in lines[first + 1 :]),
            names,
            restkey=_BEYOND,
            restval="",
            delimiter=separator,
            skipinitialspace=True,
            strict=True,  # or a quote that nothing closes would take in the cases that follow
        )
        rows = []
        for row in reader:
            cells = {name: row.get(name, "").strip() for name in known}
            cells["case"] = unicodedata.normalize("NFC", cells["case"])
            cells[_BEYOND] = " ".join(row.get(_BEYOND, ())).strip()
            rows.append((reader.line_num + first + 1, cells))
    except OSError as error:
        raise InputError(
            f"{csv_path}: cannot be read ({error.strerror}): give yourself the right to read it"
        ) from error
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{csv_path}: not a CSV text file ({error}): save it as UTF-8") from error
    return [(line, row) for line, row in rows if any(row.values())], encoding


def _content(csv_path: pathlib.Path) -> bytes:
    """What is in a case list, unless it is too large to be one."""
    size = csv_path.stat().st_size
    if size > LARGEST_LIST:
        raise InputError(
            f"{csv_path}: {size} bytes, expected a case list of at most {LARGEST_LIST}: give a CSV "
            f"file with {','.join(COLUMNS)}"
        )
    return csv_path.read_bytes()


def _decode(content: bytes, csv_path: pathlib.Path) -> tuple[str, str]:
    """The text of a case list and its encoding."""
    if content[:2] not in (b"\xff\xfe", b"\xfe\xff") and b"\0" in content:
        raise UnicodeError("it has NUL characters")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise
        encoding = _WINDOWS
        text = content.decode(encoding)
        print(
            f"note: {shown(csv_path)}: not UTF-8, so read as {encoding} (western Windows): if "
            "names look wrong, save it as UTF-8",
            file=sys.stderr,
        )
    return text.lstrip("\ufeff"), encoding


def _columns(line: str, separator: str) -> list[str]:
    """The names in the first line: blanks around them and capitals do not matter."""
    names = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return ["_".join(name.casefold().replace("-", " ").split()) for name in names]


def _case(
    row: dict[str, str],
    folder: pathlib.Path,
    encoding: str,
    classes: Sequence[str],
    place: str,
) -> Case:
    name, split, label = row["case"], row["split"], row["label"]
    if not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
        raise InputError(
            f"{place}: case {name!r}: a name of letters, digits, '.', '_' and '-', of at most "
            f"{_LONGEST_NAME} bytes, is expected: rename it"
        )
    if row[_BEYOND]:
        raise InputError(
            f"{place}: {name}: {row[_BEYOND]!r} is beyond the last column: put cells that hold a "
            "separator in quotes"
        )
    if label not in classes:
        raise InputError(
            f"{place}: {name}: label {label!r} is unknown, expected one of {', '.join(classes)}: "
            f"mend it, or drop the case with --exclude={name}"
        )
    if split not in SPLITS:
        raise InputError(
            f"{place}: {name}: split {split!r} is unknown, expected one of {', '.join(SPLITS)}: "
            f"mend it, or drop the case with --exclude={name}"
        )
    if row["modality"] not in ("", *MODALITIES):
        raise InputError(
            f"{place}: {name}: modality {row['modality']!r} is unknown, expected one of "
            f"{', '.join(MODALITIES)}: mend it, or drop the case with --exclude={name}"
        )
    for column in ("patient", "scan"):
        if not row[column]:
            raise InputError(f"{place}: {name}: {column} is empty: fill it in")
    scan, lesion_mask, lung_mask = (
        _path(folder, row[column], encoding) if row[column] else None
        for column in ("scan", "lesion_mask", "lung_mask")
    )
    assert scan is not None
    return Case(
        name,
        row["patient"],
        split,
        list(classes).index(label),
        scan,
        lesion_mask,
        lung_mask,
        row["modality"],
        parse_boxes(row["boxes"], f"{place}: {name}"),
    )


def parse_boxes(text: str, place: str) -> tuple[tuple[int, int, int, int], ...]:
    """Boxes from a cell, four whole numbers each, semicolons between; InputError for others."""
    boxes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = _BOX.fullmatch(part)
        numbers = tuple(map(int, match.groups())) if match else (0, 0, 0, 0)
        top, left, bottom, right = numbers
        if not (top < bottom and left < right):
            raise InputError(
                f"{place}: box {part!r}: top, left, bottom and right in pixels are expected, such "
                "as '10 20 74 84; 100 20 164 84': mend it"
            )
        boxes.append((top, left, bottom, right))
    return tuple(boxes)


def _targets(row: dict[str, str], indicators: Sequence[str], place: str) -> tuple[float, ...]:
    """The indicators of a line."""
    values = []
    for name in indicators:
        text = row[name]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            what = f"is {text!r}, a number such as 5.1 is expected" if text else "is empty"
            raise InputError(
                f"{place}: {row['case']}: {name} {what}: fill it in, or drop the case with "
                f"--exclude={row['case']}"
            )
        values.append(value)
    return tuple(values)


def _path(folder: pathlib.Path, text: str, encoding: str) -> pathlib.Path:
    """A path of the list; a list in another encoding than UTF-8 may name files by its own bytes."""
    path = folder / os.path.expanduser(text)
    if encoding == _WINDOWS and not os.path.exists(path):
        raw = folder / os.fsdecode(os.path.expanduser(text).encode(encoding))
        if os.path.exists(raw):
            return raw
    return path


def _refuse_repeats(cases: Sequence[Case], csv_path: pathlib.Path) -> None:
    """Every name once, and every scan once."""
    # Names become file names, and some file systems ignore case.
    counts = collections.Counter(case.name.casefold() for case in cases)
    scans: dict[str, Case] = {}
    for case in cases:
        if counts[case.name.casefold()] > 1:
            raise InputError(
                f"{csv_path}: case {case.name} stands on {counts[case.name.casefold()]} lines "
                "(upper and lower case alike), 1 expected: rename or remove"
            )
        first = scans.setdefault(os.path.realpath(case.scan), case)
        if first is not case:
            raise InputError(
                f"{csv_path}: case {case.name} ({case.split}) has the scan of case {first.name} "
                f"({first.split}), {case.scan}, each scan once expected: mend the path, or drop "
                f"one with --exclude={case.name}"
            )


def _refuse_leaks(cases: Sequence[Case], csv_path: pathlib.Path) -> None:
    """One split for each patient, upper and lower case alike."""
    split_of: dict[str, str] = {}
    for case in cases:
        split = split_of.setdefault(case.patient.casefold(), case.split)
        if split != case.split:
            raise InputError(
                f"{csv_path}: patient {case.patient} is in split {split} and, with case "
                f"{case.name}, in {case.split}; one split expected: move all of a patient's scans "
                "into one"
            )
