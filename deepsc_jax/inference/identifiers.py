"""The local map of `--keep_identifiers`: which patient and which folder a result's name stands for.

It is the only file that says it beside the DICOM objects, and is for its owner alone (mode 0600).
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from deepsc_jax.data import dicom_source
from deepsc_jax.data.content import content_files, is_dicom
from deepsc_jax.inference.request import Request
from deepsc_jax.runtime.errors import FileSystemError, InputError
from deepsc_jax.runtime.files import own, require_own
from deepsc_jax.runtime.names import cell

COLUMNS: tuple[str, ...] = ("name", "scan", "PatientName", "PatientID")


def write_map(requests: Sequence[Request], path: Path) -> None:
    """Write a row for each request of DICOM; those of earlier runs stay.

    Args:
      requests: all of a run.
      path: of the CSV file.

    Raises:
      InputError: another file is there.
      FileSystemError: the disk takes none.
    """
    rows = {row["name"]: row for row in _earlier(path)}
    for request in requests:
        if request.private:
            names = _patient(request.path)
            row = {"name": request.name, "scan": os.path.realpath(request.path), **names}
            rows[request.name] = {key: cell(value) for key, value in row.items()}
    try:
        with own(path) as partial:
            partial.chmod(0o600)
            with partial.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
                table.writeheader()
                table.writerows(rows[name] for name in sorted(rows))
    except OSError as error:
        raise FileSystemError(
            f"{path}: cannot be written ({error.strerror}): free some space"
        ) from error


def _earlier(path: Path) -> list[dict[str, str]]:
    if require_own(path) is None:
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _patient(path: Path) -> dict[str, str]:
    """Name and ID in the first DICOM file there; none where pydicom is missing or it has none."""
    if not dicom_source.installed():
        return {}
    try:
        files = [file for file in content_files(path) if is_dicom(file)]
        return dicom_source.patient(files[0]) if files else {}
    except (InputError, OSError):
        return {}
