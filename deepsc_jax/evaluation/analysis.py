"""The lesions of every scan of a store, measured as section III.B of the paper does. Needs no JAX.

Masks and HU are those of the sources, on their own grids, and not of the store's working grid.
"""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from deepsc_jax.data.records import StoredCase
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.sources import source_case
from deepsc_jax.metrics import cohort
from deepsc_jax.metrics.cohort import Cohort
from deepsc_jax.metrics.findings import (
    MIN_COMPONENT_ML,
    PERIPHERY_MM,
    THICKNESSES_MM,
    ScanFindings,
    scan_findings,
)
from deepsc_jax.metrics.statistics import RESAMPLES
from deepsc_jax.metrics.tables import aligned
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import cell, counted, shown
from deepsc_jax.runtime.pool import in_parallel
from deepsc_jax.runtime.types import JsonObject


@dataclasses.dataclass(frozen=True)
class Options:
    """How lesions are measured.

    Attributes:
      split: of the store; None for all.
      smallest_lesion_ml: connected lesions below it are in no figure.
      volumetric: the periphery is what a ball erodes, not a disc in each slice.
      resamples: of each interval and test.
      seed: of their draws.
    """

    split: str | None = None
    smallest_lesion_ml: float = MIN_COMPONENT_ML
    volumetric: bool = False
    resamples: int = RESAMPLES
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MeasuredScan:
    """A scan's findings, and what the store says of it."""

    case: str
    patient: str
    split: str
    label: str
    findings: ScanFindings


def measured(
    store: Store, options: Options, *, workers: int = 1
) -> tuple[list[MeasuredScan], list[str]]:
    """The findings of every scan whose lesions are known, and a line for each that failed.

    Raises:
      InputError: the store has no volumes, or no such scan with lesions.
    """
    data = store.data
    if data.modality != "ct" or data.patches != "none":
        made = "--modality=xray" if data.modality != "ct" else f"--patches={data.patches}"
        raise InputError(
            f"{store.path}: made with {made}: whole CT scans are analysed: prepare them without"
        )
    cases = [case for case in store.cases(options.split) if case.lesions_known]
    if not any(case.lesion_voxels for case in cases):
        where = f"split {options.split}" if options.split else "the store"
        raise InputError(
            f"{store.path}: no scan of {where} has a known lesion, at least 1 expected: add lesion "
            "masks to the case list and prepare again, or choose another --split"
        )
    job = functools.partial(
        _measure,
        path=store.path,
        min_ml=options.smallest_lesion_ml,
        volumetric=options.volumetric,
    )
    results = in_parallel(job, cases, workers, "analyze")
    rows, failures = list[MeasuredScan](), list[str]()
    for case, found in zip(cases, results, strict=True):
        if isinstance(found, InputError):
            failures.append(str(found))
        else:
            label = data.classes[case.label]
            rows.append(MeasuredScan(case.name, case.patient, case.split, label, found))
    if not any(row.findings.count for row in rows):
        raise InputError(failures[0] if failures else f"{store.path}: no scan has a lesion")
    return rows, failures


@functools.cache
def _opened(path: str) -> Store:
    """The store, once in each process; whether it is complete was seen before."""
    return Store(path, complete=False)


def _measure(case: StoredCase, path: str, min_ml: float, volumetric: bool) -> ScanFindings:
    store = _opened(path)
    source = source_case(store, case, store.data.intensity)
    return scan_findings(
        source.lesion,
        source.lung,
        source.values if store.data.intensity == "hu" else None,
        source.spacing_mm,
        min_ml=min_ml,
        volumetric=volumetric,
    )


def cohorts(rows: Sequence[MeasuredScan], classes: Sequence[str]) -> dict[str, Cohort]:
    """The scans with lesions of each class that has some, in the order of the classes."""
    found = {}
    for name in classes:
        of_class = [row for row in rows if row.label == name and row.findings.count]
        if of_class:
            patients = [row.patient for row in of_class]
            found[name] = cohort.cohort([row.findings for row in of_class], patients)
    return found


def document(store: Store, rows: Sequence[MeasuredScan], options: Options) -> JsonObject:
    """What analysis.json holds: every class's figures, differences, and how they were made."""
    classes = cohorts(rows, store.data.classes)
    drawn = {"resamples": options.resamples, "seed": options.seed}
    cases = store.cases(options.split)
    with_figures = {name: cohort.summary(found, **drawn) for name, found in classes.items()}
    for index, name in enumerate(store.data.classes):
        free = sum(row.label == name and not row.findings.count for row in rows)
        unknown = sum(case.label == index and not case.lesions_known for case in cases)
        counts = {"without_lesions": free, "lesions_unknown": unknown}
        with_figures.setdefault(name, {"scans": 0})
        with_figures[name] |= counts
    return {
        "classes": with_figures,
        "comparisons": cohort.comparisons(classes, **drawn),
        "method": {
            "split": options.split or "all",
            "smallest_lesion_ml": options.smallest_lesion_ml,
            "periphery": "volume" if options.volumetric else "slices",
            "plr_thickness_mm": PERIPHERY_MM,
            "intensity": store.data.intensity,
            "intervals": "percentile bootstrap over patients, level 0.95",
            "tests": "permutation of patients between two classes, two-sided; Holm over all",
            **drawn,
        },
        "analysed": store.contents,
    }


def write_scans(rows: Sequence[MeasuredScan], path: pathlib.Path) -> None:
    """Write the CSV of scans, one row each; a cell is empty where its figure is undefined."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["case", "split", "class", *_FIELDS, *(f"plr_{mm}_mm" for mm in THICKNESSES_MM)]
        writer.writerow(names)
        for row in rows:
            found = row.findings
            numbers = [_FIELDS[name](found) for name in _FIELDS] + found.plr.tolist()
            texts = ["" if number != number else f"{number:.6g}" for number in numbers]
            writer.writerow([cell(row.case), row.split, cell(row.label), *texts])


def _largest(axis: int):
    """The largest lesion's side, of its bounding box."""

    def side(found: ScanFindings) -> float:
        sizes = found.sizes_mm
        return float(sizes[sizes.prod(axis=1).argmax(), axis]) if len(sizes) else float("nan")

    return side


_FIELDS = {
    "lesions": lambda found: found.count,
    "lvr": lambda found: found.lvr,
    "lesion_ml": lambda found: found.lesion_ml,
    "lung_ml": lambda found: found.lung_ml,
    "outside_lung": lambda found: found.outside_lung,
    "spread_mm": lambda found: found.spread_mm,
    "largest_width_mm": _largest(2),
    "largest_length_mm": _largest(1),
    "largest_height_mm": _largest(0),
}


def table(document: JsonObject) -> str:
    """The figures of the classes that have lesions, as text to print."""
    classes = {name: found for name, found in document["classes"].items() if found["scans"]}
    head = ["finding", *(f"{shown(name)} (n={found['scans']})" for name, found in classes.items())]
    lines = []
    for key, figure in cohort.FIGURES.items():
        cells = [_spelled(found["figures"][key], figure.digits) for found in classes.values()]
        lines.append([f"{figure.finding} {figure.title}", *cells])
    peaks = [str(len(found["hu_peaks"])) for found in classes.values()]
    lines.append(["3 peaks of the distribution of HU", *peaks])
    notes = ["95 % intervals over patients in brackets"]
    left = [
        f"{shown(name)}: {counted(found[key], 'scan')} {said}"
        for name, found in document["classes"].items()
        for key, said in (("without_lesions", "without a lesion"), ("lesions_unknown", "unmasked"))
        if found[key]
    ]
    return "\n".join([aligned([head, *lines]), *notes, *left])


def _spelled(figure: JsonObject, digits: int) -> str:
    if figure["value"] is None:
        return "-"
    text = f"{figure['value']:.{digits}f}"
    if figure["low"] is None:
        return text
    return f"{text} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
