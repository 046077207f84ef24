"""A system that is no model of the registry: what the engine may know of one, and no more."""

import dataclasses
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepsc_jax.config import Config, DataConfig, PlatformConfig, StageConfig, TrainConfig
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.system import (
    Batch,
    Facts,
    Losses,
    Predict,
    Stage,
    System,
    Variables,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Of two stages."""

    NAME: ClassVar[str] = "counting"
    first: StageConfig
    second: StageConfig

    @property
    def tile_step(self) -> int:
        return 1

    def widened(self, factor: int) -> "Options":
        del factor
        return self

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        del data, platform


class Counting(System):
    """A linear classifier of the mean slice, which counts what it has seen."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(
                name,
                Reads(slices=True),
                ("classes",),
                self.config.stage(name).steps,
                self.config.stage(name).batch,
                after,
            )
            for name, after in (("first", ()), ("second", ("first",)))
        )

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        voxels, classes = math.prod(batch["slices"].shape[2:]), len(self.config.data.classes)
        params = {
            "weight": jax.random.normal(key, (voxels, classes)) / 8,
            "bias": jnp.zeros(classes),
        }
        return {"params": params, "counts": {"batches": jnp.int32(0), "scans": jnp.int32(0)}}

    def start(self, stage: Stage, fresh: Variables, trained: Mapping[str, Variables]) -> Variables:
        """The second stage's: the first one's weights and counts, and a fresh bias."""
        if stage.name == "first":
            return super().start(stage, fresh, trained)
        params = {"weight": trained["first"]["params"]["weight"], "bias": fresh["params"]["bias"]}
        return {"params": params, "counts": trained["first"]["counts"]}

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        logits = self.outputs(stage, variables, batch)["logits"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        loss = facts["class_weights"][batch["label"]] * loss
        seen = device_mesh.sum_over_data(jnp.int32(len(batch["label"])))
        counts = variables["counts"]
        counts = {"batches": counts["batches"] + 1, "scans": counts["scans"] + seen}
        return {"loss": loss}, {"counts": counts}

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Any]:
        del stage
        mean = batch["slices"].mean(axis=1).reshape(len(batch["slices"]), -1)
        params = variables["params"]
        return {"logits": mean @ params["weight"] + params["bias"]}

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        logits = self.outputs(stage, variables, batch)["logits"]
        return {"probabilities": jax.nn.softmax(logits)}

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        del stage
        return ()

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        del whole_scans

        def predict(volume: np.ndarray) -> Prediction:
            batch = {"slices": jnp.asarray(volume[None])}
            return Prediction(
                classes=np.asarray(self.measures(stage, variables, batch)["probabilities"][0])
            )

        return predict


CONFIG = Config(
    model=Options(
        first=StageConfig(steps=4, batch=4, learning_rate=0.1),
        second=StageConfig(steps=1, batch=2, learning_rate=0.0),
    ),
    data=DataConfig(working_size=(8, 16), tile=(8, 8, 8), slices=4, depth_bucket=8),
    train=TrainConfig(log_every=1, evaluate_every=2, checkpoint_every=2),
    platform=PlatformConfig(data_devices=2),
)


def counting(*, loop_tiles: bool = False, **platform: Any) -> Counting:
    choice = dataclasses.replace(CONFIG.platform, **platform)
    config = dataclasses.replace(CONFIG, platform=choice)
    return Counting(config, Layout(loop_tiles=loop_tiles), ModuleType("linear"))
