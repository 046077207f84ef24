"""Evidence measured: where maps point, whether they explain the answer, and when they do not."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from deepsc_jax.data import preprocess
from deepsc_jax.data.prediction import Prediction, Volume
from deepsc_jax.data.records import StoredCase
from deepsc_jax.evaluation.baselines import BaselineCase
from deepsc_jax.metrics.comparison import permutation_test
from deepsc_jax.metrics.evidence import Perturbed, Pointing, likeness, perturbation, pointing
from deepsc_jax.metrics.intervals import Resampling
from deepsc_jax.metrics.overlap import dice
from deepsc_jax.metrics.scan_figures import defined
from deepsc_jax.metrics.statistics import rows_of_patients
from deepsc_jax.metrics.summary import spread
from deepsc_jax.runtime.types import JsonObject

Predict = Callable[[Volume], Prediction]
Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Studies:
    """What is asked of evidence besides where it points.

    Attributes:
      thresholds: of each map, chosen on validation.
      curves: whether to take voxels away and put them back; the network is asked 29 times a map.
      broken: networks that are broken on purpose, by what was done to them.
    """

    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curves: bool = False
    broken: Mapping[str, Predict] = dataclasses.field(default_factory=dict)


class Scan(NamedTuple):
    """A scan, and what the network said of it.

    Attributes:
      case: the store's record.
      volume: on the working grid.
      prediction: the network's.
      truth: on the source's grid.
      lesion: the predicted mask there; None of a network without lesions.
    """

    case: StoredCase
    volume: Volume
    prediction: Prediction
    truth: BaselineCase
    lesion: Bool[np.ndarray, "depth height width"] | None


def of_scan(scan: Scan, predict: Predict, studies: Studies) -> JsonObject:
    """The part of a scan's row that is of its evidence, each only where there is something to say.

    `evidence`: of each map `Pointing` at true lesions, and `dice` at its threshold; `agreement`:
    the same of predicted lesions; `perturbation`: `Perturbed`; `sanity`: of each broken network and
    map its `Pointing`, the `likeness` to the map of the whole network, and the probability that the
    broken network gives the class.
    """
    row: JsonObject = {}
    maps = {
        name: preprocess.to_source(evidence, scan.case.grid)
        for name, evidence in scan.prediction.evidence.items()
    }
    if scan.truth.lesion.any():
        row["evidence"] = {name: _pointing(m, scan.truth) for name, m in maps.items()}
        for name, threshold in studies.thresholds.items():
            marked = (maps[name] >= threshold) & scan.truth.lung
            row["evidence"][name]["dice"] = dice(marked, scan.truth.lesion)
    if scan.lesion is not None and scan.lesion.any() and scan.prediction.classes is not None:
        of_predicted = dataclasses.replace(scan.truth, lesion=scan.lesion)
        row["agreement"] = {name: _pointing(m, of_predicted) for name, m in maps.items()}
        for name, threshold in studies.thresholds.items():
            marked = (maps[name] >= threshold) & scan.truth.lung
            row["agreement"][name]["dice"] = dice(marked, scan.lesion)
    if studies.curves and scan.prediction.classes is not None:
        row["perturbation"] = _perturbed(scan, predict)
    if studies.broken:
        row["sanity"] = {
            name: _broken(scan, broken, maps) for name, broken in studies.broken.items()
        }
    return row


def _pointing(evidence: Volume, truth: BaselineCase) -> Figures:
    """`evidence.pointing`, None where a figure is not defined."""
    figures = pointing(evidence, truth.lesion, truth.lung)._asdict()
    return {name: defined(x) for name, x in figures.items()}


def _perturbed(scan: Scan, predict: Predict) -> dict[str, Figures]:
    assert scan.prediction.classes is not None
    given = int(scan.prediction.classes.argmax())

    def probability(volume: Volume) -> float:
        classes = predict(volume).classes
        assert classes is not None
        return float(classes[given])

    lung = scan.volume > 0
    if not lung.any():
        return {}
    return {
        name: dict(perturbation(probability, scan.volume, evidence, lung)._asdict())
        for name, evidence in scan.prediction.evidence.items()
    }


def _broken(scan: Scan, predict: Predict, maps: Mapping[str, Volume]) -> JsonObject:
    """What a broken network says of a scan, beside what the whole one says."""
    said, lung = predict(scan.volume), scan.truth.lung
    figures: JsonObject = {}
    for name, evidence in said.evidence.items():
        on_source = preprocess.to_source(evidence, scan.case.grid)
        figures[name] = {"likeness": defined(likeness(on_source[lung], maps[name][lung]))}
        if scan.truth.lesion.any():
            figures[name] |= _pointing(on_source, scan.truth)
    if said.classes is not None and scan.prediction.classes is not None:
        given = int(scan.prediction.classes.argmax())
        figures["probability"] = float(said.classes[given])
        figures["same_class"] = bool(said.classes.argmax() == given)
    return figures


def summarised(
    rows: Sequence[JsonObject],
    patients: Sequence[str],
    classes: Sequence[str],
    resampling: Resampling,
) -> JsonObject:
    """What metrics.json says of evidence, each part where a row has it.

    `evidence`: of each map the spread over scans with lesions, and of each class's (`by_class`);
    `agreement`: the spread where the given class is right and where it is wrong, and the difference
    with its p by permutation; `perturbation` and `sanity` over all scans that have them.
    """
    document: JsonObject = {}
    owners = np.asarray(patients)
    if any("evidence" in row for row in rows):
        document["evidence"] = {}
        for name, keys in _maps(rows, "evidence").items():
            figures = _spreads(rows, owners, ("evidence", name), keys, resampling)
            figures["by_class"] = {
                label: _spreads(
                    *_only(rows, owners, [row["label"] == label for row in rows]),
                    ("evidence", name),
                    keys,
                    resampling,
                )
                for label in classes
                if any(row["label"] == label and "evidence" in row for row in rows)
            }
            document["evidence"][name] = figures
    if any("agreement" in row for row in rows):
        document["agreement"] = {
            name: _agreement(rows, owners, name, keys, resampling)
            for name, keys in _maps(rows, "agreement").items()
        }
    if any("perturbation" in row for row in rows):
        document["perturbation"] = {
            name: _spreads(rows, owners, ("perturbation", name), Perturbed._fields, resampling)
            for name in _maps(rows, "perturbation")
        }
    if any("sanity" in row for row in rows):
        document["sanity"] = _sanity(rows, owners, resampling)
    return document


def _maps(rows: Sequence[JsonObject], part: str) -> dict[str, list[str]]:
    """The names of the maps, and of their figures."""
    maps: dict[str, list[str]] = {}
    for row in rows:
        for name, figures in row.get(part, {}).items():
            if isinstance(figures, dict):
                maps.setdefault(name, list(figures))
    return maps


def _only(
    rows: Sequence[JsonObject], patients: np.ndarray, chosen: Sequence[bool]
) -> tuple[list[JsonObject], np.ndarray]:
    places = np.flatnonzero(chosen).tolist()
    return [rows[i] for i in places], patients[places]


def _value(row: JsonObject, path: Sequence[str]) -> float | None:
    for name in path:
        row = row.get(name, {})
    return row if isinstance(row, int | float) else None


def _spreads(
    rows: Sequence[JsonObject],
    patients: np.ndarray,
    place: tuple[str, ...],
    keys: Sequence[str],
    resampling: Resampling,
) -> JsonObject:
    return {
        key: spread([_value(row, (*place, key)) for row in rows], patients, resampling)
        for key in keys
    }


def _agreement(
    rows: Sequence[JsonObject],
    patients: np.ndarray,
    name: str,
    keys: Sequence[str],
    resampling: Resampling,
) -> JsonObject:
    """Of one map, where the answer is right and where it is wrong (the paper's Fig. 10)."""
    right = np.array([is_right(row) for row in rows])
    found: JsonObject = {}
    for said, chosen in (("right", right), ("wrong", ~right)):
        some, owners = _only(rows, patients, chosen.tolist())
        found[said] = _spreads(some, owners, ("agreement", name), keys, resampling)
    for key in keys:
        values = [_value(row, ("agreement", name, key)) for row in rows]
        known = np.array([value is not None for value in values])
        x = np.array([math.nan if value is None else value for value in values])
        groups = [_patients_of(patients, known & chosen) for chosen in (right, ~right)]
        if all(groups):
            test = permutation_test(
                lambda drawn, x=x: float(x[drawn].mean()),
                *groups,
                level=resampling.level,
                resamples=resampling.resamples,
                seed=resampling.seed,
            )
            found.setdefault("difference", {})[key] = {
                "value": test.difference,
                "low": test.interval.low,
                "high": test.interval.high,
                "p": test.p,
            }
    return found


def is_right(row: JsonObject) -> bool:
    """Whether a scan is given its class; of a network without classes it is not."""
    probabilities = row.get("probabilities")
    return bool(probabilities) and max(probabilities, key=probabilities.get) == row["label"]


def _patients_of(patients: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    places = np.flatnonzero(chosen)
    return [places[rows] for rows in rows_of_patients(patients[places])] if len(places) else []


def _sanity(rows: Sequence[JsonObject], patients: np.ndarray, resampling: Resampling) -> JsonObject:
    found: JsonObject = {}
    for check in next(row["sanity"] for row in rows if "sanity" in row):
        names = _maps([row["sanity"] for row in rows if "sanity" in row], check)
        keys = ("likeness", *Pointing._fields)
        found[check] = {
            name: _spreads(rows, patients, ("sanity", check, name), keys, resampling)
            for name in names
        }
        for name in ("probability", "same_class"):
            values = [_value(row, ("sanity", check, name)) for row in rows]
            found[check][name] = spread(values, patients, resampling)
    return found
