"""Evaluate a trained network on a split of a prepared data set, on every scan's own grid.

    deepsc evaluate --checkpoint=WORKDIR --data_dir=DIR --out=DIR [--baselines]

Prints a table and writes OUT/metrics.json (the summary), OUT/scans.json (a row per scan) and
OUT/report.html, a page of both with curves. With --predictions the page leads to those of the
scans. With --baselines it also scores what needs no network: of CT the best HU band inside the
lungs and logistic regressions, all tuned on validation; of X-rays logistic regressions, fitted on
training; of indicators ridge regressions, fitted on training.
"""

import pathlib

from absl import flags

from deepsc_jax.data.datasets import SPLITS
from deepsc_jax.data.store import Store
from deepsc_jax.inference.options import define_flags as define_options
from deepsc_jax.inference.options import from_flags
from deepsc_jax.inference.pages import addresses
from deepsc_jax.metrics.summary import table
from deepsc_jax.report.evaluation_page import evaluation_page
from deepsc_jax.report.scan_page import PAGE
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, own, require_own, require_writable, write_json
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.types import JsonValue


def define_flags() -> None:
    """Define the flags of this command."""
    define_options()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("split", "test", SPLITS, "Split to evaluate; test is to be read once.")
    flags.DEFINE_string(
        "predictions", None, "Folder that `predict` wrote: report.html leads to the scans' pages."
    )
    flags.DEFINE_bool("baselines", False, "Also score what needs no network.")


def main() -> None:
    """Evaluate what the flags name."""
    # JAX, which a wrong flag need not wait for.
    from deepsc_jax.evaluation import baselines, image_baselines, indicators, scoring
    from deepsc_jax.inference import ensemble

    options = flags.FLAGS
    data_dir, out = local_path("data_dir", options.data_dir), local_path("out", options.out)
    require_writable("out", out)
    summary, table_of_scans, page = out / "metrics.json", out / "scans.json", out / PAGE
    for path in (summary, table_of_scans, page):
        require_own(path)
    predictions = options.predictions and local_path("predictions", options.predictions)
    if predictions and not predictions.is_dir():
        raise InputError(
            f"--predictions={predictions}: no such folder, expected the --out of `predict`: check "
            "the path"
        )
    checkpoints = [local_path("checkpoint", path) for path in options.checkpoint]
    predictor = ensemble.load(checkpoints, options.stage, from_flags())
    fold = predictor.fold(options.split)
    store = Store(data_dir / "store", predictor.config.data, fold=fold)
    if options.baselines:
        scoring.require_baselines(store, options.split)
    smallest_ml = predictor.options.smallest_lesion_ml
    metrics, rows = scoring.evaluate(
        predictor, store, options.split, smallest_lesion_ml=smallest_ml
    )
    metrics |= predictor.facts()
    metrics["evaluated_on"] = store.contents
    print(table(metrics))
    print("trained on {trained_on}, evaluated on {evaluated_on}".format(**metrics))
    _write(rows, table_of_scans)
    _write(metrics, summary)
    cases = {case.name: case.scan for case in store.cases(options.split)}
    links = addresses(predictions, cases, out) if predictions else {}
    title = f"Evaluation of the {options.split} split"
    evaluation_page(page, metrics, rows, links, title=title)
    if options.baselines:
        if store.data.patches != "none":
            figures = indicators.baselines(store, data_dir, options.split)
            print(indicators.table(figures))
        elif store.data.modality == "xray":
            figures = scoring.score_image_baselines(store, data_dir, options.split)
            print(image_baselines.table(figures))
        else:
            figures = scoring.score_baselines(store, data_dir, options.split)
            print(baselines.table(figures))
        metrics["baselines"] = figures
        _write(metrics, summary)
    print(f"wrote {shown(summary)}, {shown(table_of_scans)} and {shown(page)}")


def _write(document: JsonValue, path: pathlib.Path) -> None:
    """Write JSON in the place of what was written here alone."""
    with own(path) as partial:
        write_json(document, partial)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
