"""What is made of a network's predictions before they are a result, on the working grid."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from deepsc_jax.data.classes import OTHER_SIDE
from deepsc_jax.data.prediction import Prediction, Volume
from deepsc_jax.inference.options import LesionGate


def gated(prediction: Prediction, lesion_free: int, gate: LesionGate) -> Prediction:
    """The same with the lesion probability as the class has it.

    Args:
      prediction: with a lesion probability and classes, unless the gate is `none`.
      lesion_free: id of the class whose scans have no lesion.
      gate: `soft`: times the probability of any other class; `hard`: 0 where that class is the most
        probable.
    """
    if gate == "none":
        return prediction
    assert prediction.lesion is not None
    assert prediction.classes is not None
    if gate == "soft":
        factor = 1 - prediction.classes[lesion_free]
    else:
        factor = prediction.classes.argmax() != lesion_free
    lesion = prediction.lesion * np.float32(np.clip(factor, 0, 1))
    return dataclasses.replace(prediction, volumes={**prediction.volumes, "lesion": lesion})


def mirrored(prediction: Prediction) -> Prediction:
    """What was said of a scan's mirror image (its width reversed), of the scan itself."""
    volumes = {OTHER_SIDE.get(name, name): x for name, x in prediction.volumes.items()}
    return dataclasses.replace(
        prediction,
        volumes={name: volumes[name][..., ::-1] for name in prediction.volumes},
        evidence={name: x[..., ::-1] for name, x in prediction.evidence.items()},
    )


def mean(predictions: Sequence[Prediction]) -> Prediction:
    """The mean of what was said of a scan, at least once and each time of the same things.

    Evidence is for a class: the mean of that for the most probable class of the mean; where no
    prediction was of that class, of all, and a note says so.
    """
    first, *others = predictions
    if not others:
        return first
    classes, pointing = None, list(predictions)
    notes = dict.fromkeys(note for each in predictions for note in each.notes)
    given = [each.classes for each in predictions if each.classes is not None]
    if given:
        classes = np.asarray(np.mean(given, axis=0, dtype=np.float32))
        agreeing = [
            each
            for each, of_one in zip(predictions, given, strict=True)
            if of_one.argmax() == classes.argmax()
        ]
        pointing = agreeing or pointing
        if not agreeing and first.evidence:
            notes["the evidence is for other classes than the most probable one of the mean"] = None
    return Prediction(
        volumes=_mean_volumes([each.volumes for each in predictions]),
        classes=classes,
        evidence=_mean_volumes([each.evidence for each in pointing]),
        values={k: float(np.mean([each.values[k] for each in predictions])) for k in first.values},
        notes=tuple(notes),
    )


def _mean_volumes(parts: Sequence[Mapping[str, Volume]]) -> dict[str, Volume]:
    means = {}
    for name in parts[0]:
        total = np.array(parts[0][name], np.float32)
        for part in parts[1:]:
            total += part[name]
        means[name] = total / np.float32(len(parts))
    return means
