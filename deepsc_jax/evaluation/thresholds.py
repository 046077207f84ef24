"""The lesion threshold of a trained stage, chosen on validation on every scan's own grid."""

import pathlib

import jax
import numpy as np
from jaxtyping import Float

from deepsc_jax.data import preprocess
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.curve import marked_voxels
from deepsc_jax.evaluation.sources import source_case
from deepsc_jax.inference import predictor as predictors
from deepsc_jax.inference.predictor import SegmentsScans
from deepsc_jax.metrics.overlap import THRESHOLDS, best_threshold
from deepsc_jax.runtime import cluster
from deepsc_jax.training import workdir as workdirs


def choose_threshold(predictor: SegmentsScans, store: Store) -> float | None:
    """The `best_threshold` of validation, by DSC on every scan's own grid.

    Resampling there smooths the probabilities, so the best threshold of the working grid is another
    one. None if no validation scan has lesions. The processes of a job share the scans, and where
    one of them refuses its own, all do.

    Raises:
      InputError: a scan's sources are missing or have changed.
    """
    rows = cluster.together(lambda: _dice_of_share(predictor, store))
    rows = np.concatenate(cluster.by_process(rows))
    rows = rows[~np.isnan(rows).any(axis=1)]
    return THRESHOLDS[best_threshold(rows.mean(axis=0))] if len(rows) else None


def _dice_of_share(predictor: SegmentsScans, store: Store) -> Float[np.ndarray, "case threshold"]:
    """The DSC of this process's validation scans at every threshold; nan for all others."""
    cases = store.cases("validation")
    rows = np.full((len(cases), len(THRESHOLDS)), np.nan)
    for i in range(jax.process_index(), len(cases), jax.process_count()):
        case = cases[i]
        if case.lesion_mask is None:
            continue
        volume = store.read(case.name, "volume")
        lesion = predictor(volume).lesion
        truth = source_case(store, case, predictor.config.data.intensity)
        if lesion is None or not truth.lesion.any():
            continue
        lungs = volume > 0 if store.data.mask == "lungs" else None
        probability = preprocess.to_source(lesion, case.grid, lungs)
        inside = np.ones_like(truth.lung) if lungs is None else truth.lung
        predicted, hits = marked_voxels(probability, inside, truth.lesion, THRESHOLDS)
        rows[i] = 2 * hits / (predicted + truth.lesion.sum())
    return rows


def settle_threshold(workdir: pathlib.Path, stage: str, store: Store) -> float | None:
    """Choose the threshold of a trained stage and note it in its run; None where nothing can."""
    predictor = cluster.together(lambda: predictors.load(workdir, stage))
    threshold = choose_threshold(predictor, store)
    if threshold is not None and cluster.is_writer():
        workdirs.save_threshold(workdir, stage, threshold)
    return threshold
