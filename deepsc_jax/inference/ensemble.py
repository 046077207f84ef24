"""Trained networks as the commands ask for them: one or the mean of several, with options."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.store import READ_FIELDS
from deepsc_jax.inference import predictor as predictors
from deepsc_jax.inference.answers import gated, mean, mirrored
from deepsc_jax.inference.network import Network, network_digest
from deepsc_jax.inference.options import PredictionOptions
from deepsc_jax.inference.predictor import Predictor
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.system import Predict


class Ensemble:
    """Trained networks, whose probabilities are averaged, and what is made of them.

    Attributes:
      config: the first one's configuration, but for its devices; that of preprocessing is all's.
      options: what is made of their predictions.
      threshold: lesion probability from which a voxel is lesion: the mean of theirs, unless given.
      trained_on: `phantoms`, `scans`, or `unknown data`; several of them where they differ.

    Args:
      members: at least one, of one preprocessing, that give the same things (`load` sees to it).
      options: what is made of their predictions.

    Raises:
      InputError: the options ask for what the networks do not give.
    """

    def __init__(self, members: Sequence[Predictor], options: PredictionOptions):
        _require_possible(members[0], options)
        self._members, self.options, self.config = members, options, members[0].config
        mean_threshold = sum(member.threshold for member in members) / len(members)
        self.threshold = mean_threshold if options.threshold is None else options.threshold
        self.trained_on = " and ".join(dict.fromkeys(member.trained_on for member in members))

    def __call__(self, volume: Float[np.ndarray, "depth height width"]) -> Prediction:
        """Predict one preprocessed scan (`preprocess.Prepared.volume`)."""
        said = [member(volume) for member in self._members]
        if self.options.mirror:
            image = np.ascontiguousarray(volume[..., ::-1])
            said += [mirrored(member(image)) for member in self._members]
        return gated(mean(said), self.config.data.lesion_free_id, self.options.lesion_gate)

    def broken(self) -> dict[str, Predict]:
        """The network broken on purpose, by what was done to it.

        Raises:
          InputError: there are several networks, or its system knows no way.
        """
        if len(self._members) > 1:
            raise InputError("--evidence=sanity: is of one network: give one with --checkpoint")
        found = self._members[0].broken()
        if not found:
            raise InputError(
                f"--evidence=sanity: the {self._members[0].stage.name} stage of "
                f"--model={self.config.name} has no part to break: leave it out"
            )
        return found

    def fold(self, split: str) -> tuple[int, int] | None:
        """`TrainConfig.folds` of the networks, by which `split` is read; None for test.

        Raises:
          InputError: they have several, and of `split` each has seen other scans in training.
        """
        if split == "test":  # no fold changes it
            return None
        if len({member.config.train.folds for member in self._members}) > 1:
            raise InputError(
                f"--split={split}: the networks of --checkpoint have different folds, so that some "
                "were trained on it: give test, or one network"
            )
        return self.config.train.folds

    def facts(self) -> JsonObject:
        """What metrics.json says of it."""
        facts = {"networks": len(self._members), "trained_on": self.trained_on}
        if "lesions" in self._members[0].stage.learns:
            facts["lesion_threshold"] = self.threshold
        return self.options.facts() | facts

    @property
    def network(self) -> Network:
        """What results say of it."""
        networks = [member.network for member in self._members]
        digest = networks[0].digest
        if len(networks) > 1:
            digests = "".join(network_digest(network) for network in networks)
            digest = hashlib.sha256(digests.encode()).hexdigest()
        return dataclasses.replace(
            networks[0],
            threshold=self.threshold,
            trained_on=self.trained_on,
            digest=digest,
            options=self.options,
            networks=len(networks),
        )


def load(
    workdirs: Sequence[pathlib.Path],
    stage: str | None,
    options: PredictionOptions,
    form: Literal["auto", "direct"] = "auto",
) -> Ensemble:
    """The best checkpoints of training runs, and what is made of their predictions.

    Args:
      workdirs: each run's `--workdir`.
      stage: whose checkpoint; by default the last stage of each that has one.
      options: what is made of their predictions.
      form: of their convolutions (`PlatformConfig.conv_form`).

    Raises:
      InputError: as `predictor.load`; there is no run; the networks are of other preprocessing, or
        do not give the same things; or the options ask for what they do not give.
    """
    if not workdirs:
        raise InputError("--checkpoint: is empty, expected a path")
    members = [predictors.load(workdir, stage, form) for workdir in workdirs]
    require_alike(workdirs, members)
    return Ensemble(members, options)


def require_alike(workdirs: Sequence[pathlib.Path], members: Sequence[Predictor]) -> None:
    """Refuse networks that cannot be averaged.

    Raises:
      InputError: they are of other preprocessing, or do not give the same things.
    """
    expected = _of_mean(members[0])
    for workdir, member in zip(workdirs, members, strict=True):
        for name, value in _of_mean(member).items():
            if value != expected[name]:
                raise InputError(
                    f"--checkpoint: {workdir} has {name} {value}, and {workdirs[0]} "
                    f"{expected[name]}: give networks that have the same, or predict with each "
                    "apart"
                )


def _of_mean(member: Predictor) -> dict[str, object]:
    """What networks must have in common for a mean: preprocessing, and what they give, by name."""
    data = dataclasses.asdict(member.config.data)
    facts = {f"--{name}": value for name, value in data.items() if name not in READ_FIELDS}
    return facts | {"tasks": member.stage.learns, "volumes": member.network.volumes}


def _require_possible(member: Predictor, options: PredictionOptions) -> None:
    if options.lesion_gate != "none" and not member.config.data.lesion_free:
        raise InputError(
            f"--lesion_gate={options.lesion_gate}: the network was trained with --lesion_free= and "
            "knows no class without lesions: give none"
        )
    learns = member.stage.learns
    lacking = [task for task in ("lesions", "classes") if task not in learns]
    if options.lesion_gate != "none" and lacking:
        raise InputError(
            f"--lesion_gate={options.lesion_gate}: the {member.stage.name} stage of "
            f"--model={member.config.name} gives no {' and no '.join(lacking)}: give none, or "
            "--stage of one that gives lesions and classes"
        )
