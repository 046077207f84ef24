"""Find lesions in scans, classify them, and show the evidence.

    deepsc predict --checkpoint=WORKDIR --scan=scan.nii.gz --out=DIR
    deepsc predict --checkpoint=WORKDIR --scans=FOLDER --out=DIR [--share=I/N]

A scan is a NIfTI, NRRD or MetaImage file, or a folder of DICOM slices; of a network of X-rays it is
a PNG, JPEG or DICOM file. --scans takes all below a folder. For each scan, DIR/NAME holds
lesion_mask, lesion_probability and evidence_1..3 as NIfTI on its own grid, result.json, picture.png
and, where the extra `report` is installed, report.html, a page to look at the scan in; for each
X-ray evidence_1.png, result.json and picture.png. Of a DICOM series there are segmentation.dcm,
report.dcm and evidence_1..3.dcm too, and NAME is a hash: nothing that is written names a patient,
but with --keep_identifiers. --scans adds a table, DIR/predictions.csv. A scan
whose result is whole and was made from the same content by the same network is not predicted again,
so a run that was stopped in whatever way goes on with the same command; on SIGTERM it exits with 75
(`exit_codes.PREEMPTED`). A scan that cannot be predicted is named in one line, the others are done,
and the exit code is 1; 74 where the disk was full or failed.

The result of one scan never takes the place of another's. What was not written here, or was changed
since, is never replaced: a prediction that would is refused, and says by which file. Research
software, not for clinical use.
"""

# The worker processes import this file too, and have no use for JAX: nothing here imports it before
# `main` does.
import contextlib
import csv
import dataclasses
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Sequence

from absl import flags

from deepsc_jax.config import Modality
from deepsc_jax.data.datasets import parse_boxes
from deepsc_jax.data.source import KINDS
from deepsc_jax.inference import identifiers, requests
from deepsc_jax.inference.options import define_flags as define_options
from deepsc_jax.inference.options import from_flags
from deepsc_jax.inference.requests import Found
from deepsc_jax.inference.results import Outcome
from deepsc_jax.inference.workers import BatchInference
from deepsc_jax.report.scan_page import PAGE
from deepsc_jax.report.viewer import installed
from deepsc_jax.runtime.errors import FileSystemError, InputError
from deepsc_jax.runtime.files import local_path, own, require_own, require_writable
from deepsc_jax.runtime.names import cell, counted, shown
from deepsc_jax.runtime.types import JsonObject

MOST_WORKERS = 8  # by default: a worker may take 2 GiB at 512x512x300


def describe(result: dict) -> str:
    """One line about a result."""
    parts = []
    if "class" in result:
        name = result["class"]
        parts.append(f"{name} ({result['probabilities'][name]:.0%})")
    if "lesion_ml" in result:
        share = result["lesion_share_of_lung"]
        parts.append(f"{result['lesion_ml']:.0f} ml of lesion, {share:.1%} of the lungs")
    parts += [
        f"{name} {'–' if value is None else f'{value:.4g}'}"
        for name, value in result.get("values", {}).items()
    ]
    if result["trained_on"] not in ("scans", "X-rays"):
        parts.append(f"by a network trained on {result['trained_on']}")
    return ", ".join(parts)


def write_table(outcomes: Sequence[Outcome], path: pathlib.Path) -> None:
    """Write a CSV file of a row per scan, sorted by name: its result's figures, or its error.

    Names are shown, and never formulas; result.json has paths as they are.

    Raises:
      InputError: another file is there.
      FileSystemError: the disk takes none.
    """
    results = [outcome.result or {} for outcome in outcomes]
    classes = dict.fromkeys(name for r in results for name in r.get("probabilities", ()))
    figures = ["class", *classes, "lesion_ml", "lesion_share_of_lung", "lung_ml"]
    columns = dict.fromkeys(["name", "scan", *figures, "notes", "error"])
    try:
        with own(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, columns, extrasaction="ignore")
            rows.writerow({column: cell(column) for column in columns})
            for outcome in sorted(outcomes, key=lambda outcome: outcome.request.name):
                result: JsonObject = outcome.result or {"error": outcome.error}
                row = {**result, **result.get("probabilities", {})}
                row |= {"name": outcome.request.name, "scan": outcome.request.label}
                row["notes"] = "; ".join((*outcome.notes, *result.get("notes", ())))
                texts = {key: cell(value) for key, value in row.items() if isinstance(value, str)}
                rows.writerow(row | texts)
    except OSError as error:
        raise FileSystemError(
            f"{path}: cannot be written ({error.strerror}): the results are whole; free some space "
            "and start again for the table"
        ) from error


def summary(
    outcomes: Sequence[Outcome], total: int, seconds: float, busy: float, left_out: int = 0
) -> str:
    """One line about a run: what became of the scans, how fast, and how busy the device was."""
    made = sum(1 for o in outcomes if o.result is not None and not o.skipped)
    parts = [f"{made} of {total} scans predicted"]
    noted = sum(1 for o in outcomes if o.notes or (o.result or {}).get("notes"))
    for count, what in (
        (sum(o.skipped for o in outcomes), "already there"),
        (sum(o.result is None for o in outcomes), "failed"),
        (noted, "with notes"),
        (left_out, "left out"),
    ):
        if count:
            parts.append(f"{count} {what}")
    line = ", ".join(parts)
    if made:
        line += (
            f" in {seconds:.0f} s: {3600 * made / seconds:.0f} scans/hour; the network took "
            f"{busy / seconds:.0%} of the time and waited for scans {1 - busy / seconds:.0%}"
        )
    return line


def utilisation(busy: float, first: float, voxels: int, peak: int) -> str:
    """A line on the network: `voxels` in `busy` less `first` seconds; `peak` bytes of memory."""
    parts = []
    if voxels:
        parts.append(f"{voxels / max(busy - first, 1e-9):.3g} voxels/s")
    parts.append(f"{first / busy:.0%} of its time on the first scan of a shape, compiling")
    return "the network: " + ", ".join([*parts, f"at most {peak / 2**20:.0f} MiB"])


def whereabouts(
    outcomes: Sequence[Outcome], out: pathlib.Path, table: pathlib.Path | None
) -> list[str]:
    """Where the results are: a line of one scan's files, or of all scans' folders and the table."""
    there = [outcome for outcome in outcomes if outcome.result is not None]
    if not there:
        return []
    name = there[0].request.name if len(there) == 1 else "NAME"
    files = ["result.json", *(there[0].result or {}).get("files", ())]
    lines = [shown(f"results: {out / name}: {', '.join(files)}")]
    return lines if table is None else [*lines, shown(f"table: {table}")]


def without_page(outcomes: Sequence[Outcome]) -> list[str]:
    """A line on how to get the pages of scans, where results have none."""
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    if not results or all(PAGE in result["files"] for result in results):
        return []
    install = "" if installed() else "pip install 'deepsc_jax[report]', then "
    return [f"to look at scans in a browser ({PAGE}): {install}the same command with --overwrite"]


def define_flags() -> None:
    """Define the flags of this command."""
    define_options()
    flags.DEFINE_multi_string("scan", [], "Scan file or DICOM folder; repeat for more.")
    flags.DEFINE_string(
        "scans",
        None,
        "Folder: every scan file and DICOM folder below it; their results are named by their "
        "paths in it. Or a text file that lists one path a line.",
    )
    flags.DEFINE_string("share", None, "I/N: of the scans every N-th from the I-th on, from 0.")
    flags.DEFINE_multi_string("lung_mask", [], "Lung mask of each --scan; default: found.")
    flags.DEFINE_multi_string(
        "lesion_mask",
        [],
        "Lesion mask of each --scan, for a network that reads patches of lesions.",
    )
    flags.DEFINE_multi_string(
        "boxes",
        [],
        "In place of a mask, boxes around the lesions of each --scan, an X-ray: top, left, bottom "
        "and right in pixels, such as '10 20 74 84; 100 20 164 84'.",
    )
    flags.DEFINE_bool(
        "keep_identifiers",
        False,
        "Of DICOM: copy the patient module into what is written as DICOM, and write a local map, "
        "identifiers.csv, of results' names, folders and patients.",
    )
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Predict scans again whose result is there; one whose file was changed, too.",
    )
    flags.DEFINE_multi_enum(
        "allow",
        [],
        KINDS,
        "Predict scans of doubtful geometry or values, with a note in the result: voxels (their "
        "sizes), lungs (their volume), intensity (no HU). Repeat for more.",
    )
    flags.DEFINE_integer(
        "workers",
        None,
        f"Processes that read and write; default: one a core, at most {MOST_WORKERS}; 0 for none.",
        lower_bound=0,
    )
    flags.DEFINE_enum(
        "conv_form",
        "auto",
        ["auto", "direct"],
        "direct, on a CPU for many scans: by oneDNN, faster, but compiled anew at each start. It "
        "needs JAX 0.11.",
    )


def main() -> int:
    """Predict the scans; 1, or FILE_SYSTEM, if one of them could not be predicted."""
    from deepsc_jax.inference import ensemble
    from deepsc_jax.runtime import exit_codes
    from deepsc_jax.runtime.memory import peak_bytes

    options = flags.FLAGS
    out = local_path("out", options.out)
    named, table = _requests(out)
    wanted = named.requests
    require_writable("out", out)
    if table is not None:
        require_own(table)
    for note in named.notes:
        print(f"note: {shown(note)}", file=sys.stderr, flush=True)
    checkpoints = [local_path("checkpoint", path) for path in options.checkpoint]
    if options.keep_identifiers:
        wanted = [dataclasses.replace(request, keep_identifiers=True) for request in wanted]
        name = (
            "identifiers.csv" if table is None else table.name.replace("predictions", "identifiers")
        )
        identifiers.write_map(wanted, out / name)
    predictor = ensemble.load(checkpoints, options.stage, from_flags(), options.conv_form)
    workers = _workers(options.workers, len(wanted))
    batch = BatchInference(
        predictor, out, workers=workers, overwrite=options.overwrite, allow=options.allow
    )
    signal.signal(signal.SIGTERM, lambda *_: batch.stop())
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    try:
        with contextlib.closing(batch.outcomes(wanted)) as coming:
            for outcome in coming:
                outcomes.append(outcome)
                _say(outcomes, len(wanted), begun, notes=table is None)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return exit_codes.INTERRUPTED
    if table is not None:
        write_table(outcomes, table)
    for note in twins(outcomes):
        print(f"note: {shown(note)}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - begun
    line = summary(outcomes, len(wanted), seconds, batch.busy_seconds, named.left_out)
    if batch.busy_seconds:
        line += "\n" + utilisation(
            batch.busy_seconds, batch.first_seconds, batch.voxels, peak_bytes()
        )
    lines = [line, *without_page(outcomes), *whereabouts(outcomes, out, table)]
    print("\n".join(lines), flush=True)
    if len(outcomes) < len(wanted):
        left = counted(len(wanted) - len(outcomes), "scan")
        print(f"SIGTERM: {left} left; start it again to go on")
        return exit_codes.PREEMPTED
    failed = [outcome.code for outcome in outcomes if outcome.result is None]
    if failed:
        print(f"{len(failed)} of {len(wanted)} scans could not be predicted", file=sys.stderr)
    return max(failed, default=exit_codes.DONE)


def twins(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each content that several of the scans have."""
    scans: dict[str, list[str]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.request.name):
        if outcome.result is not None:
            scans.setdefault(outcome.result["sha256"], []).append(outcome.request.label)
    return [
        f"{paths[0]} and {paths[1]}{f', and {n - 2} more,' if n > 2 else ''} have the same content"
        for paths in scans.values()
        if (n := len(paths)) > 1
    ]


def _requests(out: pathlib.Path) -> tuple[Found, pathlib.Path | None]:
    """The scans to predict, and where their table goes."""
    options = flags.FLAGS
    if bool(options.scan) == (options.scans is not None):
        raise InputError("--scan and --scans: give one of them")
    if options.scan:
        masks = [local_path("lung_mask", path) for path in options.lung_mask]
        paths = [local_path("scan", path) for path in options.scan]
        reasons = [_missing(path) for path in paths]
        if all(reasons):  # told before the network is loaded
            others = f", and so for the {len(paths) - 1} others" if len(paths) > 1 else ""
            raise InputError(f"--scan={paths[0]}: {reasons[0]}{others}: check the path")
        lesions = [local_path("lesion_mask", path) for path in options.lesion_mask]
        boxes = [parse_boxes(text, "--boxes") for text in options.boxes]
        named, table = Found(requests.of_paths(paths, masks, lesions, boxes)), None
    else:
        for flag in ("lung_mask", "lesion_mask", "boxes"):
            if getattr(options, flag):
                raise InputError(f"--{flag}: goes with --scan, but --scans is given")
        source, table = local_path("scans", options.scans), out / "predictions.csv"
        folder = os.path.isdir(source)
        named = (
            requests.below(source, out, _modality(options.checkpoint[:1]))
            if folder
            else requests.listed(source)
        )
    for request in named.requests if table is not None else ():
        if re.match(r"(predictions|identifiers)(-\d+-of-\d+)?\.csv(\.sha256)?(/|$)", request.name):
            raise InputError(
                f"{request.path}: its result would be {out / request.name}, the table's place: "
                "rename the scan, or give it as --scan"
            )
    if options.share is not None:
        named = dataclasses.replace(named, requests=requests.share(named.requests, options.share))
        index, count = options.share.split("/")
        table = table and out / f"predictions-{index}-of-{count}.csv"
    return named, table


def _modality(checkpoints: Sequence[str]) -> Modality:
    """What the network reads; `ct` where it cannot be told, which loading it will say."""
    from deepsc_jax.config.run import load
    from deepsc_jax.models import registry

    try:
        config = local_path("checkpoint", checkpoints[0]) / "config.json"
        return load(config, registry.options).data.modality
    except (InputError, IndexError):
        return "ct"


def _missing(path: pathlib.Path) -> str | None:
    """Why nothing is found at `path`; None if something is there."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _workers(asked: int | None, scans: int) -> int:
    """How many processes read and write; none for a single scan."""
    if scans < 2 or sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(min(cores, MOST_WORKERS) if asked is None else asked, scans)


def _say(outcomes: Sequence[Outcome], total: int, begun: float, *, notes: bool) -> None:
    """A line about the last outcome, if there is something to say, and its notes, if wanted."""
    last, seconds = outcomes[-1], time.monotonic() - begun
    name = last.request.name
    if last.error is not None:
        print(f"error: {shown(last.error)}", file=sys.stderr, flush=True)
    elif last.result is not None and not last.skipped:
        line = f"{name}: {describe(last.result)} ({last.seconds:.1f} s)"
        if total > 1:
            made = sum(not outcome.skipped for outcome in outcomes)
            minutes, rest = divmod(round(seconds / made * (total - len(outcomes))), 60)
            line = f"{len(outcomes)}/{total}  {line}  {minutes}:{rest:02d} left"
        print(shown(line), flush=True)
    if notes:
        for note in (*last.notes, *(last.result or {}).get("notes", ())):
            print(shown(f"note: {name}: {note}"), file=sys.stderr, flush=True)


def run() -> None:
    """Run this command."""
    from deepsc_jax.runtime import entry

    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
