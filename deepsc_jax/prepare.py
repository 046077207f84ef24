"""Make a store of preprocessed scans, of your own cases or of phantoms.

    python -m deepsc_jax.prepare --flagfile=configs/phantom.flags --phantoms=150,45,60 --out=DIR
    python -m deepsc_jax.prepare --flagfile=configs/deepsc.flags --cases=cases.csv --out=DIR

The store is DIR/store; the case list is beside it as DIR/cases.csv, and phantoms as DIR/scans. A
case that cannot be prepared is named in one line and left out, the others are written, and the exit
code is 1.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from absl import flags

from deepsc_jax import __version__, config
from deepsc_jax.config import flags as config_flags
from deepsc_jax.data import datasets, lungs, scans, store
from deepsc_jax.data.datasets import SPLITS, Case
from deepsc_jax.data.preprocess import Prepared, prepare_scan
from deepsc_jax.models import registry
from deepsc_jax.phantoms import lesions as phantom
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside, write_json
from deepsc_jax.runtime.progress import Progress

# Of a case's lesion voxels, outside of its lung mask: more than this is worth a line.
_LESION_OUTSIDE = 0.1


def prepare(
    cases: Sequence[Case],
    out: pathlib.Path,
    data: config.DataConfig,
    *,
    workers: int = 2,
    overwrite: bool = False,
    phantoms: bool = False,
) -> list[str]:
    """Preprocess `cases` into `out`/store, which appears only when it is complete.

    What a stopped run has done is found in `out`/store.partial and not done again. `phantoms` says
    what the scans are.

    Returns:
      One line for each case that could not be prepared and was left out. If that is all of them,
      there is no store.

    Raises:
      InputError: there is a store already, and `overwrite` does not allow to replace it.
    """
    final, partial = out / "store", out / "store.partial"
    refuse_existing(out, overwrite)
    (partial / "cases").mkdir(parents=True, exist_ok=True)
    job = functools.partial(prepare_case, folder=partial, data=data)
    records, failures = [], []
    for case, result in zip(cases, _in_parallel(job, cases, workers, "store"), strict=True):
        if isinstance(result, InputError):
            text = str(result)
            failures.append(text if text.startswith(f"{case.name}:") else f"{case.name}: {text}")
        else:
            records.append(result)
    if not records:
        shutil.rmtree(partial)
        return failures
    names = {record.name for record in records}
    for folder in (partial / "cases").iterdir():
        if folder.name not in names:
            shutil.rmtree(folder)
    store.write_index(partial, data, records, final, phantoms=phantoms)
    replaced = out / "store.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return failures


def refuse_existing(out: pathlib.Path, overwrite: bool) -> None:
    """Raise InputError if `out` holds a store that may not be replaced."""
    if (out / "store").exists() and not overwrite:
        raise InputError(
            f"{out / 'store'}: there is a store already: choose another --out, or replace it with "
            "--overwrite"
        )


def prepare_case(case: Case, folder: pathlib.Path, data: config.DataConfig) -> store.StoredCase:
    """Load, preprocess and write one case into the store at `folder`, unless that is done."""
    made_from = _made_from(case, data)
    done = folder / "cases" / case.name / "record.json"
    try:
        document = json.loads(done.read_text(encoding="utf-8"))
        if document["made_from"] == made_from:
            return store.record_from_json(document["record"], folder.parent)
    except (OSError, KeyError, TypeError, ValueError):
        pass  # not begun, or stopped on the way
    done.unlink(missing_ok=True)
    record = store.write_case(folder, case, _load_and_prepare(case, data))
    document = {"made_from": made_from, "record": store.record_to_json(record, folder.parent)}
    write_json(document, done)
    return record


def _made_from(case: Case, data: config.DataConfig) -> str:
    """What the stored case depends on: configuration, case, and its files' sizes and times."""
    files = [path.stat() for path in case.files() if path.exists()]
    facts = {
        "version": [store.VERSION, __version__],
        "data": dataclasses.asdict(data),
        "case": dataclasses.asdict(case),
        "files": [[file.st_size, file.st_mtime_ns] for file in files],
    }
    return json.dumps(facts, default=str)


def _load_and_prepare(case: Case, data: config.DataConfig) -> Prepared:
    scan = scans.load_scan(case.scan, data.intensity)
    if case.lung_mask is None:
        lung = lungs.find_lungs(scan, data.intensity)
    else:
        lung = scans.load_mask(case.lung_mask, scan, "lung mask")
    lesion = None
    if case.lesion_mask is not None:
        lesion = scans.load_mask(case.lesion_mask, scan, "lesion mask")
        outside = (lesion & ~lung).sum() / max(lesion.sum(), 1)
        if outside > _LESION_OUTSIDE:
            print(
                f"note: {case.name}: {outside:.0%} of its lesion voxels lie outside of its lung "
                "mask, where the network sees nothing: check the lung mask",
                file=sys.stderr,
            )
    return prepare_scan(scan, lung, data, lesion)


def write_phantoms(
    counts: Sequence[int], out: pathlib.Path, *, seed: int, size: int, workers: int = 2
) -> list[Case]:
    """Write phantoms as NIfTI files below `out`/scans, and their list, `out`/cases.csv.

    What varies between them whatever their class is in `out`/nuisances.json.

    Args:
      counts: phantoms of each split, in the order of `SPLITS`; their classes take turns.
      out: the folder.
      seed: other seeds give other phantoms; the splits of a seed and of any other are disjoint.
      size: side of the phantoms' slices, in voxels.
      workers: processes.
    """
    (out / "scans").mkdir(parents=True, exist_ok=True)
    wanted = [(split, index) for split, n in zip(SPLITS, counts, strict=True) for index in range(n)]
    job = functools.partial(_write_phantom, out=out, seed=seed, size=size)
    cases, nuisances = [], {}
    for result in _in_parallel(job, wanted, workers, "phantoms"):
        if isinstance(result, InputError):
            raise result
        case, nuisances[result[0].name] = result
        cases.append(case)
    write_json(nuisances, out / "nuisances.json")
    datasets.write_cases(cases, out / "cases.csv")
    return cases


def _write_phantom(
    wanted: tuple[str, int], out: pathlib.Path, seed: int, size: int
) -> tuple[Case, dict[str, float]]:
    split, index = wanted
    made = phantom.make_phantom(seed * len(SPLITS) + SPLITS.index(split), index, size)
    name = f"phantom-{split}-{index:04d}"
    depth_mm, height_mm, width_mm = made.spacing_mm
    # Canonical order is LPS (left, posterior, superior), NIfTI's world is RAS.
    affine = np.diag([-width_mm, -height_mm, depth_mm, 1.0])

    def save(array: np.ndarray, suffix: str) -> pathlib.Path:
        path = out / "scans" / f"{name}{suffix}.nii.gz"
        image = nib.Nifti1Image(np.ascontiguousarray(array.T), affine)
        image.header.set_xyzt_units("mm")
        with aside(path) as partial:
            image.to_filename(partial)
        return path

    case = Case(
        name=name,
        patient=name,
        split=split,
        label=made.label,
        scan=save(made.hu.astype(np.int16), ""),
        lesion_mask=save(made.lesion_mask.astype(np.uint8), "-lesion"),
        lung_mask=save(made.lung_mask.astype(np.uint8), "-lung"),
    )
    return case, made.nuisances


def _in_parallel(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int, title: str
) -> list[Any]:
    """The results of `job` for each item, in order; where it failed, an InputError."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InputError as error:
            return error
        except concurrent.futures.BrokenExecutor:
            raise
        except Exception as error:  # a defect of ours: hours of other cases must not be lost to it
            traceback.print_exception(error)
            return InputError(f"{type(error).__name__}: {error}: please report this")

    with Progress(title, len(items)) as progress:
        if workers == 1:
            results = []
            for item in items:
                results.append(outcome(functools.partial(job, item)))
                progress.advance()
            return results
        # Spawned, not forked: tensorstore's threads do not survive a fork.
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, max(len(items), 1)), multiprocessing.get_context("spawn")
        )
        try:
            futures = [pool.submit(job, item) for item in items]
            for _ in concurrent.futures.as_completed(futures):
                progress.advance()
            return [outcome(future.result) for future in futures]
        except concurrent.futures.BrokenExecutor as error:
            raise InputError(
                f"--workers={workers}: a worker was killed, probably for want of memory: use fewer"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_list("phantoms", None, "make this many: TRAIN,VALIDATION,TEST, over all classes")
    flags.DEFINE_integer("phantom_size", 96, "side of a phantom's slices, in voxels", 32)
    flags.DEFINE_string("cases", None, f"a case list: CSV with {','.join(datasets.COLUMNS)}")
    flags.DEFINE_list("exclude", [], "names of cases to leave out")
    flags.DEFINE_string("out", None, "folder of the result", required=True)
    flags.DEFINE_bool("overwrite", False, "replace a store that is there")
    flags.DEFINE_integer("workers", 2, "processes", lower_bound=1)
    config_flags.define_shared()


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags; those of models, which flag files hold too, pass by."""
    return config_flags.without_models(list(registry.MODELS), argv)


def main() -> int:
    """The program: see the module's docstring."""
    values = flags.FLAGS
    data = config_flags.section(config.DataConfig)
    out = pathlib.Path(values.out)
    if (values.phantoms is None) == (values.cases is None):
        raise InputError("--phantoms and --cases: give one of them")
    refuse_existing(out, values.overwrite)
    began, failures = time.monotonic(), []
    if values.phantoms is not None:
        counts = _counts(values.phantoms)
        print(f"Making {sum(counts)} phantoms in {out / 'scans'} ...", flush=True)
        cases = write_phantoms(
            counts, out, seed=values.seed, size=values.phantom_size, workers=values.workers
        )
        print(f"... in {time.monotonic() - began:.0f} s", flush=True)
    else:
        source = pathlib.Path(values.cases)
        cases = datasets.read_cases(source, values.exclude, check_files=False, failures=failures)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "cases.csv").exists() or not source.samefile(out / "cases.csv"):
            datasets.write_cases(cases, out / "cases.csv")
    phantoms = values.phantoms is not None
    return _report(cases, failures, out, data, values.workers, values.overwrite, phantoms)


def _counts(texts: Sequence[str]) -> list[int]:
    if len(texts) != len(SPLITS) or not all(text.strip().isdecimal() for text in texts):
        raise InputError(
            f"--phantoms={','.join(texts)}: three counts expected, TRAIN,VALIDATION,TEST: "
            "such as --phantoms=150,45,60"
        )
    counts = [int(text) for text in texts]
    if not sum(counts):
        raise InputError("--phantoms: no phantom asked for, at least 1 expected")
    return counts


def _report(
    cases: Sequence[Case],
    failures: list[str],
    out: pathlib.Path,
    data: config.DataConfig,
    workers: int,
    overwrite: bool,
    phantoms: bool,
) -> int:
    began = time.monotonic()
    tally = collections.Counter(case.split for case in cases)
    splits = ", ".join(f"{tally[split]} {split}" for split in SPLITS)
    print(f"Preparing {len(cases)} cases ({splits}) into {out / 'store'} ...", flush=True)
    asked = len(cases) + len(failures)
    failures = failures + prepare(
        cases, out, data, workers=workers, overwrite=overwrite, phantoms=phantoms
    )
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    if len(failures) == asked:
        raise InputError(f"{out / 'store'}: not written, for no case could be prepared: mend them")
    unknown = [case for case in store.Store(out / "store").cases() if not case.lesions_known]
    if unknown:
        print(
            f"note: {len(unknown)} pneumonia cases have no lesion mask: only the classification "
            "stage trains on them"
        )
    size = sum(path.stat().st_size for path in (out / "store").rglob("*") if path.is_file())
    print(
        f"Wrote {out / 'store'}: {asked - len(failures)} of {asked} cases, "
        f"{size / 2**20:.1f} MiB, in {time.monotonic() - began:.0f} s"
    )
    return 1 if failures else 0


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, parse, computes=False)


if __name__ == "__main__":
    run()
