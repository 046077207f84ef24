"""Evaluate a trained network on a split of a prepared data set, on every scan's own grid.

    deepsc evaluate --checkpoint=WORKDIR --data_dir=DIR --out=DIR [--against=DIR] [--baselines]

Prints a table and writes OUT/metrics.json (the summary), OUT/scans.json (a row per scan) and
OUT/report.html, a page of both with curves. With --predictions the page leads to those of the
scans. With --against another evaluation of the same scans, or a run, is compared with it pair by
pair. With --tune validation is predicted first, to choose temperature and thresholds of evidence.
With --baselines it also scores what needs no network: of CT the best HU band inside the lungs and
logistic regressions, all tuned on validation; of X-rays logistic regressions, fitted on training;
of indicators ridge regressions, fitted on training.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from deepsc_jax.data.datasets import SPLITS
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation import against
from deepsc_jax.inference.options import define_flags as define_options
from deepsc_jax.inference.options import from_flags
from deepsc_jax.inference.pages import addresses
from deepsc_jax.metrics.intervals import METHODS, Resampling
from deepsc_jax.metrics.paired import paired, paired_table
from deepsc_jax.metrics.statistics import RESAMPLES
from deepsc_jax.metrics.tables import table
from deepsc_jax.report.evaluation_page import evaluation_page
from deepsc_jax.report.scan_page import PAGE
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, own, require_own, require_writable, write_json
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.types import JsonObject, JsonValue

if TYPE_CHECKING:
    from deepsc_jax.evaluation.scoring import Settings

STUDIES = ("curves", "sanity")
# Of another evaluation, what metrics.json repeats.
OF_OTHER = ("trained_on", "networks", "lesion_threshold", "smallest_lesion_ml", "lesion_gate")


def define_flags() -> None:
    """Define the flags of this command."""
    define_options()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("split", "test", SPLITS, "Split to evaluate; test is to be read once.")
    flags.DEFINE_string(
        "predictions", None, "Folder that `predict` wrote: report.html leads to the scans' pages."
    )
    flags.DEFINE_string(
        "against",
        None,
        "The --out of another evaluation of the same scans, or another run's --workdir, which is "
        "evaluated too: compared pair by pair, with tests.",
    )
    flags.DEFINE_bool(
        "tune",
        False,
        "Predict validation first, to choose the temperature of class probabilities and the "
        "threshold of each map of evidence.",
    )
    flags.DEFINE_list(
        "evidence",
        [],
        f"Some of {', '.join(STUDIES)}. curves: take voxels of most evidence away and put them "
        "back, 29 predictions a map and scan; sanity: the evidence of networks broken on purpose.",
    )
    flags.DEFINE_enum("interval", METHODS[0], METHODS, "How intervals over patients are made.")
    flags.DEFINE_integer(
        "resamples", RESAMPLES, "Of each interval and test.", lower_bound=1, upper_bound=1_000_000
    )
    flags.DEFINE_bool("baselines", False, "Also score what needs no network.")


def main() -> None:
    """Evaluate what the flags name."""
    # JAX, which a wrong flag need not wait for.
    from deepsc_jax.evaluation import scoring, tuning
    from deepsc_jax.evaluation.explanation import Studies
    from deepsc_jax.inference import ensemble

    options = flags.FLAGS
    data_dir, out = local_path("data_dir", options.data_dir), local_path("out", options.out)
    unknown = [name for name in options.evidence if name not in STUDIES]
    if unknown:
        raise InputError(f"--evidence={unknown[0]}: expected some of {','.join(STUDIES)}")
    require_writable("out", out)
    summary, table_of_scans, page = out / "metrics.json", out / "scans.json", out / PAGE
    for path in (summary, table_of_scans, page):
        require_own(path)
    predictions = _predictions()
    other = against.against_path(options.against) if options.against is not None else None
    checkpoints = [local_path("checkpoint", path) for path in options.checkpoint]
    predictor = ensemble.load(checkpoints, options.stage, from_flags())
    fold = predictor.fold(options.split)
    store = Store(data_dir / "store", predictor.config.data, fold=fold)
    cases = store.cases(options.split)
    if options.baselines:
        scoring.require_baselines(store, options.split)
    if options.tune:
        tuning.require_tuning(store, options.split)
    broken = predictor.broken() if "sanity" in options.evidence else {}
    resampling = Resampling(method=options.interval, resamples=options.resamples)
    plain = scoring.Settings(predictor.options.smallest_lesion_ml, resampling)
    score_other = None if other is None else _other(other, store, plain, fold)
    tuned = tuning.tune(predictor, store) if options.tune else None
    studies = Studies(tuned.evidence if tuned else {}, "curves" in options.evidence, broken)
    settings = dataclasses.replace(plain, tuned=tuned, studies=studies)
    metrics, rows = scoring.evaluate(predictor, store, options.split, settings)
    metrics |= predictor.facts()
    metrics["evaluated_on"] = store.contents
    _write(rows, table_of_scans)
    _write(metrics, summary)
    print(table(metrics))
    if other is not None and score_other is not None:
        name, (of_other, others) = shown(other), score_other()
        patients, classes = [case.patient for case in cases], store.data.classes
        found = paired(rows, others, patients, classes, resampling)
        kept = {key: of_other[key] for key in OF_OTHER if key in of_other}
        metrics["against"] = {"name": name, "other": kept, "correction": "Holm", **found}
        _write(metrics, summary)
        print(f"\nagainst {name}\n{paired_table(found)}")
    print("trained on {trained_on}, evaluated on {evaluated_on}".format(**metrics))
    links = {}
    if predictions:
        links = addresses(predictions, {case.name: case.scan for case in cases}, out)
    title = f"Evaluation of the {options.split} split"
    evaluation_page(page, metrics, rows, links, title=title)
    if options.baselines:
        metrics["baselines"], text = scoring.baseline_figures(store, data_dir, options.split)
        _write(metrics, summary)
        print(text)
    print(f"wrote {shown(summary)}, {shown(table_of_scans)} and {shown(page)}")


def _predictions() -> pathlib.Path | None:
    if not flags.FLAGS.predictions:
        return None
    folder = local_path("predictions", flags.FLAGS.predictions)
    if not folder.is_dir():
        raise InputError(
            f"--predictions={folder}: no such folder, expected the --out of `predict`: check the "
            "path"
        )
    return folder


def _other(
    folder: pathlib.Path, store: Store, settings: "Settings", fold: tuple[int, int] | None
) -> Callable[[], tuple[JsonObject, list[JsonObject]]]:
    """What gives the summary and the rows of the other side: read now, or, of a run, scored then.

    Raises:
      InputError: it is of other scans, or a run of other preprocessing or folds.
    """
    from deepsc_jax.evaluation import scoring
    from deepsc_jax.inference import ensemble

    split = flags.FLAGS.split
    if against.is_evaluation(folder):
        earlier = against.read_evaluation(folder, store.cases(split), store.data.classes)
        return lambda: earlier
    rival = ensemble.load([folder], None, from_flags())
    store.require(rival.config.data)
    if rival.fold(split) != fold:
        raise InputError(
            f"--against={folder}: has other --folds, so that it was trained on some of --split="
            f"{split}: give test, or a run of the same"
        )

    def score() -> tuple[JsonObject, list[JsonObject]]:
        metrics, rows = scoring.evaluate(rival, store, split, settings)
        return metrics | rival.facts(), rows

    return score


def _write(document: JsonValue, path: pathlib.Path) -> None:
    """Write JSON in the place of what was written here alone."""
    with own(path) as partial:
        write_json(document, partial)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
