"""Another evaluation of the same scans: read from its folder, or made of another run."""

import hashlib
import json
import pathlib
from collections.abc import Sequence

from deepsc_jax.data.records import StoredCase
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path
from deepsc_jax.runtime.types import JsonObject

SUMMARY, SCANS = "metrics.json", "scans.json"


def digest_of(cases: Sequence[StoredCase]) -> str:
    """The SHA-256 of what is evaluated: sources, patients and labels, whatever order they are in.

    Not of how a store prepared them: figures are of the sources' own grids.
    """
    facts = [
        [case.name, case.patient, case.label, case.lesions_known, sorted(case.sums.items())]
        for case in cases
    ]
    return hashlib.sha256(json.dumps(sorted(facts)).encode()).hexdigest()


def is_evaluation(folder: pathlib.Path) -> bool:
    """Whether `evaluate` wrote its results there."""
    return (folder / SUMMARY).is_file() and (folder / SCANS).is_file()


def against_path(text: str) -> pathlib.Path:
    """The folder that --against names.

    Raises:
      InputError: it is neither an evaluation's nor a run's.
    """
    folder = local_path("against", text)
    if not (is_evaluation(folder) or (folder / "config.json").is_file()):
        raise InputError(
            f"--against={folder}: neither {SUMMARY} and {SCANS} nor config.json is in it, expected "
            "the --out of `evaluate` or the --workdir of `train`: check the path"
        )
    return folder


def read_evaluation(
    folder: pathlib.Path, cases: Sequence[StoredCase], classes: Sequence[str]
) -> tuple[JsonObject, list[JsonObject]]:
    """The summary and the rows, in the order of `cases`, of an evaluation of the same scans.

    Raises:
      InputError: it cannot be read, was of other scans or classes, or of a version that does not
        say of which.
    """
    try:
        summary, rows = (
            json.loads((folder / name).read_text("utf-8")) for name in (SUMMARY, SCANS)
        )
        by_case = {row["case"]: row for row in rows}
        digest = summary.get("scans_sha256")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"--against={folder}: not what `evaluate` wrote ({error!r}): evaluate again"
        ) from error
    if digest is None:
        raise InputError(
            f"--against={folder}: {SUMMARY} does not say of which scans it is: evaluate again"
        )
    if digest != digest_of(cases) or by_case.keys() != {case.name for case in cases}:
        raise InputError(
            f"--against={folder}: is of other scans, truth or labels ({len(by_case)} scans, here "
            f"{len(cases)}): evaluate both on the same split of the same data"
        )
    named = summary.get("classes", {}).get("classes", list(classes))
    if named != list(classes):
        raise InputError(
            f"--against={folder}: has the classes {','.join(map(str, named))}, here "
            f"{','.join(classes)}: compare networks of the same classes"
        )
    return summary, [by_case[case.name] for case in cases]
