"""What is made of a network's predictions before they are a result, on the working grid."""

import dataclasses

import numpy as np

from deepsc_jax.data.prediction import Prediction
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
