"""Measure the lesions of a prepared data set as section III of the DeepSC-COVID paper does.

    deepsc analyze --data_dir=DIR --out=DIR [--split=train] [--periphery=volume]

Prints a table and writes OUT/analysis.json (figures of every class with intervals, differences
with tests), OUT/lesions.csv (a row per scan) and OUT/analysis.html, a page with the paper's numbers
beside these and figures in the manner of its Fig. 1. Truth is measured, no network is needed.
"""

import sys

from absl import flags

from deepsc_jax.data.datasets import SPLITS
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation import analysis
from deepsc_jax.metrics.findings import MIN_COMPONENT_ML
from deepsc_jax.metrics.statistics import RESAMPLES
from deepsc_jax.report.analysis_page import analysis_page
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.files import local_path, own, write_own_json
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.places import output_folder

NAMES = ("analysis.json", "lesions.csv", "analysis.html")


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("split", "all", ["all", *SPLITS], "Split to analyse.")
    flags.DEFINE_enum(
        "periphery",
        "slices",
        ["slices", "volume"],
        "paper: slices, of each of which a disc erodes the lungs; assumed: volume, of which a ball "
        "does.",
    )
    flags.DEFINE_float(
        "smallest_lesion_ml",
        MIN_COMPONENT_ML,
        "assumed: connected lesions below it are in no figure.",
        lower_bound=0.0,
    )
    flags.DEFINE_integer(
        "resamples", RESAMPLES, "Of each interval and test.", lower_bound=1, upper_bound=1_000_000
    )
    flags.DEFINE_integer("workers", 2, "Processes.", lower_bound=1)


def main() -> int:
    """Analyse what the flags name; 1 where a scan could not be."""
    values = flags.FLAGS
    data_dir = local_path("data_dir", values.data_dir)
    out = output_folder("out", values.out, *NAMES)
    numbers, scans, page = (out / name for name in NAMES)
    store = Store(data_dir / "store")
    options = analysis.Options(
        split=None if values.split == "all" else values.split,
        smallest_lesion_ml=values.smallest_lesion_ml,
        volumetric=values.periphery == "volume",
        resamples=values.resamples,
    )
    rows, failures = analysis.measured(store, options, workers=values.workers)
    for line in failures:
        print(f"error: {shown(line)}", file=sys.stderr)
    document = analysis.document(store, rows, options)
    print(analysis.table(document))
    with own(scans) as partial:
        analysis.write_scans(rows, partial)
    write_own_json(document, numbers)
    analysis_page(page, document, analysis.cohorts(rows, store.data.classes))
    print(f"wrote {shown(numbers)}, {shown(scans)} and {shown(page)}")
    return 1 if failures else 0


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, computes=False)


if __name__ == "__main__":
    run()
