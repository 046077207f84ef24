"""What is chosen on validation and then applied to another split, never to validation itself."""

import dataclasses

import numpy as np

from deepsc_jax.data import preprocess
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.curve import CURVE_THRESHOLDS, marked_voxels
from deepsc_jax.evaluation.sources import source_case
from deepsc_jax.inference.predictor import SegmentsScans
from deepsc_jax.metrics.calibration import fit_temperature
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.progress import Progress
from deepsc_jax.runtime.types import JsonObject


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What validation says.

    Attributes:
      scans: that were looked at.
      temperature: of the class probabilities; None of a network without classes.
      evidence: of each map, the threshold of the best mean DSC with the true lesions.
    """

    scans: int
    temperature: float | None
    evidence: dict[str, float]

    def facts(self) -> JsonObject:
        """As metrics.json says it."""
        return dataclasses.asdict(self)


def require_tuning(store: Store, split: str) -> None:
    """Refuse to tune on what is then evaluated, or on nothing.

    Raises:
      InputError: the split is validation, or validation has no case.
    """
    if split == "validation":
        raise InputError(
            "--tune: chooses on validation, and --split=validation is to be evaluated: evaluate "
            "another split, or leave --tune out"
        )
    if not store.cases("validation"):
        raise InputError(f"--tune: split validation of {store.path} has no case: leave --tune out")


def tune(predictor: SegmentsScans, store: Store) -> Tuned:
    """Predict validation, and choose.

    Raises:
      InputError: a scan's sources are missing or have changed, or the network gives neither classes
        nor evidence.
    """
    cases = store.cases("validation")
    labels, probabilities = list[int](), list[np.ndarray]()
    scores: dict[str, list[np.ndarray]] = {}
    with Progress("tune on validation", len(cases), lines=True) as progress:
        for case in cases:
            prediction = predictor(store.read(case.name, "volume"))
            if prediction.classes is not None:
                labels.append(case.label)
                probabilities.append(prediction.classes)
            if prediction.evidence and case.lesion_mask is not None:
                truth = source_case(store, case, predictor.config.data.intensity)
                for name, evidence in prediction.evidence.items() if truth.lesion.any() else ():
                    on_source = preprocess.to_source(evidence, case.grid)
                    marked, hits = marked_voxels(
                        on_source, truth.lung, truth.lesion, CURVE_THRESHOLDS
                    )
                    dice = 2 * hits / (marked + truth.lesion.sum())
                    scores.setdefault(name, []).append(dice)
            progress.advance()
    if not probabilities and not scores:
        raise InputError("--tune: the network gives neither classes nor evidence: leave it out")
    temperature = None
    if probabilities:
        temperature = fit_temperature(np.array(labels), np.array(probabilities))
    best = {name: int(np.argmax(np.mean(rows, axis=0))) for name, rows in scores.items()}
    thresholds = {name: CURVE_THRESHOLDS[place] for name, place in best.items()}
    return Tuned(len(cases), temperature, thresholds)
