"""A trained network from its run's folder, ready for any number of scans."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Literal, Protocol

import jax
import numpy as np
from jaxtyping import Float

from deepsc_jax.config import Config
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference.network import Network
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Predict, Stage, System, Variables, initial
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import has_checkpoint, load_variables


class SegmentsScans(Protocol):
    """What an evaluation asks of a trained network, ours or another's."""

    config: Config
    threshold: float

    def __call__(self, volume: Float[np.ndarray, "depth height width"], /) -> Prediction:
        """Predict one preprocessed scan."""
        ...


class Predictor:
    """A trained network, ready for any number of scans.

    Attributes:
      config: the configuration it was trained with, but for its devices.
      stage: the stage whose checkpoint it is.
      variables: the network's.
      threshold: lesion probability from which a voxel is lesion, chosen on validation; 0.5 without.
      trained_on: `phantoms`, `scans`, or `unknown data`.
      whole_scans: whether training scans were one tile each, as every scan is then here.
    """

    def __init__(
        self,
        system: System,
        stage: Stage,
        variables: Variables,
        threshold: float,
        trained_on: str,
        *,
        whole_scans: bool = False,
    ):
        self._system = system
        self.config, self.stage, self.variables = system.config, stage, variables
        self.threshold, self.trained_on = threshold, trained_on
        self.whole_scans = whole_scans
        self._predict = system.predictor(stage, variables, whole_scans=whole_scans)

    def __call__(self, volume: Float[np.ndarray, "depth height width"]) -> Prediction:
        """Predict one preprocessed scan (`preprocess.Prepared.volume`)."""
        return self._predict(volume)

    def broken(self) -> dict[str, Predict]:
        """The same network broken on purpose, in each way that its system knows, by name."""
        return self._system.broken(self.stage, self.variables, whole_scans=self.whole_scans)

    @property
    def network(self) -> Network:
        """What results say of this network."""
        return Network(
            self.config.data,
            self.stage.name,
            self.threshold,
            self.trained_on,
            self._digest,
            self._system.volumes(self.stage),
        )

    @functools.cached_property
    def _digest(self) -> str:
        options: JsonObject = {self.config.name: dataclasses.asdict(self.config.model)}
        options["whole_scans"] = self.whole_scans
        digest = hashlib.sha256(json.dumps(options).encode())
        for path, leaf in jax.tree.leaves_with_path(self.variables):
            array = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def load(
    workdir: pathlib.Path, stage: str | None = None, form: Literal["auto", "direct"] = "auto"
) -> Predictor:
    """The best checkpoint of a training run, or the last, as its `--keep` was.

    Args:
      workdir: the run's `--workdir`.
      stage: whose checkpoint; by default the last stage that has one.
      form: of its convolutions (`PlatformConfig.conv_form`).

    Raises:
      InputError: no run or no checkpoint there, no such stage, or this device has not that form.
    """
    record = workdirs.read(workdir)
    # In whichever form and on however many devices it was trained, the weights are the same.
    platform = dataclasses.replace(record.config.platform, conv_form=form, space=1)
    system = build(dataclasses.replace(record.config, platform=platform))
    chosen = chosen_stage(system, workdir, stage)
    system = system.of(chosen)
    like = abstract_state(system, chosen)
    variables, validated = load_variables(workdir / chosen.name, like, record.config.train.keep)
    threshold = record.thresholds.get(chosen.name) or validated.get("threshold") or 0.5
    return Predictor(
        system,
        chosen,
        variables,
        threshold,
        record.trained_on,
        whole_scans=record.whole_scans,
    )


def chosen_stage(system: System, workdir: pathlib.Path, name: str | None) -> Stage:
    """The stage of that name, by default the last one that has a checkpoint in `workdir`.

    Raises:
      InputError: the model has no such stage.
    """
    names = [stage.name for stage in system.stages]
    if name is None:
        trained = [stage for stage in system.stages if has_checkpoint(workdir / stage.name)]
        return (trained or system.stages)[-1]
    if name not in names:
        raise InputError(
            f"--stage={name}: --model={system.config.name} has the stages {', '.join(names)}: "
            "give one of them"
        )
    return system.stage(name)


def abstract_state(system: System, stage: Stage) -> states.State:
    """The shapes and types of a stage's state, on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda: states.create(system, stage, initial(system)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
