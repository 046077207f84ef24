"""Make a store of preprocessed scans or X-rays, of your own cases or of phantoms, or check one.

    deepsc prepare --flagfile=configs/phantom.flags --phantoms=150,45,60 --out=DIR
    deepsc prepare --flagfile=configs/deepsc.flags --cases=cases.csv --out=DIR
    deepsc prepare --verify --out=DIR

The store is DIR/store; phantoms and their case list are beside it as DIR/scans and DIR/cases.csv. A
case that cannot be prepared is named in one line and left out, the others are written, and the exit
code is 1. So it is where a checked store is damaged.
"""

import collections
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

from deepsc_jax.config import DataConfig, TrainConfig
from deepsc_jax.config import flags as config_flags
from deepsc_jax.data import datasets, preparation
from deepsc_jax.data.datasets import SPLITS
from deepsc_jax.data.records import Contents
from deepsc_jax.data.store import Store
from deepsc_jax.models import registry
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, require_writable
from deepsc_jax.runtime.names import counted, shown


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_list("phantoms", None, "make this many: TRAIN,VALIDATION,TEST, over all classes")
    flags.DEFINE_integer("phantom_size", 96, "side of a phantom's slices, in voxels", 32)
    flags.DEFINE_integer("phantom_views", 2, "X-rays of each phantom, with --modality=xray", 1)
    flags.DEFINE_float(
        "lesion_contrast",
        1.0,
        "how often the lesions of phantoms differ from lungs as they do: 1 is physical. What is "
        "trained or scored on the store repeats it.",
        lower_bound=0.0,
        upper_bound=10.0,
    )
    flags.DEFINE_string(
        "cases",
        None,
        f"a case list: CSV with {','.join(datasets.COLUMNS)}, and, "
        f"where you have them, {','.join(datasets.OPTIONAL)}",
    )
    flags.DEFINE_list("exclude", [], "names of cases to leave out")
    flags.DEFINE_string("out", None, "folder of the result", required=True)
    flags.DEFINE_bool("overwrite", False, "replace a store that prepare wrote there")
    flags.DEFINE_bool("verify", False, "check every byte of the store in --out, and write nothing")
    flags.DEFINE_bool(
        "private",
        False,
        "store a salted hash of each patient, and make all files readable by yourself alone. The "
        "names of cases and the paths of their files stay in the store's index.",
    )
    flags.DEFINE_integer("workers", 2, "processes", lower_bound=1)
    config_flags.define_shared()


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags; those of models, which flag files hold too, pass by."""
    return config_flags.without_models(list(registry.MODELS), argv)


def main() -> int:
    """The program: see the module's docstring."""
    values = flags.FLAGS
    asked = [values.phantoms is not None, values.cases is not None, values.verify]
    if sum(asked) != 1:
        raise InputError("--phantoms, --cases and --verify: give one of them")
    if values.verify:
        address = "://" in values.out
        return verify(f"{values.out.rstrip('/')}/store" if address else str(_out() / "store"))
    if values.phantoms is None and values.lesion_contrast != 1:
        raise InputError(
            f"--lesion_contrast={values.lesion_contrast:g}: goes with --phantoms: leave it out"
        )
    if values.private:
        os.umask(0o077)
    began, out, failures = time.monotonic(), _out(), []
    if values.phantoms is not None:
        counts = _counts(values.phantoms)
        _require_place(out)
        print(f"Making {counted(sum(counts), 'phantom')} in {shown(out / 'scans')} ...", flush=True)
        seed = config_flags.section(TrainConfig).seed
        data = config_flags.section(DataConfig)
        cases = write_phantoms(
            counts,
            out,
            seed=seed,
            size=values.phantom_size,
            workers=values.workers,
            views=values.phantom_views if data.modality == "xray" else 0,
            lesion_contrast=values.lesion_contrast,
            classes=data.classes,
            indicators=data.indicators,
        )
        print(f"... in {time.monotonic() - began:.0f} s", flush=True)
    else:
        source = local_path("cases", values.cases)
        cases = datasets.read_cases(
            source,
            values.exclude,
            check_files=False,
            failures=failures,
            classes=config_flags.section(DataConfig).classes,
            indicators=config_flags.section(DataConfig).indicators,
        )
        _require_place(out)
    return _prepare(cases, failures, out)


def verify(path: str) -> int:
    """Compare every file of a store with its sum and name those that differ; 1 if any does."""
    began, opened = time.monotonic(), Store(path, complete=False)
    damaged = opened.damage(flags.FLAGS.workers)
    for line in damaged:
        print(f"error: {shown(line)}", file=sys.stderr)
    files = opened.files()
    print(
        f"{shown(path)}: {counted(len(opened.cases()), 'case')}, "
        f"{len(files) - len(damaged)} of {counted(len(files), 'file')} whole, "
        f"{sum(size for _, size, _ in files) / 2**20:.1f} MiB, in {time.monotonic() - began:.0f} s"
    )
    if damaged:
        print("copy the damaged files again, or prepare again with --overwrite", file=sys.stderr)
    return 1 if damaged else 0


def _out() -> pathlib.Path:
    return local_path("out", flags.FLAGS.out)


def _require_place(out: pathlib.Path) -> None:
    """Raise InputError if nothing can be written to `out`, or something is there to be kept."""
    require_writable("out", out)
    preparation.refuse_existing(out, flags.FLAGS.overwrite)


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


def _prepare(cases: Sequence[datasets.Case], failures: list[str], out: pathlib.Path) -> int:
    values, began = flags.FLAGS, time.monotonic()
    tally = collections.Counter(case.split for case in cases)
    splits = ", ".join(f"{tally[split]} {split}" for split in SPLITS)
    print(
        f"Preparing {counted(len(cases), 'case')} ({splits}) into {shown(out / 'store')} ...",
        flush=True,
    )
    asked = len(cases) + len(failures)
    failures = failures + preparation.prepare(
        cases,
        out,
        config_flags.section(DataConfig),
        workers=values.workers,
        overwrite=values.overwrite,
        contents=Contents(values.phantoms is not None, values.lesion_contrast),
        private=values.private,
    )
    for line in failures:
        print(f"error: {shown(line)}", file=sys.stderr)
    if len(failures) == asked:
        raise InputError(f"{out / 'store'}: not written, for no case could be prepared: mend them")
    opened = Store(out / "store")
    unknown = [case for case in opened.cases() if not case.lesions_known]
    if unknown:
        print(
            f"note: no lesion mask in {counted(len(unknown), 'pneumonia case')}: only the "
            "classification stage trains on such"
        )
    size = sum(size for _, size, _ in opened.files())
    print(
        f"Wrote {shown(out / 'store')}: {asked - len(failures)} of {asked} cases, "
        f"{size / 2**20:.1f} MiB, in {time.monotonic() - began:.0f} s"
    )
    return 1 if failures else 0


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, parse, computes=False)


if __name__ == "__main__":
    run()
