"""The case list: which scans there are, whose they are, what they show, and which split has them.

A case list is a CSV file with the columns of `COLUMNS`. Paths are relative to the file's folder; a
mask that does not exist is an empty cell. A scan may be a NIfTI file or a folder of DICOM files.
"""

import collections
import csv
import dataclasses
import pathlib
import re
from collections.abc import Sequence

from deepsc_jax.config import CLASSES
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside

COLUMNS = ("case", "patient", "split", "label", "scan", "lesion_mask", "lung_mask")
SPLITS = ("train", "validation", "test")

# A case's name becomes a folder of the store and the stem of result files.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a case list.

    Attributes:
      name: unique; letters, digits, `.`, `_` and `-`.
      patient: whose scan it is; all scans of a patient are in one split.
      split: one of `SPLITS`.
      label: index into `config.CLASSES`.
      scan: NIfTI file or DICOM folder, absolute.
      lesion_mask: None where no lesions were drawn; for non-pneumonia that means there are none.
      lung_mask: None where the lungs are to be found.
    """

    name: str
    patient: str
    split: str
    label: int
    scan: pathlib.Path
    lesion_mask: pathlib.Path | None = None
    lung_mask: pathlib.Path | None = None

    def files(self) -> list[pathlib.Path]:
        """The paths that must exist."""
        return [path for path in (self.scan, self.lesion_mask, self.lung_mask) if path is not None]


def read_cases(
    csv_path: str | pathlib.Path,
    exclude: Sequence[str] = (),
    check_files: bool = True,
    failures: list[str] | None = None,
) -> list[Case]:
    """Read a case list, in the order of its lines.

    Args:
      csv_path: the CSV file.
      exclude: names of cases to leave out; what is wrong with them does not matter.
      check_files: refuse the list if one of its files is missing.
      failures: where given, lines with an unknown label or the like are left out, and what is
        wrong with each is added here.

    Raises:
      InputError: no such file, a column is missing, an unknown label or split, a case named twice
        or not at all, a patient in two splits, a missing file, a name in `exclude` that is not
        there.
    """
    csv_path = pathlib.Path(csv_path)
    rows = _read_rows(csv_path)
    folder = csv_path.absolute().parent
    unknown = sorted(set(exclude) - {row["case"] for _, row in rows})
    if unknown:
        raise InputError(f"--exclude={unknown[0]}: no such case in {csv_path}: mend the name")
    cases = []
    for line, row in rows:
        if row["case"] in exclude:
            continue
        try:
            cases.append(_case(row, folder, f"{csv_path}, line {line}"))
        except InputError as error:
            if failures is None:
                raise
            failures.append(str(error))
    _refuse_repeats(cases, csv_path)
    if not cases and not failures:
        raise InputError(f"{csv_path}: no cases found, at least 1 expected: add a line per scan")
    _refuse_leaks(cases, csv_path)
    if check_files:
        missing = [(case, path) for case in cases for path in case.files() if not path.exists()]
        if missing:
            case, path = missing[0]
            others = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
            raise InputError(f"{missing_file(case, path)}{others}")
    return cases


def missing_file(case: Case, path: pathlib.Path) -> str:
    """The line that says so."""
    return (
        f"{case.name}: {path} does not exist: mend the path or drop the case with "
        f"--exclude={case.name}"
    )


def write_cases(cases: Sequence[Case], csv_path: pathlib.Path) -> None:
    """Write a case list.

    Paths inside the list's folder are written relative to it, so that the folder can be moved; the
    others as absolute paths.
    """
    folder = csv_path.absolute().parent
    with aside(csv_path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for case in cases:
            paths = (case.scan, case.lesion_mask, case.lung_mask)
            writer.writerow(
                [case.name, case.patient, case.split, CLASSES[case.label]]
                + [relative_path(path, folder) for path in paths]
            )


def relative_path(path: pathlib.Path | None, folder: pathlib.Path) -> str:
    """`path` relative to `folder` where it lies inside, else absolute; "" for None."""
    if path is None:
        return ""
    path = path.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _read_rows(csv_path: pathlib.Path) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows, whitespace stripped, blank lines left out."""
    if not csv_path.is_file():
        raise InputError(f"{csv_path}: no such case list: give a CSV file with {','.join(COLUMNS)}")
    try:
        with csv_path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="", skipinitialspace=True)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise InputError(
                    f"{csv_path}: no column {', '.join(absent)} in its first line; expected "
                    f"{','.join(COLUMNS)}: add it (mask cells may be empty)"
                )
            rows = [(reader.line_num, {k: row[k].strip() for k in COLUMNS}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{csv_path}: not a CSV text file ({error}): save it as UTF-8") from error
    return [(line, row) for line, row in rows if any(row.values())]


def _case(row: dict[str, str], folder: pathlib.Path, place: str) -> Case:
    name, split, label = row["case"], row["split"], row["label"]
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{place}: case {name!r}: a name of letters, digits, '.', '_' and '-' is expected: "
            "rename it"
        )
    if label not in CLASSES:
        raise InputError(
            f"{place}: {name}: label {label!r} is unknown, expected one of {', '.join(CLASSES)}: "
            f"mend it, or drop the case with --exclude={name}"
        )
    if split not in SPLITS:
        raise InputError(
            f"{place}: {name}: split {split!r} is unknown, expected one of {', '.join(SPLITS)}: "
            f"mend it, or drop the case with --exclude={name}"
        )
    for column in ("patient", "scan"):
        if not row[column]:
            raise InputError(f"{place}: {name}: {column} is empty: fill it in")
    scan, lesion_mask, lung_mask = (
        folder / row[column] if row[column] else None
        for column in ("scan", "lesion_mask", "lung_mask")
    )
    assert scan is not None
    return Case(name, row["patient"], split, CLASSES.index(label), scan, lesion_mask, lung_mask)


def _refuse_repeats(cases: Sequence[Case], csv_path: pathlib.Path) -> None:
    # Names become file names, and some file systems ignore case.
    counts = collections.Counter(case.name.lower() for case in cases)
    for case in cases:
        if counts[case.name.lower()] > 1:
            raise InputError(
                f"{csv_path}: case {case.name} stands on {counts[case.name.lower()]} lines (upper "
                "and lower case alike), 1 expected: rename or remove"
            )


def _refuse_leaks(cases: Sequence[Case], csv_path: pathlib.Path) -> None:
    """One split for each patient, upper and lower case alike, and for each file."""
    split_of: dict[tuple[str, str], str] = {}
    for case in cases:
        same = {"patient": case.patient.casefold(), "scan": str(case.scan.resolve())}
        for kind, value in same.items():
            split = split_of.setdefault((kind, value), case.split)
            if split != case.split:
                what = case.patient if kind == "patient" else case.scan
                raise InputError(
                    f"{csv_path}: {kind} {what} is in split {split} and, with case {case.name}, in "
                    f"{case.split}; one split expected: move all of a patient's scans into one"
                )
