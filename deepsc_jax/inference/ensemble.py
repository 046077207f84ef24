"""A trained network as the commands ask for it: with what is made of its predictions."""

import dataclasses
import pathlib
from typing import Literal

import numpy as np
from jaxtyping import Float

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference import predictor as predictors
from deepsc_jax.inference.answers import gated, mean, mirrored
from deepsc_jax.inference.options import PredictionOptions
from deepsc_jax.inference.predictor import Predictor
from deepsc_jax.inference.results import Network
from deepsc_jax.runtime.errors import InputError


class Ensemble:
    """A trained network and what is made of its predictions.

    Attributes:
      config: the configuration it was trained with, but for its devices.
      options: what is made of its predictions.
      threshold: lesion probability from which a voxel is lesion.
      trained_on: `phantoms`, `scans`, or `unknown data`.

    Raises:
      InputError: the options ask for what the network does not give.
    """

    def __init__(self, member: Predictor, options: PredictionOptions):
        _require_possible(member, options)
        self._member, self.options = member, options
        self.config, self.threshold = member.config, member.threshold
        self.trained_on = member.trained_on

    def __call__(self, volume: Float[np.ndarray, "depth height width"]) -> Prediction:
        """Predict one preprocessed scan (`preprocess.Prepared.volume`)."""
        said = [self._member(volume)]
        if self.options.mirror:
            said.append(mirrored(self._member(np.ascontiguousarray(volume[..., ::-1]))))
        return gated(mean(said), self.config.data.lesion_free_id, self.options.lesion_gate)

    @property
    def network(self) -> Network:
        """What results say of it."""
        return dataclasses.replace(self._member.network, options=self.options)


def load(
    workdir: pathlib.Path,
    stage: str | None,
    options: PredictionOptions,
    form: Literal["auto", "direct"] = "auto",
) -> Ensemble:
    """The best checkpoint of a training run, with what is made of its predictions.

    Args:
      workdir: the run's `--workdir`.
      stage: whose checkpoint; by default the last stage that has one.
      options: what is made of its predictions.
      form: of its convolutions (`PlatformConfig.conv_form`).

    Raises:
      InputError: as `predictor.load`, or the options ask for what the network does not give.
    """
    return Ensemble(predictors.load(workdir, stage, form), options)


def _require_possible(member: Predictor, options: PredictionOptions) -> None:
    learns = member.stage.learns
    lacking = [task for task in ("lesions", "classes") if task not in learns]
    if options.lesion_gate != "none" and lacking:
        raise InputError(
            f"--lesion_gate={options.lesion_gate}: the {member.stage.name} stage of "
            f"--model={member.config.name} gives no {' and no '.join(lacking)}: give none, or "
            "--stage of one that gives lesions and classes"
        )
