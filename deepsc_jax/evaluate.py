"""Evaluate a trained network on a split of a prepared data set, on every scan's own grid.

    python -m deepsc_jax.evaluate --checkpoint=WORKDIR --data_dir=DIR --out=DIR [--baselines]

Prints a table and writes OUT/metrics.json (the summary) and OUT/scans.json (a row per scan). With
--baselines it also scores what needs no network: the best HU band inside the lungs and logistic
regressions, all tuned on validation.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from deepsc_jax.config import CLASSES, STAGES, Stage
from deepsc_jax.data import preprocess, scans
from deepsc_jax.data.datasets import SPLITS
from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.evaluation import baselines
from deepsc_jax.inference import predictor as inference
from deepsc_jax.inference.predictor import SegmentsScans
from deepsc_jax.metrics.summary import per_scan, summarise, table
from deepsc_jax.runtime import cluster, entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.logs import Progress
from deepsc_jax.training.step import THRESHOLDS


def evaluate(predictor: SegmentsScans, store: Store, split: str) -> tuple[dict, list[dict]]:
    """The summary of a split and one row per scan.

    Lesion masks are compared on the source's grid: probabilities are brought there and cut at the
    validation threshold, inside the lungs: outside of them the network sees nothing. A scan of a
    pneumonia class without a lesion mask counts for the classification only.

    Raises:
      InputError: the split is empty, or the store was made with other preprocessing.
    """
    store.require(predictor.config.data)
    cases = store.cases(split)
    if not cases:
        raise InputError(f"{store.path}: split {split} has no case: name another with --split")
    progress = Progress(f"evaluate {split}", len(cases))
    rows, probabilities = [], []
    for i, case in enumerate(cases, start=1):
        prediction = predictor(store.read(case.name, "volume"))
        row: dict[str, Any] = {"case": case.name, "label": CLASSES[case.label]}
        if prediction.lesion is not None and case.lesions_known:
            truth = source_case(store, case, predictor.config.data.intensity)
            probability = preprocess.to_source(prediction.lesion, case.grid)
            found = (probability >= predictor.threshold) & truth.lung
            row |= per_scan(found, truth.lesion, truth.lung, truth.spacing_mm)
        if prediction.probabilities is not None:
            probabilities.append(prediction.probabilities)
            row["probabilities"] = dict(
                zip(CLASSES, prediction.probabilities.tolist(), strict=True)
            )
        rows.append(row)
        progress.show(i)
    labels = np.array([case.label for case in cases])
    return (
        summarise(
            [row for row in rows if "has_lesion" in row],
            labels if probabilities else None,
            np.array(probabilities) if probabilities else None,
        ),
        rows,
    )


def choose_threshold(predictor: SegmentsScans, store: Store) -> float | None:
    """The threshold with the best mean DSC over validation, on every scan's own grid.

    Resampling there smooths the probabilities, so the best threshold of the working grid is another
    one. None if no validation scan has lesions. The processes of a job share the scans.
    """
    edges = np.array([-np.inf, *THRESHOLDS, np.inf])
    cases = store.cases("validation")
    rows = np.full((len(cases), len(THRESHOLDS)), np.nan)
    for i in range(jax.process_index(), len(cases), jax.process_count()):
        case = cases[i]
        if case.lesion_mask is None:
            continue
        lesion = predictor(store.read(case.name, "volume")).lesion
        truth = source_case(store, case, predictor.config.data.intensity)
        if lesion is None or not truth.lesion.any():
            continue
        probability = preprocess.to_source(lesion, case.grid)
        found, hits = (
            np.histogram(probability[voxels], edges)[0][::-1].cumsum()[::-1][1:]
            for voxels in (truth.lung, truth.lung & truth.lesion)
        )
        rows[i] = 2 * hits / (found + truth.lesion.sum())
    rows = np.concatenate(cluster.by_process(rows))
    rows = rows[~np.isnan(rows).any(axis=1)]
    return THRESHOLDS[int(rows.mean(axis=0).argmax())] if len(rows) else None


def settle_threshold(workdir: pathlib.Path, stage: Stage, store: Store) -> float | None:
    """Choose the threshold of a trained stage and note it in its run; None where nothing can."""
    threshold = choose_threshold(inference.load(workdir, stage), store)
    if threshold is not None and cluster.is_writer():
        workdirs.save_threshold(workdir, stage, threshold)
    return threshold


def source_case(
    store: Store, case: StoredCase, intensity: str, nuisances: dict[str, float] | None = None
) -> baselines.BaselineCase:
    """A stored case's values, lesions and lungs on its source's grid.

    Raises:
      InputError: a source is missing or has changed since the case was prepared.
    """
    with case.unchanged_sources():
        scan = scans.load_scan(case.scan, "hu" if intensity == "hu" else "unit")
        lesion = np.zeros(scan.values.shape, bool)
        if case.lesion_mask is not None:
            lesion = scans.load_mask(case.lesion_mask, scan)
        if case.lung_mask is not None:
            lung = scans.load_mask(case.lung_mask, scan, "lung mask")
    if case.lung_mask is None:
        lung = preprocess.to_source(store.read(case.name, "lung"), case.grid) >= 0.5
    return baselines.BaselineCase(
        scan.values, lesion, lung, scan.spacing_mm, case.label, nuisances or {}
    )


def score_baselines(store: Store, data_dir: pathlib.Path, split: str) -> dict[str, float | None]:
    """What `baselines.run_baselines` says: tuned on validation, scored on `split`.

    Phantoms bring their nuisances in `data_dir`/nuisances.json. Cases whose lesions are not known
    are left out.

    Raises:
      InputError: the images are not in HU, or validation cannot tune the baselines.
    """
    if store.data.intensity != "hu":
        raise InputError("--baselines: they are bands of HU, and these images are not in HU")
    tuning = [case for case in store.cases("validation") if case.lesions_known]
    if len({case.label for case in tuning}) < 2 or not any(case.lesion_voxels for case in tuning):
        raise InputError(
            f"--baselines: {store.path} has no validation split with lesions and two classes, "
            "which they are tuned on: add one, or leave --baselines out"
        )
    file = data_dir / "nuisances.json"
    nuisances = json.loads(file.read_text()) if file.exists() else {}

    def read(name: str) -> list[baselines.BaselineCase]:
        return [
            source_case(store, case, store.data.intensity, nuisances.get(case.name))
            for case in store.cases(name)
            if case.lesions_known
        ]

    return baselines.run_baselines(read("validation"), read(split))


def baseline_table(figures: dict[str, float | None]) -> str:
    """The baselines as lines to print below the model's table."""
    band = "best HU band [{:.0f}, {:.0f}), sigma {:.1f} mm, at least {:.2f} ml".format(
        *(figures[f"band_{k}"] for k in ("low_hu", "high_hu", "sigma_mm", "min_ml"))
    )
    rows = [
        ("band_dsc", f"DSC       {{:.3f}}  {band}"),
        ("band_accuracy", "accuracy  {:.3f}  logistic regression on that band's findings"),
        ("true_mask_accuracy", "accuracy  {:.3f}  the same on the true lesion masks"),
        ("nuisance_accuracy", "accuracy  {:.3f}  on the nuisances alone (1/3 is chance)"),
    ]
    lines = [text.format(figures[name]) for name, text in rows if figures[name] is not None]
    return "\n  ".join(["Without a network (tuned on validation)", *lines])


def main() -> None:
    """Evaluate what the flags name."""
    options = flags.FLAGS
    predictor = inference.load(pathlib.Path(options.checkpoint), options.stage)
    data_dir, out = pathlib.Path(options.data_dir), pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    store = Store(data_dir / "store", predictor.config.data)
    metrics, rows = evaluate(predictor, store, options.split)
    metrics["trained_on"] = predictor.trained_on
    metrics["evaluated_on"] = "phantoms" if store.phantoms else "scans"
    print(table(metrics))
    print("trained on {trained_on}, evaluated on {evaluated_on}".format(**metrics))
    write_json(rows, out / "scans.json")
    write_json(metrics, out / "metrics.json")
    if options.baselines:
        metrics["baselines"] = score_baselines(store, data_dir, options.split)
        print(baseline_table(metrics["baselines"]))
        write_json(metrics, out / "metrics.json")
    print(f"wrote {out / 'metrics.json'} and {out / 'scans.json'}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A training run's --workdir.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("split", "test", SPLITS, "Split to evaluate; test is to be read once.")
    flags.DEFINE_enum("stage", None, STAGES, "Whose checkpoint; default: the last one trained.")
    flags.DEFINE_bool("baselines", False, "Also score what needs no network.")
    entry.run(main)
