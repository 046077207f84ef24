"""A network's figures on a split of a store, on every scan's own grid."""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from deepsc_jax.data import preprocess
from deepsc_jax.data.classes import IDS, OTHER_SIDE
from deepsc_jax.data.images import Box
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.evaluation import baselines, centres, explanation, image_baselines, indicators
from deepsc_jax.evaluation.against import digest_of
from deepsc_jax.evaluation.curve import ScanCurve, curve, of_scan
from deepsc_jax.evaluation.explanation import Studies
from deepsc_jax.evaluation.sources import source_case
from deepsc_jax.evaluation.tuning import Tuned
from deepsc_jax.inference.masks import lesion_mask
from deepsc_jax.inference.predictor import SegmentsScans
from deepsc_jax.metrics.calibration import (
    brier_score,
    expected_calibration_error,
    scale_by_temperature,
)
from deepsc_jax.metrics.intervals import Resampling
from deepsc_jax.metrics.overlap import dice
from deepsc_jax.metrics.scan_figures import per_scan
from deepsc_jax.metrics.summary import class_arrays, summarise
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.progress import Progress
from deepsc_jax.runtime.types import JsonObject


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a split is evaluated.

    Attributes:
      smallest_lesion_ml: connected lesions below it are removed from masks.
      resampling: of the intervals.
      tuned: what was chosen on validation.
      studies: what is asked of evidence.
    """

    smallest_lesion_ml: float = 0.0
    resampling: Resampling = dataclasses.field(default_factory=Resampling)
    tuned: Tuned | None = None
    studies: Studies = dataclasses.field(default_factory=Studies)


def evaluate(
    predictor: SegmentsScans, store: Store, split: str, settings: Settings | None = None
) -> tuple[dict, list[dict]]:
    """The summary of a split and one row per scan.

    Lesion masks are compared on the source's grid: probabilities are brought there and cut at the
    validation threshold, inside the lungs: outside of them the network sees nothing. A scan of a
    pneumonia class without a lesion mask counts for the classification only. Evidence is that for
    the most probable class. The curve is of masks with all their lesions.

    Args:
      predictor: the trained network.
      store: the data set.
      split: of it.
      settings: how.

    Raises:
      InputError: the split is empty, or the store was made with other preprocessing.
    """
    settings = settings or Settings()
    store.require(predictor.config.data)
    cases = store.cases(split)
    if not cases:
        raise InputError(f"{store.path}: split {split} has no case: name another with --split")
    rows, curves, matched = [], list[ScanCurve](), list[centres.Matched]()
    with Progress(f"evaluate {split}", len(cases), lines=True) as progress:
        for case in cases:
            rows.append(_row(predictor, store, case, curves, matched, settings))
            progress.advance()
    patients, classes = [case.patient for case in cases], store.data.classes
    how = settings.resampling
    summary = summarise(rows, classes, patients=patients, resampling=how)
    if curves:
        summary["curve"] = curve(curves)
    if "values" in rows[0]:
        values = np.array([list(row["values"].values()) for row in rows])
        summary["indicators"] = indicators.figures(store, cases, values)
    summary |= explanation.summarised(rows, patients, classes, how)
    if settings.tuned is not None:
        summary["tuned"] = settings.tuned.facts()
        if settings.tuned.temperature is not None:
            summary["classes"]["temperature"] = _at_temperature(rows, classes, settings.tuned)
    if matched:
        summary["centres"] = centre_figures(matched)
    sides = [row["lungs"] for row in rows if "lungs" in row]
    if sides:
        summary["lungs"] = {name: float(np.mean([s[name] for s in sides])) for name in sides[0]}
    return summary | {"split": split, "scans_sha256": digest_of(cases)}, rows


def _at_temperature(rows: list[JsonObject], classes: Sequence[str], tuned: Tuned) -> JsonObject:
    """Calibration of probabilities at the temperature of validation."""
    assert tuned.temperature is not None
    labels, probabilities = class_arrays(rows, classes)
    scaled = scale_by_temperature(probabilities, tuned.temperature)
    return {
        "temperature": tuned.temperature,
        "scans": tuned.scans,
        "ece": expected_calibration_error(labels, scaled),
        "brier": brier_score(labels, scaled),
    }


def _row(
    predictor: SegmentsScans,
    store: Store,
    case: StoredCase,
    curves: list[ScanCurve],
    matched: list[centres.Matched],
    settings: Settings,
) -> JsonObject:
    """The figures of one scan; its curve is added to `curves`, pairs of centres to `matched`."""
    volume = store.read(case.name, "volume")
    prediction = predictor(volume)
    row: JsonObject = {"case": case.name, "label": store.data.classes[case.label]}
    if prediction.classes is not None:
        named = zip(store.data.classes, prediction.classes.tolist(), strict=True)
        row["probabilities"] = dict(named)
    truth = lesion = None
    if case.lesions_known and (prediction.lesion is not None or prediction.evidence):
        truth = source_case(store, case, predictor.config.data.intensity)
    if prediction.lesion is not None and truth is not None:
        lungs = volume > 0 if store.data.mask == "lungs" else None
        probability = preprocess.to_source(prediction.lesion, case.grid, lungs)
        inside = np.ones_like(truth.lung) if lungs is None else truth.lung
        smallest_ml = settings.smallest_lesion_ml
        lesion = lesion_mask(
            probability, inside, predictor.threshold, truth.spacing_mm, smallest_ml
        )
        row |= per_scan(lesion, truth.lesion, truth.lung, truth.spacing_mm)
        voxel_ml = float(np.prod(truth.spacing_mm)) / 1000
        curves.append(of_scan(probability, inside, truth.lesion, voxel_ml))
    if truth is not None and prediction.evidence:
        scan = explanation.Scan(case, volume, prediction, truth, lesion)
        row |= explanation.of_scan(scan, predictor, settings.studies)
    if case.boxes and prediction.evidence:
        heat = next(iter(prediction.evidence.values()))[0]
        given = centres.salient_centres(centres.on_grid(heat))
        matched.append(centres.match(_box_centres(case), given))
    if OTHER_SIDE.keys() <= prediction.volumes.keys() and case.lung_mask is not None:
        row["lungs"] = lung_dice(prediction, store.read(case.name, "classes"))
    if prediction.values:
        row["values"] = dict(prediction.values)
        row["targets"] = dict(zip(store.data.indicators, case.targets, strict=True))
    return row


def _box_centres(case: StoredCase) -> centres.Points:
    """The centres of a case's boxes, as shares of its X-ray's sides."""
    _, height, width = case.grid.source_shape
    return np.array([Box(*box).centre for box in case.boxes]) / (height, width)


def centre_figures(matched: list[centres.Matched]) -> JsonObject:
    """Figures of pairs of annotated and salient centres, axis by axis, and what has no partner."""
    counts: JsonObject = {
        name: sum(getattr(one, name) for one in matched) for name in ("missed", "extra")
    }
    if not any(len(one.truth) for one in matched):
        return counts
    fits = {name: dataclasses.asdict(f) for name, f in centres.figures(matched).items()}
    return counts | {
        name: {k: None if math.isnan(x) else x for k, x in figures.items()}
        for name, figures in fits.items()
    }


def lung_dice(
    prediction: Prediction, classes: UInt8[np.ndarray, "depth height width"]
) -> dict[str, float]:
    """The DSC of each lung on the working grid, and the share of its voxels on the wrong side.

    A voxel is of its most probable class.

    Args:
      prediction: of a network that finds the lungs.
      classes: the true ids of `classes.IDS`.
    """
    names = [name for name in IDS if name in prediction.volumes]
    found = np.stack([prediction.volumes[name] for name in names])
    background = 1 - found.sum(axis=0, keepdims=True)
    ids = np.array([IDS["background"], *(IDS[name] for name in names)])
    chosen = ids[np.concatenate([background, found]).argmax(axis=0)]
    figures: dict[str, float] = {}
    for name, other in OTHER_SIDE.items():
        truth = classes == IDS[name]
        figures[f"{name}_dsc"] = dice(chosen == IDS[name], truth)
        figures[f"{name}_wrong_side"] = float((chosen[truth] == IDS[other]).mean())
    return figures


def require_baselines(store: Store, split: str) -> None:
    """Refuse a store that cannot tune the baselines, before anything is scored.

    Raises:
      InputError: of patches: see `indicators.require_baselines`. Of X-rays: training has fewer than
        two classes, or a single case of one. Of CT: the images are not in HU; no case of `split`
        has known lesions; or validation has no lesions, fewer than two classes, or a single case of
        one: its regressions are cross-validated.
    """
    if store.data.patches != "none":
        indicators.require_baselines(store)
        return
    if store.data.modality == "xray":
        counts = collections.Counter(case.label for case in store.cases("train"))
        if len(counts) < 2 or min(counts.values()) < 2:
            raise InputError(
                f"--baselines: the training split of {store.path} has "
                f"{len(counts)} classes, the rarest of {min(counts.values(), default=0)} cases; "
                "they are fitted on it and need two classes and two cases of each: add cases, or "
                "leave --baselines out"
            )
        return
    if store.data.intensity != "hu":
        raise InputError("--baselines: they are bands of HU, and these images are not in HU")
    tuning = _known(store, "validation")
    counts = collections.Counter(store.data.classes[case.label] for case in tuning)
    lesions = sum(bool(case.lesion_voxels) for case in tuning)
    if not lesions or len(counts) < 2 or min(counts.values()) < 2:
        found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no case"
        raise InputError(
            f"--baselines: the validation split of {store.path} has {found}, {lesions} of them "
            "with lesions; they are tuned on it and need lesions and two classes, two cases of "
            "each that it has: add cases, or leave --baselines out"
        )
    if not _known(store, split):
        raise InputError(
            f"--baselines: no case of split {split} in {store.path} has known lesions, at least 1 "
            "expected: add lesion masks, or leave --baselines out"
        )


def baseline_figures(store: Store, data_dir: pathlib.Path, split: str) -> tuple[JsonObject, str]:
    """What needs no network on such data, and the lines that say it.

    Raises:
      InputError: see `require_baselines`.
    """
    if store.data.patches != "none":
        figures = indicators.baselines(store, data_dir, split)
        return figures, indicators.table(figures)
    if store.data.modality == "xray":
        figures = score_image_baselines(store, data_dir, split)
        return figures, image_baselines.table(figures)
    figures = score_baselines(store, data_dir, split)
    return figures, baselines.table(figures)


def score_image_baselines(
    store: Store, data_dir: pathlib.Path, split: str
) -> dict[str, dict[str, float]]:
    """What `image_baselines` says of X-rays, as the network sees them: fitted on training.

    Raises:
      InputError: see `require_baselines`.
    """
    require_baselines(store, split)
    nuisances = _nuisances(data_dir)

    def read(name: str) -> list[image_baselines.ImageCase]:
        return [
            image_baselines.ImageCase(
                store.read(case.name, "volume")[0],
                store.read(case.name, "lesion")[0] > 0 if case.lesions_known else None,
                case.label,
                nuisances.get(case.name, {}),
            )
            for case in store.cases(name)
        ]

    return image_baselines.image_baselines(read("train"), read(split))


def _nuisances(data_dir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of phantoms, by case."""
    file = data_dir / "nuisances.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def score_baselines(store: Store, data_dir: pathlib.Path, split: str) -> dict[str, float | None]:
    """What `baselines.run_baselines` says: tuned on validation, scored on `split`.

    Phantoms bring their nuisances in `data_dir`/nuisances.json. Cases whose lesions are not known
    are left out.

    Raises:
      InputError: see `require_baselines`.
    """
    require_baselines(store, split)
    nuisances = _nuisances(data_dir)

    def read(name: str) -> list[baselines.BaselineCase]:
        return [
            source_case(store, case, store.data.intensity, nuisances.get(case.name))
            for case in _known(store, name)
        ]

    return baselines.run_baselines(read("validation"), read(split))


def _known(store: Store, split: str) -> list[StoredCase]:
    """The cases of a split whose lesions are known."""
    return [case for case in store.cases(split) if case.lesions_known]
